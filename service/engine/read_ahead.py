"""Reads the block that comes next while the one before is worked on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from service.engine.blocks import row_blocks
from service.engine.formats.base import ModelReader
from service.engine.plan import Plan, TensorPlan
from service.engine.tensors import Array, TensorInfo

#: Smaller blocks are read faster than another thread is told to.
WORTHWHILE_BYTES = 1 << 20


class _Block(NamedTuple):
    """Rows of a tensor, or bytes of one that is copied."""

    info: TensorInfo
    start: int
    stop: int
    is_raw: bool = False

    @property
    def end(self) -> int:
        return self.info.nbytes if self.is_raw else self.info.rows

    @property
    def nbytes(self) -> int:
        return self.info.nbytes * (self.stop - self.start) // max(1, self.end)


class ReadAhead(ModelReader):
    """A reader over another one, for a run of a plan; one thread may ask it.

    What it expects to be asked next is a guess: where a tensor is done again, the guess is wrong
    and dropped. `close` lets go of the thread and leaves the other reader open.
    """

    def __init__(self, reader: ModelReader, plan: Plan, block_bytes: int) -> None:
        self._reader = reader
        self._block_bytes = block_bytes
        self._upcoming = _upcoming(plan.tensors, block_bytes)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[_Block, Future[Array | memoryview]] | None = None
        self.layout, self.files, self.tensors = reader.layout, reader.files, reader.tensors

    def rows(self, info: TensorInfo, start: int, stop: int) -> Array:
        """See `ModelReader.rows`."""
        return self._take(_Block(info, start, stop))  # type: ignore[return-value]

    def raw(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """See `ModelReader.raw`."""
        return self._take(_Block(info, start, stop, is_raw=True))  # type: ignore[return-value]

    def raws(self, infos: Sequence[TensorInfo]) -> list[memoryview]:
        """See `ModelReader.raws`."""
        return self._reader.raws(infos)

    def close(self) -> None:
        """End the thread, when it has read what it is reading."""
        self._ahead = None
        self._thread.shutdown(cancel_futures=True)

    def _take(self, block: _Block) -> Array | memoryview:
        ahead = self._ahead
        if ahead is not None and ahead[0] == block:
            self._ahead = None
            data = ahead[1].result()
        else:
            if block.nbytes >= WORTHWHILE_BYTES:  # what is small comes between, and the guess may still be right
                self._ahead = None
            data = self._read(block)
        following = self._following(block) if self._ahead is None else None
        if following is not None and following.nbytes >= WORTHWHILE_BYTES:
            self._ahead = following, self._thread.submit(self._read, following)
        return data

    def _read(self, block: _Block) -> Array | memoryview:
        read = self._reader.raw if block.is_raw else self._reader.rows
        return read(block.info, block.start, block.stop)

    def _following(self, block: _Block) -> _Block | None:
        info, start, stop, is_raw = block
        if stop < block.end:
            return _Block(info, stop, min(2 * stop - start, block.end), is_raw)
        return self._upcoming.get(info.name)


def _upcoming(tensors: Sequence[TensorPlan], block_bytes: int) -> dict[str, _Block]:
    """By name, what is read behind a tensor that is read once: of the next that is worth it."""
    found: dict[str, _Block] = {}
    upcoming: _Block | None = None
    for tensor in reversed(tensors):
        info = tensor.info
        if info.nbytes < WORTHWHILE_BYTES:
            continue
        schemes = [decision.scheme for decision in tensor.decisions if decision.scheme]
        if upcoming is not None and not any(scheme.takes_pass for scheme in schemes):
            found[info.name] = upcoming
        if schemes:
            upcoming = _Block(info, *next(row_blocks(info, block_bytes, tensor.row_multiple)))
        else:
            upcoming = _Block(info, 0, min(info.nbytes, block_bytes), is_raw=True)
    return found
