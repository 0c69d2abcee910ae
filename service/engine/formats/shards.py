"""Writes safetensors files of unknown length piece by piece, so that a killed process can go on.

The header comes first in such a file but is known last: room for it is reserved and later filled
up with spaces. Tensors have to follow each other without holes, and each has to lie at a multiple
of its item size. So a tensor whose size is a multiple of 8 goes to the body at once, and the few
others to one of three tails, by what divides their size; tails are appended in the end.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

from service.engine.formats.base import Cancelled
from service.engine.formats.safetensors_header import MAX_HEADER_BYTES, build_header
from service.errors import UnsupportedModel
from service.storage.faults import storage_faults

#: Sizes divisible by 8 go to the body; the rest by the largest of these that divides them.
TAIL_DIVISORS = (4, 2, 1)
BODY = 0
#: What an entry of a matrix needs beside the tensor's name, at most, and room for a few odd ones.
ENTRY_BYTES = 160
SPARE_BYTES = 4096
MAX_RESERVE = MAX_HEADER_BYTES // 2
COPY_BYTES = 8 << 20
#: What is written in smaller pieces is put together first, where one lies behind the other.
SMALL_BYTES = 64 << 10
GATHERED_BYTES = 1 << 20
#: The length, braces, and `__metadata__`.
FIXED_BYTES = 512
#: An entry without its name and shape.
LONGEST_ENTRY_BYTES = len(', : {"dtype": "F8_E4M3FNUZ", "shape": , "data_offsets": [, ]}') + 2 * len(str(1 << 62))


@dataclass(slots=True)
class Region:
    """A tensor's place: `part` is BODY or a tail's divisor, `start` counts from that part's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    part: int
    start: int
    nbytes: int


@dataclass(slots=True)
class Shard:
    """One file in the making."""

    number: int
    sizes: dict[int, int] = field(default_factory=lambda: {BODY: 0} | dict.fromkeys(TAIL_DIVISORS, 0))
    regions: list[Region] = field(default_factory=list)
    header_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes.values())

    def starts(self) -> dict[int, int]:
        """Where each part begins in the finished file, counted from the end of the header."""
        found, position = {}, 0
        for part in (BODY, *TAIL_DIVISORS):
            found[part] = position
            position += self.sizes[part]
        return found


