"""Reads the Parquet layout; what the cells claim is checked before it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, ClassVar, NoReturn, get_args

import numpy as np

from service.engine.decode import dequantize_codes, dequantize_packed, scales_of_rows
from service.engine.formats.base import ModelReader
from service.engine.formats.layout import Placement
from service.engine.formats.parquet_file import ParquetFile
from service.engine.formats.parquet_guard import MAX_ROWS
from service.engine.formats.parquet_schema import COPIED, PACKING
from service.engine.methods.base import MAX_RANK
from service.engine.packing import WORD_BITS, unpack_flat
from service.engine.schemes.base import BLOCK, TENSOR_SCALE_BYTES, GroupSize, Scheme
from service.engine.schemes.registry import build_scheme, schemes
from service.engine.tensors import (
    DTYPE_BITS,
    FLOAT_DTYPES,
    Array,
    FloatArray,
    HalfArray,
    TensorInfo,
    add_low_rank,
    low_rank_bytes,
)
from service.errors import CorruptModel, UnknownDtype, UnsupportedModel

GROUP_SIZES = get_args(GroupSize.__value__)


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A row of a file: elements start to stop of its tensor."""

    file: PurePosixPath
    at: tuple[int, int]
    start: int
    stop: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's rows; `scheme` is None for a copy."""

    info: TensorInfo
    scheme: Scheme | None
    chunks: tuple[StoredChunk, ...]
    input_scale: FloatArray | None = None
    tensor_scale: np.float32 | None = None
    rank: int = 0  # of its low-rank part

    def overlapping(self, start: int, stop: int) -> Iterator[StoredChunk]:
        """The chunks that hold some of the elements start to stop."""
        return (c for c in self.chunks if c.start < stop and start < c.stop)

    def unscaled(self, x: FloatArray) -> FloatArray:
        """Rows that codes stand for, (rows, cols), as weights for inputs that nobody has divided; changes x."""
        if self.input_scale is not None:
            np.divide(x, self.input_scale, out=x)
        return x


