"""Memory of large results: used again when nobody looks at it, and only then."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from service.engine.backends.cpu import CpuBackend
from service.engine.buffers import SMALLEST_BYTES, Buffers
from service.engine.methods.minmax import MinMax
from service.engine.schemes.integer import IntegerScheme

SHAPE = (1024, SMALLEST_BYTES // 1024)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_the_memory_of_an_array_that_is_gone_is_used_again() -> None:
    buffers = Buffers()
    first = buffers.empty(SHAPE, np.float32)
    where = address(first)
    assert first.flags.writeable
    assert first.shape == SHAPE
    del first
    gc.collect()
    assert address(buffers.empty(SHAPE, np.float32)) == where


@pytest.mark.parametrize("view", [lambda a: a[3:5].T, lambda a: memoryview(a), lambda a: a.view(np.int32).reshape(-1)])
def test_memory_that_is_still_looked_at_is_left_alone(view) -> None:
    buffers = Buffers()
    array = buffers.empty(SHAPE, np.float32)
    array[:] = 7
    kept = view(array)
    del array
    gc.collect()
    assert buffers.free_bytes == 0
    buffers.empty(SHAPE, np.float32)[:] = 0
    assert np.asarray(kept).view(np.float32).min() == 7


def test_no_more_is_kept_than_is_allowed_and_nothing_small_or_much_too_large_is_taken() -> None:
    buffers = Buffers(kept_bytes=3 * SMALLEST_BYTES)
    many = [buffers.empty((SMALLEST_BYTES,), np.uint8) for _ in range(8)]
    del many
    gc.collect()
    assert 0 < buffers.free_bytes <= 3 * SMALLEST_BYTES
    free = buffers.free_bytes
    buffers.empty((16,), np.uint8)
    assert buffers.free_bytes == free
    large = Buffers()
    large.empty((3 * SMALLEST_BYTES,), np.uint8)
    gc.collect()
    small = large.empty((SMALLEST_BYTES,), np.uint8)
    assert large.free_bytes == 3 * SMALLEST_BYTES
    assert small.size == SMALLEST_BYTES


def test_results_that_are_held_do_not_change_when_more_is_quantized(rng) -> None:
    cpu, scheme = CpuBackend(2), IntegerScheme(bits=8)
    inputs = [rng.standard_normal((1100, 1024)).astype(np.float32) for _ in range(3)]
    held = [cpu.quantize(x, scheme, MinMax()) for x in inputs]
    before = [(q.packed.tobytes(), cpu.dequantize(q).tobytes()) for q in held]
    for _ in range(3):
        cpu.dequantize(cpu.quantize(inputs[0] * 2, scheme, MinMax()))
    assert [(q.packed.tobytes(), cpu.dequantize(q).tobytes()) for q in held] == before
