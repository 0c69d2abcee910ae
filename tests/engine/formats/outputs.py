"""Small tensors, written through a format's writer with the reference backend, and read back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from service.engine.backends.reference import ReferenceBackend
from service.engine.beside import Beside
from service.engine.formats.base import Format, ModelLayout, ModelWriter, WriterContext
from service.engine.formats.source import LocalFiles
from service.engine.methods.registry import methods
from service.engine.metrics import ErrorSums, Quality
from service.engine.schemes.base import BLOCK, Scheme
from service.engine.schemes.registry import build_scheme
from service.engine.tensors import FLOAT_DTYPES, TensorInfo

BLOCK_ROWS = 32
BACKEND = ReferenceBackend()


@dataclass
class Item:
    """A tensor, the scheme to write it in (None copies it), and what is stored beside it."""

    name: str
    data: np.ndarray
    scheme: Scheme | None = None
    beside: Beside | None = None

    @property
    def info(self) -> TensorInfo:
        """As a reader would describe it."""
        names = {dtype: name for name, dtype in FLOAT_DTYPES.items()} | {
            np.dtype(np.int64): "I64",
            np.dtype(bool): "BOOL",
        }
        dtype = names[self.data.dtype]
        return TensorInfo(self.name, dtype, self.data.shape, PurePosixPath("x"), 0, self.data.nbytes)


@dataclass
class Output:
    """A folder in the making; `stored` are the bytes of each tensor, as the writer tells."""

    folder: Path
    format: type[Format]
    items: Sequence[Item]
    options: Mapping[str, Any] = field(default_factory=dict)
    block_rows: int = BLOCK_ROWS
    stored: dict[str, int] = field(default_factory=dict)

    def writer(self) -> ModelWriter:
        """A fresh writer, as another process would make it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [json.dumps(i.name, ensure_ascii=False).encode() for i in self.items]
        layout = ModelLayout(
            source=LocalFiles(self.folder),
            weights_dir=PurePosixPath("."),
            stem="model",
            companions=(),
            config={"model_type": "test"},
            modality="text",
            is_diffusion=False,
            fingerprint="0" * 64,
            tensor_count=len(names),
            name_bytes=sum(map(len, names)),
        )
        options = self.format.options.model_validate(self.options)
        return self.format.writer(self.folder, WriterContext(layout, {"bit_width": 4}, options, "1.2.3"))

    def write(self, writer: ModelWriter, item: Item, scheme: Scheme | None = None) -> ErrorSums:
        """Begin and write one tensor, without the commit."""
        scheme = scheme or item.scheme
        writer.begin(item.info, scheme, item.beside)
        if scheme is None:
            raw = np.frombuffer(item.data.tobytes(), np.uint8)
            for start in range(0, raw.size, 4096):
                writer.write_raw(raw[start : start + 4096].data)
            return ErrorSums()
        x = item.data.reshape(item.info.rows, item.info.cols)
        method = methods()["minmax"]()
        grid = None
        if scheme.takes_pass:
            grid = BACKEND.tensor_grid(BACKEND.observe(x), scheme, method)
        sums = ErrorSums()
        step = BLOCK if scheme.granularity == "block" else self.block_rows
        for start in range(0, x.shape[0], step):
            rows = BACKEND.quantize(x[start : start + step], scheme, method, grid)
            writer.write_rows(rows)
            sums += rows.errors
        return sums

    def add(self, writer: ModelWriter, item: Item) -> ErrorSums:
        """Write and commit one tensor."""
        sums = self.write(writer, item)
        self.stored[item.name] = writer.commit(Quality.of(sums, 1) if item.scheme else None)
        return sums

    def run(self) -> dict[str, ErrorSums]:
        """Write all of it; what each quantized tensor lost."""
        writer = self.writer()
        sums = {item.name: self.add(writer, item) for item in self.items}
        writer.close(lambda: False)
        return {name: s for name, s in sums.items() if s.count}


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Normal values of a fixed seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def all_integer_schemes(scale_dtype: str = "F16") -> Iterator[Scheme]:
    """Every width, symmetry and granularity."""
    for bits in (2, 3, 4, 5, 6, 8):
        for symmetric in (True, False):
            for granularity, size in (("tensor", None), ("channel", None), ("group", 32)):
                yield build_scheme(
                    f"int{bits}", symmetric=symmetric, granularity=granularity, group_size=size, scale_dtype=scale_dtype
                )


def all_float_schemes(scale_dtype: str = "F32") -> Iterator[Scheme]:
    """Every scheme of small floating-point numbers in every granularity; the scale's dtype where there is a choice."""
    chosen: dict[str, Any] = {"symmetric": True, "scale_dtype": scale_dtype}
    for id_ in ("fp8_e4m3", "fp8_e5m2"):
        for granularity in ("tensor", "channel", "block"):
            yield build_scheme(id_, granularity=granularity, **chosen)
    for granularity, size in (("tensor", None), ("channel", None), ("group", 32)):
        yield build_scheme("fp4", granularity=granularity, group_size=size, **chosen)
    for id_ in ("mxfp4", "mxfp8", "nvfp4"):
        yield build_scheme(id_, symmetric=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def label(scheme: Scheme) -> str:
    """A test id."""
    return f"{scheme.id}-{'sym' if scheme.symmetric else 'asym'}-{scheme.granularity}"
