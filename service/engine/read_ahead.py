"""Reads the row block that comes next while the one before is worked on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from service.engine.formats.base import ModelReader
from service.engine.plan import Plan, TensorPlan
from service.engine.tensor_run import row_blocks
from service.engine.tensors import Array, TensorInfo

#: Smaller blocks are read faster than another thread is told to.
WORTHWHILE_BYTES = 1 << 20


class _Block(NamedTuple):
    info: TensorInfo
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.info.nbytes * (self.stop - self.start) // max(1, self.info.rows)


class ReadAhead(ModelReader):
    """A reader over another one, for a run of a plan; one thread may ask it.

    What it expects to be asked next is a guess: where a tensor is done again, the guess is wrong
    and dropped. `close` lets go of the thread and leaves the other reader open.
    """

    def __init__(self, reader: ModelReader, plan: Plan, block_bytes: int) -> None:
        self._reader = reader
        self._block_bytes = block_bytes
        self._upcoming = _upcoming(plan.tensors)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: tuple[_Block, Future[Array]] | None = None
        self.layout, self.files, self.tensors = reader.layout, reader.files, reader.tensors

    def rows(self, info: TensorInfo, start: int, stop: int) -> Array:
        """See `ModelReader.rows`."""
        block, ahead = _Block(info, start, stop), self._ahead
        self._ahead = None
        data = ahead[1].result() if ahead is not None and ahead[0] == block else self._reader.rows(*block)
        following = self._following(block)
        if following is not None and following.nbytes >= WORTHWHILE_BYTES:
            self._ahead = following, self._thread.submit(self._reader.rows, *following)
        return data

    def raw(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """See `ModelReader.raw`."""
        return self._reader.raw(info, start, stop)

    def close(self) -> None:
        """End the thread, when it has read what it is reading."""
        self._ahead = None
        self._thread.shutdown(cancel_futures=True)

    def _following(self, block: _Block) -> _Block | None:
        info, start, stop = block
        if stop < info.rows:
            return _Block(info, stop, min(2 * stop - start, info.rows))
        upcoming = self._upcoming.get(info.name)
        return _Block(upcoming, *next(row_blocks(upcoming, self._block_bytes))) if upcoming else None


def _upcoming(tensors: Sequence[TensorPlan]) -> dict[str, TensorInfo]:
    """By name, what is read in rows behind a tensor that is read once."""
    found: dict[str, TensorInfo] = {}
    upcoming: TensorInfo | None = None
    for tensor in reversed(tensors):
        schemes = [decision.scheme for decision in tensor.decisions if decision.scheme]
        is_read_twice = any(scheme.granularity == "tensor" for scheme in schemes)
        if schemes and upcoming is not None and not is_read_twice:
            found[tensor.info.name] = upcoming
        if schemes:
            upcoming = tensor.info
    return found
