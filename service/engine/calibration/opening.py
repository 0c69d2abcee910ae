"""From the files at an address to the calibration that lies there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from service.engine.calibration.calibration import Calibration
from service.engine.calibration.entries import CalibrationFile
from service.engine.calibration.imatrix_file import ImatrixCalibration
from service.engine.calibration.safetensors_file import SafetensorsCalibration
from service.engine.formats.source import LocalFiles
from service.errors import InvalidCalibration, ModelNotFound, SourceChanged
from service.storage.faults import storage_error
from service.storage.model_files import ModelFiles, OpenFile


def _parquet(file: OpenFile) -> CalibrationFile:
    # Half of Arrow's libraries, for which no start of the server has to wait.
    from service.engine.calibration.parquet_file import ParquetCalibration

    return ParquetCalibration(file)


_KINDS: dict[str, Callable[[OpenFile], CalibrationFile]] = {
    ".safetensors": SafetensorsCalibration,
    ".parquet": _parquet,
    ".gguf": ImatrixCalibration,
}


def open_calibration(path: Path | ModelFiles) -> Calibration:
    """The calibration in a file, or in a folder that holds one such file and no other.

    Raises ModelNotFound, InvalidCalibration, CorruptModel, StorageFailure or SourceChanged.
    """
    source = LocalFiles(path) if isinstance(path, Path) else path
    try:
        if not source.exists():
            raise ModelNotFound("There is no calibration at this address.")
        name = find_calibration(source)
        return _open(source.open(name), source.identity(name))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceChanged(f"{source.name} changed while it was being opened. Submit the job again.") from error
    except OSError as error:
        raise storage_error(error, f"opening {source.name}") from error


def find_calibration(source: ModelFiles) -> PurePosixPath:
    """The one file that may be a calibration; raises InvalidCalibration."""
    names = [source.entry] if source.entry is not None else source.list().files
    found = [name for name in names if name.suffix in _KINDS]
    if len(found) == 1:
        return found[0]
    kinds = ", ".join(_KINDS)
    raise InvalidCalibration(f"{source.name} is no calibration: it should be one file that ends in one of {kinds}")


def _open(file: OpenFile, identity: tuple[int | str, ...]) -> Calibration:
    try:
        return Calibration(_KINDS[file.name.suffix](file), identity)
    except BaseException:
        file.close()
        raise
