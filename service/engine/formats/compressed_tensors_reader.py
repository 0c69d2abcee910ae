"""Reads compressed-tensors: what this service wrote, and what llm-compressor wrote in the same packings.

A weight's scheme follows from the dtypes and shapes of its parts. `config_groups` is asked for bit widths only:
its targets may be regular expressions and class names, of which the files know nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, get_args

import numpy as np

from service.engine.decode import dequantize_codes, dequantize_packed, scales_of_rows
from service.engine.formats.base import ModelReader
from service.engine.formats.compressed_tensors_config import FLOAT_PACKINGS, GLOBAL, Packing, parts_of
from service.engine.formats.layout import Placement
from service.engine.formats.safetensors import WeightFiles
from service.engine.packing import WORD_BITS, row_bytes, unpack_rows
from service.engine.schemes.base import BLOCK, SCALE_DTYPES, GroupSize, PlainScaleDtype, Scheme
from service.engine.schemes.registry import build_scheme, schemes
from service.engine.tensors import FLOAT_DTYPES, Array, CodeArray, FloatArray, TensorInfo
from service.errors import CorruptModel, UnsupportedModel

READABLE_FORMATS = (*get_args(Packing), "naive-quantized", "mixed-precision")
FLOAT_WIDTHS = (4, 8)
GROUP_SIZES = get_args(GroupSize.__value__)
SCALE, ZERO, SHAPE = "weight_scale", "weight_zero_point", "weight_shape"
PARTS = (SCALE, ZERO, SHAPE, GLOBAL)
#: A part of what is not read.
FOREIGN_PART = "weight_g_idx"
#: By the part that holds the codes, its dtype, and that of scales if they have 8 bits.
PACKINGS: dict[tuple[str, str, str | None], Packing] = {
    ("weight_packed", "I32", None): "pack-quantized",
    ("weight", "I8", None): "int-quantized",
    ("weight", "F8_E4M3", None): "float-quantized",
    ("weight", "F8_E4M3", "U8"): "mxfp8-quantized",
    ("weight_packed", "U8", "U8"): "mxfp4-pack-quantized",
    ("weight_packed", "U8", "F8_E4M3"): "nvfp4-pack-quantized",
}


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight's parts as they lie in the files."""

    scheme: Scheme
    packing: Packing
    codes: TensorInfo
    scale: TensorInfo
    zero: TensorInfo | None
    cols: int
    tensor_scale: np.float32 | None = None


