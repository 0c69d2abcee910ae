"""safetensors: a file, a sharded index, or a model folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import ClassVar

from service.engine.formats.base import Format, ModelReader
from service.engine.formats.layout import Placement, find_placement, weights_folder
from service.engine.formats.safetensors_header import Header, read_header
from service.engine.formats.weights import INDEX_SUFFIX, WEIGHTS_SUFFIX, read_json_object
from service.engine.tensors import FLOAT_DTYPES, Array, CodeArray, TensorInfo
from service.errors import ArrowQuantError, CorruptModel
from service.storage.model_files import ModelFiles, OpenFile


class SafetensorsFormat(Format):
    """Plain floating-point weights in safetensors files."""

    id: ClassVar[str] = "safetensors"
    description: ClassVar[str] = "safetensors: a file, a sharded index, or a model folder"
    can_read: ClassVar[bool] = True

    @classmethod
    def recognizes(cls, source: ModelFiles) -> bool:
        """Files by their name; folders unless their config says that they are quantized."""
        if source.entry is not None:
            return source.name.endswith((WEIGHTS_SUFFIX, INDEX_SUFFIX))
        names = source.names_in(weights_folder(source))
        return any(n.endswith((WEIGHTS_SUFFIX, INDEX_SUFFIX)) for n in names) and not quantization_config(source)

    @classmethod
    def open(cls, source: ModelFiles) -> ModelReader:
        """See `Format.open`."""
        return SafetensorsReader(find_placement(source))


def quantization_config(source: ModelFiles) -> dict[str, object]:
    """The `quantization_config` of the folder's config.json, `{}` where there is none that can be read."""
    try:
        config = read_json_object(source, weights_folder(source) / "config.json").get("quantization_config")
    except ArrowQuantError:
        return {}  # `open` says what is wrong with it
    return config if isinstance(config, dict) else {}


class WeightFiles:
    """The open safetensors files of a model, with their tensors as stored."""

    def __init__(self, placement: Placement) -> None:
        self._files: dict[PurePosixPath, OpenFile] = {}
        self.headers: dict[PurePosixPath, Header] = {}
        try:
            for name in placement.weights:
                self._files[name] = placement.source.open(name)
                self.headers[name] = read_header(self._files[name])
            self.tensors = _join(self.headers)
            self.warnings = tuple(_check_index(placement, self.tensors))
        except BaseException:
            self.close()
            raise

    @property
    def metadata(self) -> dict[str, str]:
        """`__metadata__` of all files together."""
        return {k: v for header in self.headers.values() for k, v in header.metadata.items()}

    @property
    def stamps(self) -> list[tuple[PurePosixPath, int, bytes]]:
        """(file, size, header) of each, for the fingerprint."""
        return [(name, self._files[name].size, header.json) for name, header in self.headers.items()]

    def read(self, info: TensorInfo, start: int, stop: int) -> CodeArray:
        """Bytes start to stop of a stored tensor, in memory of their own."""
        if not 0 <= start <= stop <= info.nbytes:
            raise ValueError(f"bytes {start} to {stop} of {info.name!r}, which has {info.nbytes}")
        return self._files[info.file].read(info.offset + start, stop - start)

    def read_all(self, infos: Sequence[TensorInfo]) -> list[memoryview]:
        """All bytes of some stored tensors; those that lie behind each other are read together."""
        found: list[memoryview] = []
        while rest := infos[len(found) :]:
            first, end = rest[0], rest[0].offset
            together = 0
            for info in rest:
                if info.file != first.file or info.offset != end:
                    break
                end += info.nbytes
                together += 1
            data = self._files[first.file].read(first.offset, end - first.offset).data
            found += [data[i.offset - first.offset :][: i.nbytes] for i in rest[:together]]
        return found

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()


class SafetensorsReader(ModelReader):
    """Tensors as they are stored."""

    format_id: ClassVar[str] = SafetensorsFormat.id

    def __init__(self, placement: Placement) -> None:
        self._weights = WeightFiles(placement)
        self.tensors = tuple(self._weights.tensors.values())
        self.files = placement.files
        self.layout = placement.layout(
            self.tensors, self._weights.stamps, self._weights.metadata, self._weights.warnings
        )

    def rows(self, info: TensorInfo, start: int, stop: int) -> Array:
        """See `ModelReader.rows`."""
        dtype = FLOAT_DTYPES[info.dtype]
        width = info.cols * dtype.itemsize
        data = self._weights.read(info, start * width, stop * width)
        return data.view(dtype).reshape(stop - start, info.cols)

    def raw(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """See `ModelReader.raw`."""
        return self._weights.read(info, start, stop).data

    def raws(self, infos: Sequence[TensorInfo]) -> list[memoryview]:
        """See `ModelReader.raws`."""
        return self._weights.read_all(infos)

    def close(self) -> None:
        """See `ModelReader.close`."""
        self._weights.close()


def _join(headers: dict[PurePosixPath, Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, header in headers.items():
        for tensor in header.tensors:
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CorruptModel(f"Tensor {tensor.name!r} is in {other.file} and in {name}.", tensor=tensor.name)
    return tensors


def _check_index(placement: Placement, tensors: dict[str, TensorInfo]) -> Iterable[str]:
    """Raises CorruptModel where the index and the files disagree; yields what is only odd."""
    for tensor, file in placement.weight_map.items():
        found = tensors.get(tensor)
        if found is None or found.file != file:
            raise CorruptModel(f"Tensor {tensor!r} is not in {file}, where {placement.index} has it.", tensor=tensor)
    if placement.index is not None:
        for tensor in tensors.keys() - placement.weight_map.keys():
            yield f"{tensor!r} is in {tensors[tensor].file} but not in {placement.index}"
