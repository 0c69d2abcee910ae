"""Formats by their public ids, and the one that reads a given model."""

from __future__ import annotations

from pathlib import Path

from service.engine.discovery import subclasses
from service.engine.formats.base import Format, ModelReader
from service.engine.formats.layout import PICKLE_SUFFIXES, find_placement
from service.engine.formats.safetensors import quantization_config
from service.engine.formats.source import LocalFiles
from service.errors import (
    AlreadyQuantized,
    InvalidConfig,
    ModelNotFound,
    PickledWeights,
    SourceChanged,
    UnsupportedModel,
)
from service.storage.faults import storage_error
from service.storage.model_files import ModelFiles


def formats() -> dict[str, type[Format]]:
    """Every format by its id."""
    return {cls.id: cls for cls in subclasses(__package__, Format)}


def find_format(id_: str, *, pointer: str | None = None) -> type[Format]:
    """The format of this id; raises InvalidConfig when there is none."""
    known = formats()
    if id_ not in known:
        raise InvalidConfig(f"format {id_!r} does not exist; there are {', '.join(known)}", pointer=pointer)
    return known[id_]


def open_model(path: Path | ModelFiles) -> ModelReader:
    """Open whatever model lies at this file or folder of this machine, or in these files.

    Raises ModelNotFound, PickledWeights, AlreadyQuantized, UnsupportedModel, StorageFailure or a ModelError.
    """
    source = LocalFiles(path) if isinstance(path, Path) else path
    try:
        if not source.exists():
            raise ModelNotFound("There is no model at this address.")
        for cls in formats().values():
            if cls.can_read and cls.recognizes(source):
                return cls.open(source)
        raise _nothing_reads(source)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceChanged(f"{source.name} changed while it was being opened. Submit the job again.") from error
    except OSError as error:
        raise storage_error(error, f"opening {source.name}") from error


def is_readable(source: ModelFiles) -> bool:
    """Whether some format takes these files for its own; the rest shows when they are opened."""
    return any(cls.can_read and cls.recognizes(source) for cls in formats().values())


def _nothing_reads(source: ModelFiles) -> Exception:
    is_folder = source.entry is None
    if is_folder and (method := quantization_config(source).get("quant_method")) is not None:
        return AlreadyQuantized(f"The model is quantized by {method!r}, which cannot be read. Give the original.")
    if source.entry is None or source.entry.suffix in PICKLE_SUFFIXES:
        try:
            find_placement(source)
        except (PickledWeights, ModelNotFound) as error:
            return error
    return UnsupportedModel(f"{source.name} is of a kind that is not read. Readable are {', '.join(_readable())}.")


def _readable() -> list[str]:
    return [id_ for id_, cls in formats().items() if cls.can_read]
