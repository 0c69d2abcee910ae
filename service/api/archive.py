"""Files as one tar: sizes known beforehand, the same bytes every time."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from pathlib import Path

import anyio
from anyio.to_thread import run_sync

from service.api.replies import CHUNK_BYTES, SourceGone
from service.errors import ArrowQuantError
from service.jobs.contents import Contents
from service.jobs.job import Artifact

_END = bytes(2 * tarfile.BLOCKSIZE)


def archive_bytes(artifacts: Sequence[Artifact]) -> int:
    """Length of the archive."""
    return sum(len(_header(a)) + a.size_bytes + _padding(a) for a in artifacts) + len(_END)


def archive_etag(artifacts: Sequence[Artifact]) -> str:
    """An entity tag that follows from names and contents."""
    lines = "".join(f"{a.sha256} {a.path}\n" for a in artifacts)
    return f'"tar-{hashlib.sha256(lines.encode()).hexdigest()[:32]}"'


async def archive(contents: Contents, artifacts: Sequence[Artifact]) -> AsyncGenerator[bytes, None]:
    """The archive in pieces."""
    for artifact in artifacts:
        yield _header(artifact)
        async for piece in file_range(contents, artifact, 0, artifact.size_bytes):
            yield piece
        yield bytes(_padding(artifact))
    yield _END


def file_range(contents: Contents, artifact: Artifact, start: int, stop: int) -> AsyncGenerator[bytes, None]:
    """Bytes start to stop of a file. Raises SourceGone when it is not there any more, or shorter than that."""
    path = contents.path(artifact)
    return _local_range(path, start, stop) if path is not None else _remote_range(contents, artifact, start, stop)


async def _local_range(path: Path, start: int, stop: int) -> AsyncGenerator[bytes, None]:
    try:
        opened = await anyio.open_file(path, "rb")
    except FileNotFoundError as error:
        raise SourceGone(f"{path} was removed") from error
    async with opened as file:
        await file.seek(start)
        while start < stop:
            piece = await file.read(min(CHUNK_BYTES, stop - start))
            if not piece:
                raise SourceGone(f"{path} was cut short")
            start += len(piece)
            yield piece


async def _remote_range(contents: Contents, artifact: Artifact, start: int, stop: int) -> AsyncGenerator[bytes, None]:
    with ExitStack() as stack:
        try:
            threads = contents.store_threads
            file = await run_sync(stack.enter_context, contents.opened(artifact), limiter=threads)
            while start < stop:
                piece = await run_sync(file.read, start, min(CHUNK_BYTES, stop - start), limiter=threads)
                start += piece.size
                yield piece.tobytes()
        except ArrowQuantError as error:
            raise SourceGone(error.detail) from error


def _header(artifact: Artifact) -> bytes:
    # No times, owners or modes of this machine: the bytes depend on names and contents alone.
    info = tarfile.TarInfo(artifact.path)
    info.size = artifact.size_bytes
    info.mode = 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(artifact: Artifact) -> int:
    return -artifact.size_bytes % tarfile.BLOCKSIZE
