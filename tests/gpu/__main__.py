"""What a GPU has to give, on one: `make test-gpu`. Takes no test runner; says what is wrong and ends with 1.

Every scheme and dtype to the byte, the search, what is not finite, and too little memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import ml_dtypes
import numpy as np

from service.engine.backends.base import Backend
from service.engine.backends.cuda import CudaBackend
from service.engine.backends.reference import ReferenceBackend
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.schemes.base import Scheme
from service.engine.schemes.registry import build_scheme, schemes
from service.engine.tensors import QuantizedRows

DTYPES = [np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)]
REFERENCE = ReferenceBackend()


def all_schemes() -> Iterator[Scheme]:
    """Every scheme in every form."""
    granularities = (("tensor", None), ("channel", None), ("group", 32), ("group", 128))
    forms = product(schemes(), (True, False), granularities, ("F32", "F16", "BF16"))
    for id_, symmetric, (granularity, size), dtype in forms:
        try:
            yield build_scheme(id_, symmetric=symmetric, granularity=granularity, group_size=size, scale_dtype=dtype)
        except ValueError:
            continue


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is checked: shapes and schemes, the shape of what is searched, and of what memory lacks for."""

    shapes: Sequence[tuple[int, int]] = ((1, 1), (9, 203), (40, 256), (3, 8209), (130, 4096))
    schemes: Sequence[Scheme] = tuple(all_schemes())
    searched: tuple[int, int] = (64, 1000)
    large: tuple[int, int] = (4096, 2048)


WHOLE = Extent()
Check = Callable[[Backend, Extent], Iterator[str]]


def differing(mine: QuantizedRows, theirs: QuantizedRows) -> Iterator[str]:
    """The parts that are not the same bytes."""
    for name in ("packed", "scale", "zero_point"):
        ours, other = getattr(mine, name), getattr(theirs, name)
        if (ours is None) != (other is None) or (ours is not None and ours.tobytes() != other.tobytes()):
            yield name


def check_bytes(cuda: Backend, extent: Extent) -> Iterator[str]:
    """`minmax` gives the reference's bytes, and reading them back its numbers."""
    rng = np.random.default_rng(1)
    for shape, dtype in product(extent.shapes, DTYPES):
        x = (rng.standard_normal(shape) * 0.05).astype(dtype)
        x[0, : shape[1] // 2] = 0
        for scheme in extent.schemes:
            grid = None
            if scheme.granularity == "tensor":
                grid = REFERENCE.tensor_grid(REFERENCE.observe(x), scheme, MinMax())
            mine, theirs = (one.quantize(x, scheme, MinMax(), grid) for one in (cuda, REFERENCE))
            yield from (f"{scheme!r} of {shape} {dtype}: {name} differs" for name in differing(mine, theirs))
            if not np.array_equal(cuda.dequantize(theirs), REFERENCE.dequantize(theirs)):
                yield f"{scheme!r} of {shape} {dtype}: read back, it differs"


def check_many(cuda: Backend, extent: Extent) -> Iterator[str]:
    """Many tensors in one call get what each of them would."""
    rng = np.random.default_rng(4)
    xs = [rng.standard_normal(shape).astype(dtype) for shape, dtype in product(extent.shapes, DTYPES)] * 3
    for scheme, method in product(extent.schemes, (MinMax(), Mse(clips=(0.9,)))):
        if scheme.granularity == "tensor" or scheme.scale_dtype != "F16":
            continue
        for mine, x in zip(cuda.quantize_many(xs, scheme, method), xs, strict=True):
            for name in differing(mine, cuda.quantize(x, scheme, method)):
                yield f"{scheme!r} {method.id} of {x.shape} {x.dtype} among others: {name} differs"


def check_search(cuda: Backend, extent: Extent) -> Iterator[str]:
    """`mse` errs as little as the reference."""
    rng = np.random.default_rng(2)
    for dtype in DTYPES[::2]:
        x = rng.standard_normal(extent.searched).astype(dtype)
        for scheme in extent.schemes:
            if scheme.group_size != 128 or scheme.scale_dtype != "F16":
                continue
            mine, theirs = (one.quantize(x, scheme, Mse()).errors.sum_dd for one in (cuda, REFERENCE))
            if abs(mine / theirs - 1) > 1e-2:
                yield f"{scheme!r} of {dtype}: squared error {mine} and not {theirs}"


def check_finite(cuda: Backend, extent: Extent) -> Iterator[str]:
    """What is not finite is noticed."""
    for dtype, value in product(DTYPES, (np.nan, np.inf, -np.inf)):
        x = np.ones((40, 203), dtype)
        x[33, 111] = value
        for scheme in extent.schemes:
            if scheme.granularity != "tensor" and cuda.quantize(x, scheme, MinMax()).errors.finite:
                yield f"{value} in {dtype} is not noticed by {scheme!r}"
        if cuda.observe(x).finite or cuda.compare(x, np.ones_like(x)).finite:
            yield f"{value} in {dtype} is not noticed"


def check_memory(_: Backend, extent: Extent) -> Iterator[str]:
    """Too little memory costs time and a notice, nothing else."""
    x = np.random.default_rng(3).standard_normal(extent.large).astype(np.float32)
    scheme = build_scheme("int4", symmetric=False)
    small = CudaBackend(2, 4 << 20)
    if not np.array_equal(small.quantize(x, scheme, MinMax()).packed, REFERENCE.quantize(x, scheme, MinMax()).packed):
        yield "with 4 MiB of memory the codes differ"
    if not small.take_notices():
        yield "nothing tells that 4 MiB of memory were too little"


CHECKS: tuple[Check, ...] = (check_bytes, check_many, check_search, check_finite, check_memory)


def main(extent: Extent = WHOLE, checks: Sequence[Check] = CHECKS, device: type[CudaBackend] = CudaBackend) -> int:
    """Runs checks on the first device."""
    if reason := CudaBackend.unavailable():
        print(f"no GPU to test on: {reason}", file=sys.stderr)
        return 1
    cuda, failures = device(2), 0
    for check in checks:
        found = list(check(cuda, extent))
        failures += len(found)
        print(f"{'FAILED' if found else 'passed'}: {check.__doc__}", *found[:20], sep="\n  ")
    for notice in cuda.take_notices():
        failures += 1
        print(f"FAILED: {notice}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