class ShardWriter:
    """Files `<stem>.safetensors`, or `<stem>-0000i-of-0000n.safetensors` when there are several."""

    def __init__(self, folder: Path, stem: str, reserve: int, max_shard_bytes: int) -> None:
        self._folder = folder
        self._stem = stem
        self._reserve = min(reserve, MAX_RESERVE) // 8 * 8 + 8
        self._max = max_shard_bytes
        self._files: dict[tuple[int, int], int] = {}  # descriptors of what is being written, by shard and part
        self._gathered = bytearray()
        self._gathered_for: tuple[int, int] | None = None  # the file, and where in it they begin
        self._pending: list[Region] = []
        self._committed: list[dict[str, Any]] = []  # what `state` has not told yet
        self.shards = [Shard(1)]

    def begin(self, parts: Sequence[tuple[str, str, tuple[int, ...], int]]) -> list[Region]:
        """Room for tensors (name, dtype, shape, nbytes) that have to lie in one file."""
        shard = self.shards[-1]
        size = sum(nbytes for *_, nbytes in parts)
        header = sum(_entry_bytes(name, shape) for name, _, shape, _ in parts)
        if header > self._reserve - FIXED_BYTES:
            raise UnsupportedModel(f"tensor {parts[0][0]!r:.200} has a name or shape too long for a header")
        full = shard.nbytes + size > self._max or shard.header_bytes + header > self._reserve - FIXED_BYTES
        if full and shard.regions:
            self._flush()
            self._close_files()
            shard = Shard(shard.number + 1)
            self.shards.append(shard)
        ends = dict(shard.sizes)
        self._pending = []
        for name, dtype, shape, nbytes in parts:
            part = _part(nbytes)
            self._pending.append(Region(name, dtype, shape, part, ends[part], nbytes))
            ends[part] += nbytes
        return self._pending

    def write(self, region: Region, offset: int, data: memoryview) -> None:
        """Bytes of a region begun, `offset` from its start."""
        start = region.start + offset + (self._reserve if region.part == BODY else 0)
        with storage_faults("writing the weights"):
            file = self._open(self.shards[-1], region.part)
            if data.nbytes >= SMALL_BYTES:
                _pwrite(file, data, start)
            else:
                self._gather(file, data, start)

    def commit(self) -> int:
        """Keep what was begun; its bytes."""
        shard = self.shards[-1]
        for region in self._pending:
            shard.sizes[region.part] = region.start + region.nbytes
            shard.header_bytes += _entry_bytes(region.name, region.shape)
        shard.regions += self._pending
        size = sum(r.nbytes for r in self._pending)
        self._committed.append({"shard": shard.number, "regions": [_region_json(r) for r in self._pending]})
        self._pending = []
        return size

    def abandon(self) -> None:
        """Forget what was begun; its bytes are overwritten by what comes next, or cut off."""
        self._pending = []
        self._flush()
        if not self.shards[-1].regions and len(self.shards) > 1:
            self._close_files()
            self._remove(self.shards.pop())

    def state(self) -> dict[str, Any]:
        """What was committed since the last call, all of which is then in the files."""
        self._flush()
        told, self._committed = self._committed, []
        return {"tensors": told}

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Take up the files of an earlier process; raises StorageFailure when they are not there."""
        for entry in (e for state in states for e in state["tensors"]):
            if entry["shard"] != self.shards[-1].number:
                self.shards.append(Shard(entry["shard"]))
            self._pending = [Region(n, d, tuple(s), p, a, b) for n, d, s, p, a, b in entry["regions"]]
            self.commit()
        self._committed = []
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

    def discard(self) -> None:
        """Close the files as they are."""
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

    def _complete(self, shard: Shard, metadata: dict[str, str]) -> None:
        """Append the tails and fill in the header; harmless when done twice."""
        body = self._open(shard, BODY)
        os.ftruncate(body, self._reserve + shard.sizes[BODY])
        starts = shard.starts()
        for part in TAIL_DIVISORS:
            if shard.sizes[part]:
                tail = self._open(shard, part)
                _copy(tail, 0, body, self._reserve + starts[part], shard.sizes[part])
        ordered = sorted(shard.regions, key=lambda r: (starts[r.part] + r.start, r.nbytes))
        entries = ((r.name, r.dtype, r.shape, starts[r.part] + r.start, starts[r.part] + r.start + r.nbytes)
                   for r in ordered)  # fmt: skip
        _pwrite(body, memoryview(build_header(entries, metadata, self._reserve)), 0)

    def _restore_files(self, shard: Shard) -> None:
        """Cut each part to what was committed, out of a completed file if need be."""
        body, finals = self._part_path(shard, BODY), list(self._finals(shard))
        if not body.exists() and finals:
            finals[0].replace(body)
        starts = shard.starts()
        for part in TAIL_DIVISORS:
            path = self._part_path(shard, part)
            lacking = not path.exists() or path.stat().st_size < shard.sizes[part]
            if shard.sizes[part] and lacking:
                source = self._open(shard, BODY)
                _copy(source, self._reserve + starts[part], self._open(shard, part), 0, shard.sizes[part])
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

    def _drop_unknown(self) -> None:
        known = {shard.number for shard in self.shards}
        for path in self._folder.iterdir():
            _, found, number = path.name.partition(f"{self._stem}.part-")
            if found and int(number.split(".")[0]) not in known:
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
            self._files[key] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._files[key]

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def header_reserve(tensor_count: int, name_bytes: int, parts_per_tensor: int) -> int:
    """Bytes that a header of so many tensors, each in several parts, hardly exceeds; a new shard begins if it does."""
    return SPARE_BYTES + parts_per_tensor * (name_bytes + tensor_count * ENTRY_BYTES)


def _entry_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of an entry, its offsets taken to be as long as can be."""
    # Put together here: a writer asks this several times a tensor, and the encoder takes longer than the tensor may.
    return LONGEST_ENTRY_BYTES + len(encode_basestring(name).encode()) + len(str(list(shape)))


def _part(nbytes: int) -> int:
    return BODY if nbytes % 8 == 0 else next(d for d in TAIL_DIVISORS if nbytes % d == 0)


def _region_json(region: Region) -> list[Any]:
    return [region.name, region.dtype, list(region.shape), region.part, region.start, region.nbytes]


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
