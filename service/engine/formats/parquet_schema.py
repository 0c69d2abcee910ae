"""The columns of the Parquet layout: a row is a tensor, or a chunk of a large one."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from service.engine.formats.base import ModelLayout
from service.engine.metrics import Quality
from service.engine.schemes.base import BLOCK, Scheme
from service.engine.tensors import TensorInfo

FORMAT_VERSION = "2"
METADATA_PREFIX = "arrowquant."
SUFFIX = ".parquet"
#: Element i of a chunk is at bit i * bit_width, counted from the least significant bit of the first byte.
PACKING = "little_endian_bit_stream"
COPIED = "none"
#: Of what a tensor may have beside its codes, the columns of bytes.
LOW_RANK = ("low_rank_up", "low_rank_down")
BYTE_COLUMNS = ("data", "scales", "zero_points", *LOW_RANK)

SCHEMA = pa.schema(
    [
        ("layer_name", pa.string()),
        ("shape", pa.list_(pa.uint64())),
        ("dtype", pa.string()),
        ("num_params", pa.uint64()),
        ("quant_type", pa.string()),
        ("bit_width", pa.uint8()),
        ("packing", pa.string()),
        ("chunk_index", pa.uint32()),
        ("chunk_offset", pa.uint64()),
        ("data", pa.large_binary()),
        ("scales", pa.large_binary()),
        ("zero_points", pa.large_binary()),
        ("scale_dtype", pa.string()),
        ("quant_axis", pa.int32()),
        ("group_size", pa.uint32()),
        ("block_rows", pa.uint32()),
        ("tensor_scale", pa.float32()),
        ("input_scale", pa.list_(pa.float32())),
        ("low_rank_up", pa.large_binary()),
        ("low_rank_down", pa.large_binary()),
        ("is_diffusion_model", pa.bool_()),
        ("modality", pa.string()),
        ("time_group_bounds", pa.list_(pa.uint32())),
        ("activation_scale", pa.list_(pa.float32())),
        ("activation_zero_point", pa.list_(pa.float32())),
        ("cosine_similarity", pa.float64()),
        ("sqnr_db", pa.float64()),
        ("relative_error", pa.float64()),
        ("max_abs_error", pa.float64()),
        ("bits_per_weight", pa.float64()),
        ("sha256", pa.string()),
    ]
)


def tensor_cells(info: TensorInfo, scheme: Scheme | None) -> dict[str, Any]:
    """The cells that all rows of a tensor share, as JSON, but for what it lost; what does not apply is left out."""
    cells: dict[str, Any] = {
        "layer_name": info.name,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "num_params": info.size,
        "quant_type": COPIED,
    }
    if scheme is not None:
        cells |= {
            "quant_type": scheme.id,
            "bit_width": scheme.bits,
            "packing": PACKING,
            "scale_dtype": scheme.scale_dtype,
            # Scales vary along the rows; a single one has no axis.
            "quant_axis": None if scheme.granularity == "tensor" else 0,
            "group_size": scheme.width,
            "block_rows": BLOCK if scheme.granularity == "block" else None,
        }
    return cells


def quality_cells(quality: Quality | None) -> dict[str, Any]:
    """What a tensor lost: the fields are columns by the same names."""
    return {} if quality is None else {name: getattr(quality, name) for name in Quality.__dataclass_fields__}


def model_cells(layout: ModelLayout) -> dict[str, Any]:
    """The cells that all rows of a file share."""
    return {"is_diffusion_model": layout.is_diffusion, "modality": layout.modality}
