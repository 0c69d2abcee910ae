"""compressed-tensors: what vLLM, SGLang and transformers load; integers, packed or as bytes, and small floats."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from service.engine.formats.base import Format, FormatOptions, ModelReader, ModelWriter, WriterContext
from service.engine.formats.compressed_tensors_config import FLOAT_PACKINGS, Group, Packing, is_w8, parts_of
from service.engine.formats.compressed_tensors_reader import CompressedTensorsReader
from service.engine.formats.compressed_tensors_writer import WEIGHT, CompressedTensorsWriter
from service.engine.formats.layout import find_placement
from service.engine.formats.safetensors import quantization_config
from service.engine.packing import WORD_BITS
from service.engine.schemes.base import BLOCK, Scheme
from service.engine.schemes.integer import IntegerScheme
from service.engine.schemes.nested import NestedScheme
from service.engine.tensors import TensorInfo, codes_of
from service.storage.model_files import ModelFiles


class CompressedTensorsOptions(FormatOptions):
    """Choices of the `compressed-tensors` format."""

    layout: Literal["auto", "pack-quantized", "int-quantized"] = Field(
        default="auto",
        description="Of integers. `pack-quantized`: bit-packed weights. `int-quantized`: a byte each; with 8 bits,"
        " symmetric and not in groups, loaders round activations to 8 bits as well (W8A8). `auto`: the latter where it"
        " means W8A8.",
    )
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1, description="Bytes of weights in one file, at most.")

    def packing_of(self, scheme: Scheme) -> Packing:
        """The packing of a tensor in this scheme."""
        if scheme.id in FLOAT_PACKINGS:
            return FLOAT_PACKINGS[scheme.id]
        if self.layout != "auto":
            return self.layout
        return "int-quantized" if is_w8(Group.of(scheme, "int-quantized")) else "pack-quantized"


class CompressedTensorsFormat(Format):
    """Reads and writes model folders whose config.json has quant_method compressed-tensors."""

    id: ClassVar[str] = "compressed-tensors"
    description: ClassVar[str] = "compressed-tensors in safetensors, for vLLM, SGLang and transformers"
    can_read: ClassVar[bool] = True
    can_write: ClassVar[bool] = True
    #: transformers opens mixed groups only without zero points, and vLLM's kernels know these best.
    prefers_symmetric: ClassVar[bool] = True
    fuses: ClassVar[bool] = True
    options: ClassVar[type[FormatOptions]] = CompressedTensorsOptions

    @classmethod
    def recognizes(cls, source: ModelFiles) -> bool:
        """Folders whose configuration says so."""
        return source.entry is None and quantization_config(source).get("quant_method") == cls.id

    @classmethod
    def open(cls, source: ModelFiles) -> ModelReader:
        """See `Format.open`."""
        return CompressedTensorsReader(find_placement(source))

    @classmethod
    def refuses_scheme(cls, scheme: Scheme, options: FormatOptions) -> str | None:
        """Integers and some floats are known to its loaders."""
        del options
        if isinstance(scheme, IntegerScheme) or scheme.id in FLOAT_PACKINGS:
            return None
        if isinstance(scheme, NestedScheme):
            return (
                f"its loaders know a scale for each group, and no nested ones as {scheme.id} has; `parquet` holds them"
            )
        known = ", ".join(FLOAT_PACKINGS)
        return f"its loaders know integers and {known}, but not {scheme.id}; the format `parquet` holds it"

    @classmethod
    def refuses_tensor(cls, info: TensorInfo, scheme: Scheme) -> str | None:
        """Its loaders look for the weights of linear layers, and trip over one kind of small ones."""
        if not info.name.endswith(WEIGHT):
            return f"only tensors named `*{WEIGHT}` belong to layers that loaders of this format know"
        if len(info.shape) != 2:
            return f"it has {len(info.shape)} dimensions, and loaders of this format take matrices"
        if scheme.granularity == "block" and info.cols % BLOCK:
            return f"its loaders take rows of whole blocks of {BLOCK}, and its rows have {info.cols}"
        if _trips_the_library(info, scheme):
            return f"the library compressed-tensors cannot unpack 4-bit zero points in groups of {info.rows} rows"
        return None

    @classmethod
    def stored_bytes(cls, info: TensorInfo, scheme: Scheme, options: FormatOptions) -> int:
        """All tensors that stand for this one: see `Format.stored_bytes`."""
        assert isinstance(options, CompressedTensorsOptions)
        return sum(nbytes for *_, nbytes in parts_of("", scheme, options.packing_of(scheme), info.rows, info.cols))

    @classmethod
    def reading_bytes(cls, info: TensorInfo, nbytes: int) -> int:
        """Numbers come from codes: see `Format.reading_bytes`."""
        return nbytes if info.stored_as is None else nbytes + codes_of(info, nbytes)

    @classmethod
    def writer(cls, folder: Path, context: WriterContext) -> ModelWriter:
        """See `Format.writer`."""
        assert isinstance(context.options, CompressedTensorsOptions)
        return CompressedTensorsWriter(folder, context, context.options.packing_of, context.options.max_shard_bytes)


def _trips_the_library(info: TensorInfo, scheme: Scheme) -> bool:
    """Whether version 0.20 fails to decompress it: the zero points of up to eight rows are one word per group.

    It transposes these words and views them as bytes, which torch allows only where they stay in
    one row. All other widths are unpacked in another way.
    """
    groups = scheme.groups(info.cols) if scheme.granularity == "group" else 1
    return scheme.bits == 4 and not scheme.symmetric and groups > 1 and info.rows * scheme.bits <= WORD_BITS
