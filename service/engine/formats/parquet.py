"""parquet: ArrowQuant's own layout, which pyarrow, DuckDB and polars read without our code."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from service.engine.beside import PARTS
from service.engine.formats.base import Format, FormatOptions, ModelReader, ModelWriter, WriterContext
from service.engine.formats.layout import find_placement, weights_folder
from service.engine.formats.parquet_reader import ParquetReader
from service.engine.formats.parquet_schema import SUFFIX
from service.engine.formats.parquet_writer import CHUNK_BYTES, REPACKED_CODES, ParquetWriter
from service.engine.formats.weights import WEIGHTS_SUFFIX
from service.engine.packing import WORD_BITS
from service.engine.schemes.base import TENSOR_SCALE_BYTES, Scheme
from service.engine.tensors import TensorInfo, codes_of
from service.storage.model_files import ModelFiles


class ParquetOptions(FormatOptions):
    """Choices of the `parquet` format."""

    max_file_bytes: int = Field(default=2 << 30, ge=1, description="A new file begins when one has this many bytes.")


class ParquetFormat(Format):
    """Reads and writes the columns described in docs/parquet.md."""

    id: ClassVar[str] = "parquet"
    description: ClassVar[str] = "Parquet: a row per tensor, for pyarrow, DuckDB and polars"
    can_read: ClassVar[bool] = True
    can_write: ClassVar[bool] = True
    options: ClassVar[type[FormatOptions]] = ParquetOptions
    short_groups: ClassVar[bool] = True
    keeps: ClassVar[frozenset[str]] = frozenset(PARTS)

    @classmethod
    def recognizes(cls, source: ModelFiles) -> bool:
        """Files by their name; folders that hold such files and no safetensors beside them."""
        if source.entry is not None:
            return source.name.endswith(SUFFIX)
        names = source.names_in(weights_folder(source))
        return any(n.endswith(SUFFIX) for n in names) and not any(n.endswith(WEIGHTS_SUFFIX) for n in names)

    @classmethod
    def open(cls, source: ModelFiles) -> ModelReader:
        """See `Format.open`."""
        return ParquetReader(find_placement(source, SUFFIX))

    @classmethod
    def refuses_scheme(cls, scheme: Scheme, options: FormatOptions) -> str | None:
        """Every scheme has its columns."""
        del scheme, options
        return None

    @classmethod
    def stored_bytes(cls, info: TensorInfo, scheme: Scheme, options: FormatOptions) -> int:
        """Codes without the bits that fill up a row, and a byte for each zero point: see `Format.stored_bytes`."""
        del options
        grids = scheme.scale_rows(info.rows) * sum(scheme.grid_bytes(info.cols))
        return -(-info.size * scheme.bits // 8) + grids + TENSOR_SCALE_BYTES * scheme.has_tensor_scale

    @classmethod
    def reading_bytes(cls, info: TensorInfo, nbytes: int) -> int:
        """A cell is read as a whole, and what is wanted of it copied: see `Format.reading_bytes`."""
        part = nbytes if info.stored_as is None else codes_of(info, nbytes) + nbytes
        return nbytes + part + min(info.nbytes, 2 * CHUNK_BYTES)

    @classmethod
    def writing_bytes(cls, rows: int, cols: int, bits: int) -> int:
        """Rows that do not end on whole words are unpacked and packed again: see `Format.writing_bytes`."""
        if cols * bits % WORD_BITS == 0:
            return 0
        elements = min(rows * cols, max(REPACKED_CODES, 8 * cols))
        return elements + elements * bits // 8

    @classmethod
    def writer(cls, folder: Path, context: WriterContext) -> ModelWriter:
        """See `Format.writer`."""
        assert isinstance(context.options, ParquetOptions)
        return ParquetWriter(folder, context, context.options.max_file_bytes)
