"""How compressed-tensors describes a scheme: which tensors stand for a weight, and the `quantization_config`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from service.engine.packing import WORD_BITS, row_bytes
from service.engine.schemes.base import BLOCK, Scheme
from service.engine.tensors import DTYPE_BITS

Packing = Literal[
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "nvfp4-pack-quantized",
]
#: How floating-point schemes are packed; integers have a choice.
FLOAT_PACKINGS: dict[str, Packing] = {
    "fp8_e4m3": "float-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
#: What the library makes bfloat16 of, whatever the rest of the model is loaded in.
IN_BFLOAT16 = frozenset({FLOAT_PACKINGS["mxfp4"], FLOAT_PACKINGS["mxfp8"], FLOAT_PACKINGS["nvfp4"]})
#: Scales of 8 bits: as safetensors names them, and as the library does.
SMALL_SCALES = {"E4M3": ("F8_E4M3", "torch.float8_e4m3fn"), "E8M0": ("U8", "torch.uint8")}

GLOBAL = "weight_global_scale"

#: Name, dtype, shape and bytes of a stored tensor.
Part = tuple[str, str, tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Group:
    """What one entry of `config_groups` says; tensors that share it share the entry."""

    packing: Packing
    num_bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    scale_dtype: str | None = None

    @classmethod
    def of(cls, scheme: Scheme, packing: Packing) -> Group:
        """The group of a tensor in this scheme."""
        strategy = "tensor_group" if scheme.has_tensor_scale else scheme.granularity
        _, scale_dtype = SMALL_SCALES.get(scheme.scale_dtype, (None, None))
        return cls(packing, scheme.bits, scheme.symmetric, strategy, scheme.group_size, scale_dtype)

    def as_json(self, targets: list[str]) -> dict[str, Any]:
        """The entry."""
        args = asdict(self) | {"type": self._type, "dynamic": False}
        del args["packing"]
        if self.scale_dtype is None:
            del args["scale_dtype"]
        if self.strategy == "block":
            args["block_structure"] = [BLOCK, BLOCK]
        return {
            "targets": targets,
            "weights": args,
            "input_activations": self._inputs(),
            "output_activations": None,
            "format": self.packing,
        }

    @property
    def _type(self) -> str:
        return "int" if self.packing in ("pack-quantized", "int-quantized") else "float"

    def _inputs(self) -> dict[str, Any] | None:
        """The runtimes know these packings as W8A8: activations rounded as they come, by token or parts of one."""
        if self.packing != "float-quantized" and not (self.packing == "int-quantized" and is_w8(self)):
            return None
        inputs = {"num_bits": 8, "type": self._type, "symmetric": True, "strategy": "token", "dynamic": True}
        return inputs | {"strategy": "group", "group_size": BLOCK} if self.strategy == "block" else inputs


def is_w8(group: Group) -> bool:
    """Whether it is what integer matrix units multiply: 8 bits, symmetric, one scale per row or tensor."""
    return group.num_bits == 8 and group.symmetric and group.strategy in ("tensor", "channel")


def parts_of(module: str, scheme: Scheme, packing: Packing, rows: int, cols: int) -> list[Part]:
    """The tensors that stand for `<module>.weight`: codes, scales, then what else there is."""
    found = _suffixed(scheme, packing, rows, cols)
    return [(module + suffix, dtype, shape, nbytes) for suffix, dtype, shape, nbytes in found]


@lru_cache(maxsize=256)  # a model has few shapes
def _suffixed(scheme: Scheme, packing: Packing, rows: int, cols: int) -> list[Part]:
    scale_shape: tuple[int, ...] = (scheme.scale_rows(rows), scheme.groups(cols))
    if scheme.granularity == "tensor":
        scale_shape = (1,)
    scale_dtype, _ = SMALL_SCALES.get(scheme.scale_dtype, (scheme.scale_dtype, None))
    parts = [_part(".weight_scale", scale_dtype, scale_shape)]
    if packing in FLOAT_PACKINGS.values():
        if scheme.bits == 4:
            parts.insert(0, _part(".weight_packed", "U8", (rows, cols // 2)))
        else:
            parts.insert(0, _part(".weight", "F8_E4M3", (rows, cols)))
        return [*parts, _part(f".{GLOBAL}", "F32", (1,))] if scheme.has_tensor_scale else parts
    if packing == "int-quantized":
        parts.insert(0, _part(".weight", "I8", (rows, cols)))
        zero: tuple[str, tuple[int, ...]] = ("I8", scale_shape)
    else:
        parts.insert(0, _part(".weight_packed", "I32", (rows, row_bytes(cols, scheme.bits) // 4)))
        parts.append(_part(".weight_shape", "I64", (2,)))
        packed_rows = -(-rows * scheme.bits // WORD_BITS)
        # The library packs zero points along the rows, except a lone one.
        zero = ("I8", scale_shape) if scheme.granularity == "tensor" else ("I32", (packed_rows, *scale_shape[1:]))
    if not scheme.symmetric:
        parts.append(_part(".weight_zero_point", *zero))
    return parts


def quantization_config(modules: Mapping[str, Group], untouched: Iterable[str]) -> dict[str, Any]:
    """For config.json: `modules` are the quantized ones, `untouched` the others that have a 2-D weight."""
    found = Counter(modules.values()).most_common()
    groups = {}
    for i, (group, _) in enumerate(found):
        # The commonest group is that of the class, so that fused and renamed layers find it as well.
        targets = ["Linear"] if i == 0 else [name for name, g in modules.items() if g == group]
        groups[f"group_{i}"] = group.as_json(targets)
    packings = {group.packing for group, _ in found}
    ignore = list(untouched)
    if "lm_head" not in modules and "lm_head" not in ignore:
        ignore.append("lm_head")  # tied to the embedding, it has no tensor of its own, but is a Linear
    described: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": packings.pop() if len(packings) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": groups,
    }
    # transformers expects packed zero points unpacked, and weights that the library makes bfloat16 in a model of
    # bfloat16, unless it is told to dequantize at once: to the dtype of the model. It does so for a single group
    # only. vLLM ignores the key.
    if len(found) == 1 and (_packs_zeros(found[0][0]) or found[0][0].packing in IN_BFLOAT16):
        described["dequantize"] = True
    return described


def runs_in_bfloat16_only(groups: Collection[Group]) -> bool:
    """Whether layers of these groups run in transformers only in a model that is loaded in bfloat16.

    A single group is dequantized to any dtype; of several, those that the library makes bfloat16 stay so.
    """
    return len(groups) > 1 and any(group.packing in IN_BFLOAT16 for group in groups)


def _packs_zeros(group: Group) -> bool:
    return group.packing == "pack-quantized" and not group.symmetric and group.strategy != "tensor"


def _part(name: str, dtype: str, shape: tuple[int, ...]) -> Part:
    item = DTYPE_BITS[dtype] // 8
    size = item
    for n in shape:
        size *= n
    return name, dtype, shape, size