class CompressedTensorsReader(ModelReader):
    """`<module>.weight` in place of its parts, dequantized; all other tensors as they are stored."""

    format_id: ClassVar[str] = "compressed-tensors"

    def __init__(self, placement: Placement) -> None:
        bits = declared_bits(placement.config["quantization_config"])
        self._files = WeightFiles(placement)
        try:
            self._weights: dict[str, StoredWeight] = {}
            self.tensors = tuple(self._logical(bits))
        except BaseException:
            self._files.close()
            raise
        self.files = placement.files
        self.layout = placement.layout(self.tensors, self._files.stamps, self._files.metadata, self._files.warnings)

    def rows(self, info: TensorInfo, start: int, stop: int) -> Array:
        """See `ModelReader.rows`."""
        weight = self._weights.get(info.name)
        if weight is None:
            dtype = FLOAT_DTYPES[info.dtype]
            width = info.cols * dtype.itemsize
            return self._files.read(info, start * width, stop * width).view(dtype).reshape(stop - start, info.cols)
        return self._dequantize(weight, start, stop)

    def raw(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """See `ModelReader.raw`."""
        return self._files.read(info, start, stop).data

    def close(self) -> None:
        """See `ModelReader.close`."""
        self._files.close()

    def _logical(self, declared: Mapping[str, int]) -> list[TensorInfo]:
        stored = self._files.tensors
        weights = {
            module: self._weight(module, codes, declared)
            for name, codes in stored.items()
            if (module := _module_of(name, stored)) is not None
        }
        parts = {f"{module}.{part}" for module in weights for part in ("weight", "weight_packed", *PARTS)}
        tensors = []
        for name, info in stored.items():
            if (module := _module_of(name, stored)) is not None:
                self._weights[f"{module}.weight"] = weights[module]
                tensors.append(_as_weight(f"{module}.weight", weights[module], stored))
            elif name not in parts:
                tensors.append(info)
        return tensors

    def _weight(self, module: str, codes: TensorInfo, declared: Mapping[str, int]) -> StoredWeight:
        """The weight of a module; raises CorruptModel where its parts contradict each other."""
        stored = self._files.tensors
        scale, zero = stored.get(f"{module}.{SCALE}"), stored.get(f"{module}.{ZERO}")
        if scale is None:
            _corrupt(codes, f"there is no {module}.{SCALE}")
        packing = _packing(codes, scale)
        foreign = (FOREIGN_PART,) if packing == FLOAT_PACKINGS["nvfp4"] else (FOREIGN_PART, GLOBAL)
        for part in foreign:
            if f"{module}.{part}" in stored:
                raise UnsupportedModel(f"the weight of {module} has a {part}, which is not read", tensor=codes.name)
        if len(codes.shape) != 2:
            raise UnsupportedModel(f"{codes.name} has {len(codes.shape)} dimensions; two are read", tensor=codes.name)
        if codes.size == 0:
            _corrupt(codes, f"it has no elements, but a {SCALE}")
        rows, cols = self._shape(module, codes) if packing == "pack-quantized" else codes.shape
        if packing in FLOAT_PACKINGS.values():
            cols = cols * (2 if codes.dtype == "U8" else 1)
            scheme = _float_scheme(packing, scale, rows, cols)
        else:
            bits = _bits(codes, packing, cols, declared, stored)
            granularity, group_size = _granularity(scale, rows, cols)
            scheme = build_scheme(
                f"int{bits}",
                symmetric=zero is None,
                granularity=granularity,
                group_size=group_size,
                scale_dtype=scale.dtype,
            )
        for name, dtype, shape, _ in parts_of(module, scheme, packing, rows, cols):
            found = stored.get(name)
            # One number is written as [1], [1, 1] or [].
            one = found is not None and found.size == math.prod(shape) == 1
            if found is None or found.dtype != dtype or (found.shape != shape and not one):
                _corrupt(codes, f"{name} is not {dtype} {list(shape)}")
        tensor_scale = self._tensor_scale(stored[f"{module}.{GLOBAL}"]) if scheme.has_tensor_scale else None
        return StoredWeight(scheme, packing, codes, scale, zero, cols, tensor_scale)

    def _tensor_scale(self, info: TensorInfo) -> np.float32:
        (value,) = self._files.read(info, 0, info.nbytes).view("<f4")
        if not 0 < value < np.inf:
            _corrupt(info, f"it is {value}")
        return np.float32(value)

    def _shape(self, module: str, codes: TensorInfo) -> tuple[int, int]:
        info = self._files.tensors.get(f"{module}.{SHAPE}")
        if info is None or info.dtype != "I64" or info.shape != (2,):
            _corrupt(codes, f"there is no {module}.{SHAPE} of two I64")
        rows, cols = (int(n) for n in self._files.read(info, 0, info.nbytes).view("<i8"))
        if rows != codes.shape[0] or not 0 < cols <= codes.shape[1] * WORD_BITS:
            _corrupt(codes, f"{info.name} says [{rows}, {cols}], which its shape {list(codes.shape)} cannot hold")
        return rows, cols

    def _dequantize(self, weight: StoredWeight, start: int, stop: int) -> FloatArray:
        scheme, count = weight.scheme, stop - start
        packed = self._part_rows(weight.codes, start, stop).reshape(count, -1)
        scale_bytes = self._all_or_rows(weight.scale, scheme, start, stop)
        scale = scale_bytes.view(SCALE_DTYPES[scheme.scale_dtype]).reshape(-1, scheme.groups(weight.cols))
        scale = scales_of_rows(scheme, scale, start, count, weight.tensor_scale)
        zeros = self._zeros(weight, start, stop)
        if weight.packing in FLOAT_PACKINGS.values() or weight.packing == "pack-quantized":
            return dequantize_packed(packed, scheme, weight.cols, scale, zeros)
        return dequantize_codes(packed ^ np.uint8(0x80), _byte_scheme(scheme), scale, zeros)

    def _zeros(self, weight: StoredWeight, start: int, stop: int) -> CodeArray | None:
        scheme, info = weight.scheme, weight.zero
        if info is None:
            return None
        if info.dtype == "I8":
            offset = 1 << (scheme.bits - 1) if weight.packing == "pack-quantized" else 0x80
            signed = self._all_or_rows(info, scheme, start, stop).view(np.int8).astype(np.int16)
            return (signed + offset).astype(np.uint8).reshape(-1, scheme.groups(weight.cols))
        # Packed along the rows: whole words begin at every 32nd row.
        first = start // WORD_BITS * WORD_BITS
        words_from = first * scheme.bits // WORD_BITS
        words_to = min(info.rows, -(-stop // WORD_BITS) * scheme.bits)
        words = self._part_rows(info, words_from, words_to).view("<u4").reshape(-1, info.cols)
        columns = np.ascontiguousarray(words.T).view(np.uint8)  # (groups, bytes)
        return np.ascontiguousarray(unpack_rows(columns, scheme.bits, stop - first)[:, start - first :].T)

    def _all_or_rows(self, info: TensorInfo, scheme: Scheme, start: int, stop: int) -> CodeArray:
        if scheme.granularity == "tensor":
            return self._files.read(info, 0, info.nbytes)
        if scheme.granularity == "block":
            return self._part_rows(info, start // BLOCK, -(-stop // BLOCK))
        return self._part_rows(info, start, stop)

    def _part_rows(self, info: TensorInfo, start: int, stop: int) -> CodeArray:
        width = info.nbytes // info.rows
        return self._files.read(info, start * width, stop * width)


def declared_bits(config: Mapping[str, Any]) -> dict[str, int]:
    """Bits by target, as `config_groups` has them; raises UnsupportedModel for what is not read."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise CorruptModel("config.json is damaged: its quantization_config has no `config_groups`")
    named = [config.get("format"), *(group.get("format") for group in groups.values())]
    foreign = sorted({str(f) for f in named if f is not None and f not in READABLE_FORMATS})
    if foreign:
        raise UnsupportedModel(f"the model is {', '.join(foreign)}; read are {', '.join(READABLE_FORMATS)}")
    if config.get("transform_config") or config.get("sparsity_config"):
        raise UnsupportedModel("the model has transforms or sparsity beside its quantization, which are not read")
    bits: dict[str, int] = {}
    for group in groups.values():
        args = group.get("weights")
        targets = group.get("targets")
        if not isinstance(args, dict):
            continue
        width = args.get("num_bits")
        if args.get("type") == "float" and width in FLOAT_WIDTHS:
            continue  # what they are shows in their parts
        if args.get("type", "int") != "int" or not isinstance(width, int) or f"int{width}" not in schemes():
            raise UnsupportedModel(f"weights of type {args.get('type')} with {width} bits are not read")
        bits.update({t: width for t in (targets if isinstance(targets, list) else []) if isinstance(t, str)})
    return bits


def _module_of(name: str, stored: Mapping[str, TensorInfo]) -> str | None:
    """The module of which this tensor holds the codes, if it does."""
    if name.endswith(".weight_packed"):
        return name.removesuffix(".weight_packed")
    module = name.removesuffix(".weight")
    if module != name and f"{module}.{SCALE}" in stored:
        if stored[name].dtype not in ("I8", "F8_E4M3"):
            raise UnsupportedModel(f"{name} is {stored[name].dtype} with a scale; I8 and F8_E4M3 are read", tensor=name)
        return module
    return None


def _packing(codes: TensorInfo, scale: TensorInfo) -> Packing:
    """How a weight lies in its parts; raises UnsupportedModel where these are of other dtypes than any has."""
    part = codes.name.rpartition(".")[2]
    small = None if scale.dtype in get_args(PlainScaleDtype) else scale.dtype
    found = PACKINGS.get((part, codes.dtype, small))
    if found is None:
        raise UnsupportedModel(
            f"{codes.name} is {codes.dtype} with scales of {scale.dtype}, which is not read", tensor=codes.name
        )
    return found


def _float_scheme(packing: Packing, scale: TensorInfo, rows: int, cols: int) -> Scheme:
    (id_,) = (id_ for id_, found in FLOAT_PACKINGS.items() if found == packing)
    if packing != "float-quantized":
        return build_scheme(id_, symmetric=True)
    blocks = (-(-rows // BLOCK), -(-cols // BLOCK))
    if scale.shape == blocks and scale.size > 1 and scale.shape != (rows, 1):
        granularity = "block"
    else:
        granularity, _ = _granularity(scale, rows, cols)
    if granularity == "group":
        _corrupt(scale, f"its shape {list(scale.shape)} is neither that of rows nor of blocks of [{rows}, {cols}]")
    return build_scheme(id_, symmetric=True, granularity=granularity, scale_dtype=scale.dtype)


def _bits(
    codes: TensorInfo, packing: Packing, cols: int, declared: Mapping[str, int], stored: Mapping[str, TensorInfo]
) -> int:
    """Bits of a weight: as declared for its name, else for its class, of which the files know nothing."""
    module = codes.name.rpartition(".")[0]
    classes = {b for t, b in declared.items() if not {f"{t}.weight", f"{t}.weight_packed"} & stored.keys()}
    possible = {declared[module]} if module in declared else classes or set(declared.values())
    if packing == "pack-quantized":
        possible = {b for b in possible if row_bytes(cols, b) * 8 // WORD_BITS == codes.shape[1]}
    if len(possible) > 1 and packing == "pack-quantized":
        raise UnsupportedModel(f"{codes.name} may have {sorted(possible)} bits: its config.json does not say which")
    if not possible:
        _corrupt(codes, f"no width in config.json packs {cols} codes into {codes.shape[1:]} words")
    return max(possible)


def _granularity(scale: TensorInfo, rows: int, cols: int) -> tuple[str, int | None]:
    if scale.size == 1:
        return "channel" if rows == 1 and scale.shape == (1, 1) else "tensor", None
    if len(scale.shape) != 2 or scale.shape[0] != rows or scale.shape[1] == 0:
        _corrupt(scale, f"its shape {list(scale.shape)} does not fit a weight of [{rows}, {cols}]")
    if scale.shape[1] == 1:
        return "channel", None
    size, rest = divmod(cols, scale.shape[1])
    if rest or size not in GROUP_SIZES:
        allowed = ", ".join(str(g) for g in GROUP_SIZES)
        raise UnsupportedModel(f"{scale.name} divides {cols} columns by {scale.shape[1]}; groups of {allowed} are read")
    return "group", size


def _as_weight(name: str, weight: StoredWeight, stored: Mapping[str, TensorInfo]) -> TensorInfo:
    module = name.removesuffix(".weight")
    parts = [weight.codes, *(stored[f"{module}.{p}"] for p in PARTS if f"{module}.{p}" in stored)]
    return TensorInfo(
        name=name,
        dtype="F32",
        shape=(weight.codes.rows, weight.cols),
        file=weight.codes.file,
        offset=weight.codes.offset,
        nbytes=sum(part.nbytes for part in parts),
        stored_as=weight.scheme.id,
    )


def _byte_scheme(scheme: Scheme) -> Scheme:
    """The same scheme over whole bytes: offset 128 in codes and zero points cancels out."""
    fields = scheme.model_dump() | {"bits": 8}
    return type(scheme).model_validate(fields)


def _corrupt(info: TensorInfo, what: str) -> NoReturn:
    raise CorruptModel(f"tensor {info.name!r} in {info.file} is damaged: {what}", tensor=info.name)
