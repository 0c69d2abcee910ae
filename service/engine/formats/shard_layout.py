"""Where tensors lie in safetensors files of unknown length: known as they come, before a header is.

The header comes first in such a file but is known last: room for it is reserved and later filled
up with spaces. Tensors have to follow each other without holes, and each has to lie at a multiple
of its item size. So a tensor whose size is a multiple of 8 goes to the body at once, and the few
others to one of three tails, by what divides their size; tails are appended in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from json.encoder import encode_basestring

from service.engine.formats.safetensors_header import MAX_HEADER_BYTES, build_header
from service.errors import UnsupportedModel

#: Sizes divisible by 8 go to the body; the rest by the largest of these that divides them.
TAIL_DIVISORS = (4, 2, 1)
BODY = 0
#: What an entry of a matrix needs beside the tensor's name, at most, and room for a few odd ones.
ENTRY_BYTES = 160
SPARE_BYTES = 4096
MAX_RESERVE = MAX_HEADER_BYTES // 2
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


#: A tensor to be: name, dtype, shape, bytes.
Parts = Sequence[tuple[str, str, tuple[int, ...], int]]


class ShardLayout:
    """The shards of an output, and where in the last one the next tensor goes."""

    def __init__(self, reserve: int, max_shard_bytes: int) -> None:
        """`reserve` is about what a header takes."""
        self.reserve = min(reserve, MAX_RESERVE) // 8 * 8 + 8
        self._max = max_shard_bytes
        self.shards = [Shard(1)]
        self.pending: list[Region] = []
        self._pending_header_bytes = 0

    def begin(self, parts: Parts) -> list[Region]:
        """Room for tensors that have to lie in one file; in a new one when the last is full."""
        shard = self.shards[-1]
        size = header = 0
        for name, _, shape, nbytes in parts:
            size += nbytes
            header += _entry_bytes(name, shape)
        if header > self.reserve - FIXED_BYTES:
            raise UnsupportedModel(f"tensor {parts[0][0]!r:.200} has a name or shape too long for a header")
        full = shard.nbytes + size > self._max or shard.header_bytes + header > self.reserve - FIXED_BYTES
        if full and shard.regions:
            shard = Shard(shard.number + 1)
            self.shards.append(shard)
        ends = dict(shard.sizes)
        self.pending, self._pending_header_bytes = [], header
        for name, dtype, shape, nbytes in parts:
            part = _part(nbytes)
            self.pending.append(Region(name, dtype, shape, part, ends[part], nbytes))
            ends[part] += nbytes
        return self.pending

    def add_all(self, tensors: Sequence[Parts]) -> tuple[int, list[Region]]:
        """Room, which is kept, for as many of these as have it in one file, at least one: how many, and where."""
        self.begin(tensors[0])
        first = self.commit()
        shard, regions, count = self.shards[-1], list[Region](), 1
        room, header_room = self._max - shard.nbytes, self.reserve - FIXED_BYTES - shard.header_bytes
        for parts in islice(tensors, 1, None):
            for name, _, shape, nbytes in parts:
                room -= nbytes
                header_room -= _entry_bytes(name, shape)
            if room < 0 or header_room < 0:
                break
            for name, dtype, shape, nbytes in parts:
                part = BODY if nbytes % 8 == 0 else _part(nbytes)
                regions.append(Region(name, dtype, shape, part, shard.sizes[part], nbytes))
                shard.sizes[part] += nbytes
            shard.header_bytes = self.reserve - FIXED_BYTES - header_room
            count += 1
        shard.regions += regions
        return count, first + regions

    def commit(self) -> list[Region]:
        """Keep what was begun."""
        shard, regions = self.shards[-1], self.pending
        for region in regions:
            shard.sizes[region.part] = region.start + region.nbytes
        shard.header_bytes += self._pending_header_bytes
        shard.regions += regions
        self.pending = []
        return regions

    def restore(self, number: int, regions: list[Region]) -> None:
        """Take over what another process committed, in its order."""
        if number != self.shards[-1].number:
            self.shards.append(Shard(number))
        self.pending = regions
        self._pending_header_bytes = sum(_entry_bytes(region.name, region.shape) for region in regions)
        self.commit()

    def abandon(self) -> Shard | None:
        """Forget what was begun; returns the shard that was begun for it, if one was."""
        self.pending = []
        return self.shards.pop() if not self.shards[-1].regions and len(self.shards) > 1 else None

    def header(self, shard: Shard, metadata: Mapping[str, str]) -> bytes:
        """What stands in front of a shard that is complete."""
        starts = shard.starts()
        # As they came they lie behind each other in each part.
        ordered = [r for part in (BODY, *TAIL_DIVISORS) for r in shard.regions if r.part == part]
        entries = [(r.name, r.dtype, r.shape, at := starts[r.part] + r.start, at + r.nbytes) for r in ordered]
        return build_header(entries, metadata, self.reserve)

    def foresee(self, tensors: Iterable[Parts], metadata: Mapping[str, str]) -> dict[int, bytes]:
        """The headers of all shards, by their numbers, if these tensors are all that comes."""
        foreseen = copy(self)
        foreseen.shards = [replace(s, sizes=dict(s.sizes), regions=list(s.regions)) for s in self.shards]
        for parts in tensors:
            foreseen.begin(parts)
            foreseen.commit()
        return {shard.number: foreseen.header(shard, metadata) for shard in foreseen.shards}


def header_reserve(tensor_count: int, name_bytes: int, parts_per_tensor: int) -> int:
    """Bytes that a header of so many tensors, each in several parts, hardly exceeds; a new shard begins if it does."""
    return SPARE_BYTES + parts_per_tensor * (name_bytes + tensor_count * ENTRY_BYTES)


def _entry_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of an entry, its offsets taken to be as long as can be."""
    # Put together here: a writer asks this several times a tensor, and the encoder takes longer than the tensor may.
    return LONGEST_ENTRY_BYTES + len(encode_basestring(name).encode()) + _shape_bytes(shape)


@lru_cache(maxsize=256)
def _shape_bytes(shape: tuple[int, ...]) -> int:
    return len(str(list(shape)))


def _part(nbytes: int) -> int:
    return BODY if nbytes % 8 == 0 else next(d for d in TAIL_DIVISORS if nbytes % d == 0)
