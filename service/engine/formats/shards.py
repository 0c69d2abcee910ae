"""Writes safetensors files of unknown length piece by piece, so that a killed process can go on.

Their SHA-256 is made on the way when what will come is known: the header, which comes first in the
file and is written last, is then known as well.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from service.engine.formats.base import Cancelled
from service.engine.formats.safetensors_header import PREFIX_BYTES
from service.engine.formats.shard_layout import BODY, TAIL_DIVISORS, Parts, Region, Shard, ShardLayout
from service.engine.formats.trailing_hash import TrailingHash
from service.storage.faults import storage_faults

COPY_BYTES = 8 << 20
#: What is written in smaller pieces is put together first, where one lies behind the other.
SMALL_BYTES = 64 << 10
GATHERED_BYTES = 1 << 20


class ShardWriter:
    """Files `<stem>.safetensors`, or `<stem>-0000i-of-0000n.safetensors` when there are several."""

    def __init__(self, folder: Path, stem: str, reserve: int, max_shard_bytes: int) -> None:
        self._folder = folder
        self._stem = stem
        self._layout = ShardLayout(reserve, max_shard_bytes)
        self._reserve = self._layout.reserve
        self._files: dict[tuple[int, int], int] = {}  # descriptors of what is being written, by shard and part
        self._gathered = bytearray()
        self._gathered_for: tuple[int, int] | None = None  # the file, and where in it they begin
        self._committed: list[tuple[int, list[Region]]] = []  # by shard's number, what `state` has not told yet
        self._foreseen: dict[int, bytes] = {}  # headers, by shard
        self._hashes: dict[int, TrailingHash] = {}  # by shard
        self._followed = 0  # of shards before this one all is told
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="hash")

    @property
    def shards(self) -> list[Shard]:
        """All of them; the last one grows."""
        return self._layout.shards

    def expect(self, tensors: Iterable[Parts], metadata: Mapping[str, str]) -> None:
        """What will be begun from here on, and nothing else, unless one of them is abandoned."""
        self._foreseen = self._layout.foresee(tensors, metadata)
        self._follow()

    def begin(self, parts: Parts) -> list[Region]:
        """Room for tensors that have to lie in one file."""
        last = self.shards[-1]
        regions = self._layout.begin(parts)
        if self.shards[-1] is not last:
            self._flush()
            self._close_files()
        return regions

    def write(self, region: Region, offset: int, data: memoryview) -> None:
        """Bytes of a region begun, `offset` from its start."""
        start = region.start + offset + (self._reserve if region.part == BODY else 0)
        shard = self._layout.shards[-1]
        file = self._open(shard, region.part)
        if data.nbytes < SMALL_BYTES:
            self._gather(file, data, start)
            return
        self._flush()
        with storage_faults("writing the weights"):
            _pwrite(file, data, start)
        if region.part == BODY and region.start == shard.sizes[BODY]:
            # Behind all that is committed, in order: it stays unless the tensor is abandoned.
            self._follow(region.start + offset + data.nbytes)

    def commit(self) -> int:
        """Keep what was begun; its bytes."""
        regions = self._layout.commit()
        self._committed.append((self.shards[-1].number, regions))
        return sum([r.nbytes for r in regions])

    def put_all(self, tensors: Sequence[Parts], data: Sequence[memoryview]) -> None:
        """`begin`, `write` and `commit` for each, given the bytes of all parts; what is adjacent is written at once."""
        waiting = iter(data)
        first = 0
        while first < len(tensors):
            last = self.shards[-1]
            count, regions = self._layout.add_all(tensors[first:])
            if self.shards[-1] is not last:
                self._flush()
                self._close_files()
            pieces = list(islice(waiting, len(regions)))
            for whole in _by_part(regions):
                together = b"".join([pieces[index] for index in whole])
                self.write(regions[whole[0]], 0, memoryview(together))
            self._committed.append((self.shards[-1].number, regions))
            first += count

    def abandon(self) -> None:
        """Forget what was begun; its bytes are overwritten by what comes next, or cut off."""
        self._flush()
        self._forget_hashes()
        shard = self._layout.abandon()
        if shard is not None:
            self._close_files()
            self._remove(shard)

    def state(self) -> dict[str, Any]:
        """What was committed since the last call, all of which is then in the files."""
        self._flush()
        self._follow()
        told, self._committed = self._committed, []
        return {"tensors": [{"shard": n, "regions": [_region_json(r) for r in regions]} for n, regions in told]}

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Take up the files of an earlier process; raises StorageFailure when they are not there."""
        for entry in (e for state in states for e in state["tensors"]):
            regions = [Region(n, d, tuple(s), p, a, b) for n, d, s, p, a, b in entry["regions"]]
            self._layout.restore(entry["shard"], regions)
        with storage_faults("taking up the work of an earlier run"):
            self._drop_unknown()
            for shard in self.shards:
                self._restore_files(shard)

    def finish(self, metadata: dict[str, str], cancelled: Cancelled) -> dict[str, list[str]]:
        """Complete all files; file names with the tensors they hold, or nothing when cancelled."""
        self._flush()
        with storage_faults("completing the weights"):
            for shard in self.shards:
                if cancelled():
                    return {}
                self._complete(shard, metadata)
            self._close_files()
            for shard in self.shards:
                self._part_path(shard, BODY).replace(self._final_path(shard))
            for shard in self.shards:
                self._remove(shard)
        return {self._final_path(s).name: [r.name for r in s.regions] for s in self.shards}

    def digest(self, path: Path, advance: Callable[[int], None]) -> str | None:
        """The SHA-256 of a finished file, if it was made on the way; see `ModelWriter.digest`."""
        for shard in self.shards:
            if path == self._final_path(shard) and shard.number in self._hashes:
                with storage_faults("hashing the weights"):
                    return self._hashes[shard.number].finish(self._reserve + shard.nbytes, advance)
        return None

    def discard(self) -> None:
        """Close the files as they are."""
        self._forget_hashes()
        self._hashing.shutdown()
        self._gathered, self._gathered_for = bytearray(), None
        self._close_files()

    def _gather(self, file: int, data: memoryview, start: int) -> None:
        """Write with what comes before and behind it."""
        expected = self._gathered_for and (self._gathered_for[0], self._gathered_for[1] + len(self._gathered))
        if (file, start) != expected or len(self._gathered) >= GATHERED_BYTES:
            self._flush()
            self._gathered_for = file, start
        self._gathered += data

    def _flush(self) -> None:
        """Write what was gathered."""
        if self._gathered_for is not None:
            with storage_faults("writing the weights"):
                _pwrite(self._gathered_for[0], memoryview(self._gathered), self._gathered_for[1])
            self._gathered, self._gathered_for = bytearray(), None

    def _follow(self, body_bytes: int = 0) -> None:
        """Hash what is in the last files for good, of the very last one so many bytes of the body at least."""
        for shard in self.shards[self._followed :]:
            header = self._foreseen.get(shard.number)
            end = max(shard.sizes[BODY], body_bytes if shard is self.shards[-1] else 0)
            if header is not None and end:
                if shard.number not in self._hashes:
                    with storage_faults("hashing the weights"):
                        self._hashes[shard.number] = TrailingHash(self._part_path(shard, BODY), header, self._hashing)
                self._hashes[shard.number].follow(self._reserve + end)
        self._followed = len(self.shards) - 1

    def _forget_hashes(self) -> None:
        """Something else comes than was expected: files are hashed when they are whole."""
        self._foreseen = {}
        while self._hashes:
            self._hashes.popitem()[1].close()

    def _complete(self, shard: Shard, metadata: dict[str, str]) -> None:
        """Append the tails and fill in the header; harmless when done twice."""
        body = self._open(shard, BODY)
        os.ftruncate(body, self._reserve + shard.sizes[BODY])
        starts = shard.starts()
        for part in TAIL_DIVISORS:
            if shard.sizes[part]:
                tail = self._open(shard, part)
                _copy(tail, 0, body, self._reserve + starts[part], shard.sizes[part])
        header = self._layout.header(shard, metadata)
        if header != self._foreseen.get(shard.number):
            self._forget_hashes()
        _pwrite(body, memoryview(header), 0)

    def _restore_files(self, shard: Shard) -> None:
        """Cut each part to what was committed, out of a completed file if need be."""
        body, finals = self._part_path(shard, BODY), list(self._finals(shard))
        if not body.exists() and finals:
            finals[0].replace(body)
        for part in TAIL_DIVISORS:
            path = self._part_path(shard, part)
            if shard.sizes[part] and (not path.exists() or path.stat().st_size < shard.sizes[part]):
                self._restore_tail(shard, part)
            if path.exists():
                os.truncate(path, shard.sizes[part])
        if shard.regions:
            file = self._open(shard, BODY)  # made here if all that was written lies in tails
            if shard.sizes[BODY] and os.fstat(file).st_size < self._reserve + shard.sizes[BODY]:
                raise OSError(errno.EIO, "a file is shorter than what was written to it")
            os.ftruncate(file, self._reserve + shard.sizes[BODY])
        else:
            self._remove(shard)
            body.unlink(missing_ok=True)

    def _restore_tail(self, shard: Shard, part: int) -> None:
        """Take a tail out of the completed file, which may have held more: its header tells where."""
        source, target = self._open(shard, BODY), self._open(shard, part)
        header = json.loads(os.pread(source, self._reserve, 0)[PREFIX_BYTES:])
        for region in shard.regions:
            if region.part == part:
                start = self._reserve + header[region.name]["data_offsets"][0]
                _copy(source, start, target, region.start, region.nbytes)

    def _drop_unknown(self) -> None:
        known = {shard.number for shard in self.shards}
        stem = re.escape(self._stem)
        ours = re.compile(rf"{stem}(?:\.part-(\d+)(?:\.tail\d)?|-(\d+)-of-\d+\.safetensors)")
        for path in list(self._folder.iterdir()):
            found = ours.fullmatch(path.name)
            if found and int(found[1] or found[2]) not in known:
                path.unlink()

    def _finals(self, shard: Shard) -> Iterator[Path]:
        for path in sorted(self._folder.glob("*.safetensors")):
            alone = shard.number == 1 and path.name == f"{self._stem}.safetensors"
            if alone or path.name.startswith(f"{self._stem}-{shard.number:05d}-of-"):
                yield path

    def _final_path(self, shard: Shard) -> Path:
        count = len(self.shards)
        name = self._stem if count == 1 else f"{self._stem}-{shard.number:05d}-of-{count:05d}"
        return self._folder / f"{name}.safetensors"

    def _part_path(self, shard: Shard, part: int) -> Path:
        return self._folder / f"{self._stem}.part-{shard.number:05d}{f'.tail{part}' if part else ''}"

    def _remove(self, shard: Shard) -> None:
        for part in TAIL_DIVISORS:
            self._part_path(shard, part).unlink(missing_ok=True)

    def _open(self, shard: Shard, part: int) -> int:
        key = shard.number, part
        if key not in self._files:
            path = self._part_path(shard, part)
            with storage_faults("writing the weights"):
                self._files[key] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._files[key]

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def _by_part(regions: Sequence[Region]) -> Iterable[list[int]]:
    """Which of some regions lie in one part, for each."""
    found: dict[int, list[int]] = {}
    for index, region in enumerate(regions):
        found.setdefault(region.part, []).append(index)
    return found.values()


def _region_json(region: Region) -> tuple[Any, ...]:
    return region.name, region.dtype, region.shape, region.part, region.start, region.nbytes


def _pwrite(file: int, data: memoryview, offset: int) -> None:
    rest = data.cast("B")
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def _copy(source: int, start: int, target: int, offset: int, count: int) -> None:
    while count:
        chunk = os.pread(source, min(count, COPY_BYTES), start)
        if not chunk:
            raise OSError(errno.EIO, "file is too short")
        _pwrite(target, memoryview(chunk), offset)
        start, offset, count = start + len(chunk), offset + len(chunk), count - len(chunk)
