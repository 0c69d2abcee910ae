"""Files as one tar: sizes known beforehand, the same bytes every time."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import anyio

from service.api.replies import CHUNK_BYTES, SourceGone
from service.jobs.job import Artifact

_END = bytes(2 * tarfile.BLOCKSIZE)


def archive_bytes(artifacts: Sequence[Artifact]) -> int:
    """Length of the archive."""
    return sum(len(_header(a)) + a.size_bytes + _padding(a) for a in artifacts) + len(_END)


def archive_etag(artifacts: Sequence[Artifact]) -> str:
    """An entity tag that follows from names and contents."""
    lines = "".join(f"{a.sha256} {a.path}\n" for a in artifacts)
    return f'"tar-{hashlib.sha256(lines.encode()).hexdigest()[:32]}"'


async def archive(artifacts: Sequence[Artifact]) -> AsyncGenerator[bytes, None]:
    """The archive in pieces."""
    for artifact in artifacts:
        yield _header(artifact)
        async for piece in file_range(Path(artifact.location), 0, artifact.size_bytes):
            yield piece
        yield bytes(_padding(artifact))
    yield _END


async def file_range(path: Path, start: int, stop: int) -> AsyncGenerator[bytes, None]:
    """Bytes start to stop of a file. Raises SourceGone when it is not there any more, or shorter than that."""
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


def _header(artifact: Artifact) -> bytes:
    # No times, owners or modes of this machine: the bytes depend on names and contents alone.
    info = tarfile.TarInfo(artifact.path)
    info.size = artifact.size_bytes
    info.mode = 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(artifact: Artifact) -> int:
    return -artifact.size_bytes % tarfile.BLOCKSIZE