class ParquetReader(ModelReader):
    """See `ModelReader`."""

    format_id: ClassVar[str] = "parquet"

    def __init__(self, placement: Placement) -> None:
        self._files: dict[PurePosixPath, ParquetFile] = {}
        self._down: tuple[str, HalfArray] | None = None  # of the tensor that was read last
        try:
            for name in placement.weights:
                self._files[name] = ParquetFile(placement.source.open(name))
            _check_count(self._files.values())
            rows = [(name, cells) for name, file in self._files.items() for cells in file.rows()]
            self._tensors = {t.info.name: t for t in _tensors(rows)}
        except BaseException:
            self.close()
            raise
        self.tensors = tuple(t.info for t in self._tensors.values())
        self.files = placement.files
        if not placement.stated and rows:
            first = rows[0][1]
            placement = replace(placement, stated={k: first[k] for k in ("modality", "is_diffusion_model")})
        self.layout = placement.layout(self.tensors, self._stamps(), {})

    def rows(self, info: TensorInfo, start: int, stop: int) -> Array:
        """See `ModelReader.rows`."""
        tensor = self._tensors[info.name]
        if tensor.scheme is None:
            dtype = FLOAT_DTYPES[info.dtype]
            width = info.cols * dtype.itemsize
            data = self.raw(info, start * width, stop * width)
            return np.frombuffer(data, dtype).reshape(stop - start, info.cols)
        parts = []
        for chunk in tensor.overlapping(start * info.cols, stop * info.cols):
            first, last = max(start, chunk.start // info.cols), min(stop, chunk.stop // info.cols)
            parts.append(self._dequantize(tensor, tensor.scheme, chunk, first, last))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, info.cols), np.float32), *parts])

    def raw(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """See `ModelReader.raw`."""
        bits = DTYPE_BITS[info.dtype]
        pieces = []
        for chunk in self._tensors[info.name].overlapping(start * 8 // bits, -(-stop * 8 // bits)):
            data = self._files[chunk.file].cells(chunk.at, chunk.sha256)[0]
            base = chunk.start * bits // 8
            if data.nbytes != chunk.stop * bits // 8 - base:
                _corrupt(
                    info, f"`data` has {data.nbytes} bytes for {chunk.stop - chunk.start} elements of {info.dtype}"
                )
            pieces.append(data[max(0, start - base) : stop - base].cast("B"))
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def close(self) -> None:
        """See `ModelReader.close`."""
        for file in self._files.values():
            file.close()

    def _dequantize(
        self, tensor: StoredTensor, scheme: Scheme, chunk: StoredChunk, first: int, last: int
    ) -> FloatArray:
        """Rows first to last of the tensor, which lie in this chunk."""
        cols, bits = tensor.info.cols, scheme.bits
        data, scales, zeros, up, _ = self._files[chunk.file].cells(chunk.at, chunk.sha256)
        if data.nbytes != -(-(chunk.stop - chunk.start) * bits // 8):
            _corrupt(tensor.info, f"`data` has {data.nbytes} bytes for {chunk.stop - chunk.start} codes of {bits} bits")
        scale, zero = scheme.grid_arrays(scales, zeros, cols)
        if scheme.granularity != "tensor":
            row = chunk.start // cols
            blocks = scheme.row_multiple if scheme.granularity == "block" else 1
            scale = scale[(first - row) // blocks : -(-(last - row) // blocks)]
            scale = scales_of_rows(scheme, scale, first - row, last - first, tensor.tensor_scale)
            zero = None if zero is None else zero[first - row : last - row]
        begin, end = first * cols - chunk.start, last * cols - chunk.start
        if cols * bits % WORD_BITS == 0:  # then a row is packed as it is everywhere else
            packed = np.frombuffer(data[begin * bits // 8 : end * bits // 8], np.uint8).reshape(last - first, -1)
            x = dequantize_packed(packed, scheme, cols, scale, zero)
        else:
            aligned = begin // 8 * 8  # eight codes fill whole bytes
            codes = unpack_flat(data[aligned * bits // 8 : -(-end * bits // 8)], bits, end - aligned)[begin - aligned :]
            x = dequantize_codes(codes.reshape(last - first, cols), scheme, scale, zero)
        if tensor.rank:
            ups = np.frombuffer(up, np.float16).reshape(-1, tensor.rank)
            add_low_rank(x, ups[first - chunk.start // cols : last - chunk.start // cols], self._low_rank_down(tensor))
        return tensor.unscaled(x)

    def _low_rank_down(self, tensor: StoredTensor) -> HalfArray:
        """It stands in the first row of the tensor alone, and is kept while others are read."""
        kept = self._down
        if kept is None or kept[0] != tensor.info.name:
            first = tensor.chunks[0]
            cell = self._files[first.file].cells(first.at, first.sha256)[-1]
            kept = tensor.info.name, np.array(np.frombuffer(cell, np.float16).reshape(tensor.rank, -1))
            self._down = kept
        return kept[1]

    def _stamps(self) -> list[tuple[PurePosixPath, int, bytes]]:
        hashes: dict[PurePosixPath, list[Any]] = {name: [] for name in self._files}
        for tensor in self._tensors.values():
            for chunk in tensor.chunks:
                hashes[chunk.file].append([tensor.info.name, list(tensor.info.shape), chunk.sha256])
        return [(name, self._files[name].size, json.dumps(hashes[name]).encode()) for name in self._files]


def _check_count(files: Iterable[ParquetFile]) -> None:
    """A file has few rows; a folder may have many files."""
    count = sum(file.row_count for file in files)
    if count > MAX_ROWS:
        raise UnsupportedModel(f"The model has {count} rows; at most {MAX_ROWS} are read.")


def _tensors(rows: list[tuple[PurePosixPath, dict[str, Any]]]) -> Iterator[StoredTensor]:
    """Rows of a tensor follow each other, in the order of their chunks, over the borders of files."""
    seen: set[str] = set()
    start = 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and rows[end][1]["chunk_index"] != 0:
            continue
        tensor = _tensor(rows[start:end])
        if tensor.info.name in seen:
            _corrupt(tensor.info, "there are two tensors of this name")
        seen.add(tensor.info.name)
        yield tensor
        start = end


def _tensor(rows: list[tuple[PurePosixPath, dict[str, Any]]]) -> StoredTensor:
    file, cells = rows[0]
    info = _info(file, cells)
    scheme = _scheme(info, cells)
    chunks = []
    for i, (name, row) in enumerate(rows):
        if row["layer_name"] != info.name or row["chunk_index"] != i or row["shape"] != cells["shape"]:
            _corrupt(info, f"chunk {i} is missing, or another's")
        stop = rows[i + 1][1]["chunk_offset"] if i + 1 < len(rows) else info.size
        chunk = StoredChunk(name, row["at"], row["chunk_offset"], stop, str(row["sha256"]))
        _check_chunk(info, scheme, chunk, row, first=i == 0)
        chunks.append(chunk)
    if scheme is None:
        return StoredTensor(info, None, tuple(chunks))
    nbytes = sum(-(-(c.stop - c.start) * scheme.bits // 8) for c in chunks)
    rank = _rank(info, chunks, [row for _, row in rows])
    nbytes += sum((row["scales_bytes"] or 0) + (row["zero_points_bytes"] or 0) for _, row in rows)
    nbytes += low_rank_bytes(info.rows, info.cols, rank)
    tensor_scale = _tensor_scale(info, scheme, cells)
    nbytes += TENSOR_SCALE_BYTES * scheme.has_tensor_scale
    stored = replace(info, dtype="F32", nbytes=nbytes, stored_as=scheme.id)
    return StoredTensor(stored, scheme, tuple(chunks), _input_scale(info, cells["input_scale"]), tensor_scale, rank)


def _rank(info: TensorInfo, chunks: Sequence[StoredChunk], rows: Sequence[Mapping[str, Any]]) -> int:
    """Of the low-rank part, 0 where there is none: `low_rank_down` in the first row, `low_rank_up` in all."""
    rank, rest = divmod(rows[0]["low_rank_down_bytes"] or 0, 2 * info.cols)
    downs = [row["low_rank_down_bytes"] for row in rows[1:]]
    ups = [2 * rank * ((chunk.stop - chunk.start) // info.cols) or None for chunk in chunks]
    if rest or rank > MAX_RANK or any(downs) or [row["low_rank_up_bytes"] or None for row in rows] != ups:
        _corrupt(
            info,
            f"`low_rank_up` and `low_rank_down` have to be of one rank, at most {MAX_RANK}: 2 bytes of it for each row"
            " of the matrix, and in the first row of the tensor for each column",
        )
    return rank


def _tensor_scale(info: TensorInfo, scheme: Scheme, cells: Mapping[str, Any]) -> np.float32 | None:
    value = cells["tensor_scale"]
    if not scheme.has_tensor_scale:
        return None
    if value is None or not 0 < value < math.inf:
        _corrupt(info, f"`tensor_scale` is {value}")
    return np.float32(value)


def _input_scale(info: TensorInfo, given: Array | None) -> FloatArray | None:
    if given is None:
        return None
    scale = np.array(given, np.float32)  # a copy: what is given may be a view of all rows
    if scale.shape != (info.cols,) or not ((scale > 0) & np.isfinite(scale)).all():
        _corrupt(info, f"`input_scale` has to be {info.cols} numbers above 0")
    return scale


def _info(file: PurePosixPath, cells: Mapping[str, Any]) -> TensorInfo:
    name, dtype, shape = cells["layer_name"], cells["dtype"], cells["shape"]
    if name is None or shape is None or None in shape:
        raise CorruptModel(f"{file} is damaged: a row has no `layer_name` or no `shape`")
    if dtype not in DTYPE_BITS:
        raise UnknownDtype(f"tensor {name!r} in {file} has the dtype {dtype!r:.80}", tensor=name)
    size = math.prod(shape)
    info = TensorInfo(name, dtype, tuple(shape), file, 0, size * DTYPE_BITS[dtype] // 8)
    if cells["num_params"] != size:
        _corrupt(info, f"`num_params` is {cells['num_params']}, its shape {shape}")
    return info


def _scheme(info: TensorInfo, cells: Mapping[str, Any]) -> Scheme | None:
    kind, size = cells["quant_type"], cells["group_size"]
    if kind == COPIED:
        return None
    if kind not in schemes() or cells["packing"] != PACKING or not _can_be(kind, "scale_dtype", cells["scale_dtype"]):
        what = f"{kind!r:.40} packed as {cells['packing']!r:.40} with {cells['scale_dtype']!r:.20} scales"
        raise UnsupportedModel(f"tensor {info.name!r} is {what}, which is not read", tensor=info.name)
    if size is not None and size not in GROUP_SIZES:
        raise UnsupportedModel(f"tensor {info.name!r} has groups of {size}, which are not read", tensor=info.name)
    granularity = _granularity(cells)
    group_size = size if granularity == "group" else None
    given = {"granularity": granularity, "group_size": group_size, "scale_dtype": cells["scale_dtype"]}
    try:
        scheme = build_scheme(kind, symmetric=cells["zero_points_bytes"] is None, **given)
    except ValueError:
        _corrupt(info, f"{kind} cannot be with {given}")
    if scheme.bits != cells["bit_width"] or not info.size:
        _corrupt(info, f"`bit_width` is {cells['bit_width']} for {kind}, `num_params` {info.size}")
    return scheme


def _can_be(kind: str, parameter: str, value: Any) -> bool:
    return value in schemes()[kind].choices(parameter)


def _granularity(cells: Mapping[str, Any]) -> str:
    if cells["block_rows"] is not None:
        return "block" if cells["block_rows"] == cells["group_size"] == BLOCK else "other"
    if cells["group_size"]:
        return "group"
    return "channel" if cells["quant_axis"] is not None else "tensor"


def _check_chunk(
    info: TensorInfo, scheme: Scheme | None, chunk: StoredChunk, cells: Mapping[str, Any], *, first: bool
) -> None:
    inside = chunk.start == 0 if first else 0 < chunk.start < info.size
    if not inside or not (chunk.start < chunk.stop <= info.size or info.size == 0):
        _corrupt(info, f"a chunk goes from element {chunk.start} to {chunk.stop} of {info.size}")
    if scheme is None:
        return
    if chunk.start % info.cols or chunk.stop % info.cols:
        _corrupt(info, f"a chunk begins or ends within a row, at element {chunk.start} or {chunk.stop}")
    if scheme.granularity == "block" and chunk.start // info.cols % BLOCK:
        _corrupt(info, f"a chunk begins within a block, at row {chunk.start // info.cols}")
    rows = (chunk.stop - chunk.start) // info.cols
    scales, zeros = (scheme.scale_rows(rows) * nbytes for nbytes in scheme.grid_bytes(info.cols))
    if cells["scales_bytes"] != scales or cells["zero_points_bytes"] != (None if scheme.symmetric else zeros):
        found = f"{cells['scales_bytes']} and {cells['zero_points_bytes']}"
        _corrupt(info, f"`scales` and `zero_points` have {found} bytes; {scales} and {zeros} are due")


def _corrupt(info: TensorInfo, what: str) -> NoReturn:
    raise CorruptModel(f"tensor {info.name!r} in {info.file} is damaged: {what}", tensor=info.name)
