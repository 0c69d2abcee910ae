"""Safetensors files of any size with the shapes of a language model, written without being held in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bench.common import GB, note
from service.engine.formats.safetensors_header import build_header
from service.engine.tensors import FLOAT_DTYPES, CodeArray

#: Weights are taken from a pool of this many numbers, each tensor beginning at another place of it.
POOL_ELEMENTS = 1 << 23

Shapes = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Model:
    """A generated file and how many bytes of tensors it holds."""

    path: Path
    nbytes: int
    dtype: str
    tensors: int


def layered(total_bytes: int, dtype: str, *, width: int = 2048) -> Shapes:
    """Transformer blocks, matrices and norms, until the bytes are reached."""
    item = FLOAT_DTYPES[dtype].itemsize
    block_bytes = sum(prod(shape) for _, shape in _block(0, width)) * item
    return [tensor for index in range(-(-total_bytes // block_bytes)) for tensor in _block(index, width)]


def with_giant(total_bytes: int, giant_bytes: int, dtype: str) -> Shapes:
    """Blocks as in `layered`, and in the middle of them one single matrix of `giant_bytes`."""
    shapes = layered(total_bytes - giant_bytes, dtype)
    rows = giant_bytes // FLOAT_DTYPES[dtype].itemsize // 4096
    shapes.insert(len(shapes) // 2, ("giant.weight", (rows, 4096)))
    return shapes


def equal(count: int, shape: tuple[int, int]) -> Shapes:
    """So many matrices of one shape."""
    return [(f"blocks.{i:05d}.weight", shape) for i in range(count)]


def write_model(
    path: Path, shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: str, seed: int = 0, *, is_sparse: bool = False
) -> Model:
    """Write a safetensors file of normal weights, whose bytes are in the page cache afterwards, or of zeros that take
    no room."""
    pool = (np.random.default_rng(seed).standard_normal(POOL_ELEMENTS, np.float32) * 0.03).astype(FLOAT_DTYPES[dtype])
    data = pool.view(np.uint8)
    item = FLOAT_DTYPES[dtype].itemsize
    entries, end = [], 0
    for name, shape in shapes:
        begun, end = end, end + prod(shape) * item
        entries.append((name, dtype, shape, begun, end))
    with path.open("wb") as file:
        file.write(build_header(entries, {"format": "pt"}, 4096 + 200 * len(entries)))
        if is_sparse:
            file.truncate(file.tell() + end)
            return Model(path, end, dtype, len(entries))
        for index, (*_, begun, stop) in enumerate(entries):
            _write_from(data, index * 7919 * item % data.nbytes, stop - begun, file)
    return Model(path, end, dtype, len(entries))


@contextmanager
def scratch(need_bytes: float) -> Iterator[Path]:
    """A folder for generated models and outputs, removed afterwards; ends the run when the disk is too small."""
    with tempfile.TemporaryDirectory(prefix="arrowquant-bench-") as name:
        free = shutil.disk_usage(name).free
        if free < need_bytes:
            raise SystemExit(f"bench: {need_bytes / GB:.1f} GB are needed in {name}, {free / GB:.1f} GB are free")
        yield Path(name)


def warm(path: Path) -> None:
    """Read a file once, so that it is in the page cache, and wait until nothing is left to be written."""
    note(f"reading {path.name} into the page cache")
    os.sync()
    with path.open("rb", buffering=0) as file:
        while file.read(8 << 20):
            pass


def _block(index: int, width: int) -> Shapes:
    inner = width * 11 // 4
    return [
        (f"layers.{index}.attn.q.weight", (width, width)),
        (f"layers.{index}.attn.k.weight", (width // 4, width)),
        (f"layers.{index}.attn.v.weight", (width // 4, width)),
        (f"layers.{index}.attn.o.weight", (width, width)),
        (f"layers.{index}.norm.weight", (width,)),
        (f"layers.{index}.mlp.gate.weight", (inner, width)),
        (f"layers.{index}.mlp.up.weight", (inner, width)),
        (f"layers.{index}.mlp.down.weight", (width, inner)),
    ]


def _write_from(pool: CodeArray, start: int, count: int, file: BinaryIO) -> None:
    while count:
        piece = pool[start : start + count]
        file.write(piece.data)
        count, start = count - len(piece), 0
