"""Where in a folder a model's weights lie, and what else belongs to it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from service.engine.formats.base import ModelLayout
from service.engine.formats.modality import find_modality
from service.engine.formats.safetensors_header import parse_json
from service.engine.formats.source import SourceFile
from service.engine.tensors import TensorInfo
from service.errors import CorruptModel, ForbiddenPath, ModelNotFound, PickledWeights

WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".ckpt", ".pth"})
#: Weights that are neither read nor carried along.
OTHER_WEIGHT_SUFFIXES = PICKLE_SUFFIXES | {".h5", ".msgpack", ".onnx", ".gguf", ".ot"}
PIPELINE_FILE = "model_index.json"
DENOISERS = ("transformer", "unet")
MAX_JSON_BYTES = 100_000_000

HOW_TO_CONVERT = (
    "Pickled weights are never loaded. Convert them where you trust them: "
    '`safetensors.torch.save_file(torch.load(path, weights_only=True), "model.safetensors")`.'
)


@dataclass(frozen=True, slots=True)
class Placement:
    """A model on disk before its weights are opened; all paths relative to `root`.

    `index` is a file that maps tensors to weight files, `weight_map` what it says; without one,
    all of `weights` are read.
    """

    root: Path
    weights_dir: PurePosixPath
    stem: str
    weights: tuple[PurePosixPath, ...]
    index: PurePosixPath | None
    weight_map: Mapping[str, PurePosixPath]
    companions: tuple[PurePosixPath, ...]
    config: dict[str, Any]
    stated: dict[str, Any]  # metadata.json
    warnings: tuple[str, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that is read or copied, as absolute paths."""
        names = (*self.weights, *((self.index,) if self.index else ()), *self.companions)
        return tuple(self.root / name for name in names)

    def layout(
        self,
        tensors: Iterable[TensorInfo],
        headers: Iterable[tuple[PurePosixPath, int, bytes]],
        metadata: Mapping[str, str],
        warnings: Iterable[str] = (),
    ) -> ModelLayout:
        """The layout, now that the headers, (file, file size, header), are known."""
        names = [t.name for t in tensors]
        modality = find_modality(self.stated, self.config, metadata, names)
        return ModelLayout(
            root=self.root,
            weights_dir=self.weights_dir,
            stem=self.stem,
            companions=self.companions,
            config=self.config,
            modality=modality.name,
            is_diffusion=modality.is_diffusion,
            fingerprint=_fingerprint(headers),
            modality_from=modality.found_in,
            tensor_count=len(names),
            name_bytes=sum(len(json.dumps(name, ensure_ascii=False).encode()) for name in names),
            warnings=(*self.warnings, *warnings),
        )


def files_under(path: Path) -> Iterator[Path]:
    """Every file that opening or copying the model at `path` may touch, found without reading weights.

    Links are listed and not resolved: whoever has rules about them resolves and checks each. Linked
    folders are not entered by anything here.
    """
    if path.is_dir():
        yield from (path / name for name in _walk(path))
        return
    yield path
    if path.name.endswith(INDEX_SUFFIX):
        yield from sorted(p for p in path.parent.iterdir() if p.name.endswith(WEIGHTS_SUFFIX))


def find_placement(path: Path, suffix: str = WEIGHTS_SUFFIX) -> Placement:
    """How the model at this file or folder lies, its weight files ending in `suffix`.

    Raises ModelNotFound, PickledWeights, ForbiddenPath or CorruptModel.
    """
    if path.is_dir():
        return _folder(path, suffix)
    if not path.is_file():
        raise ModelNotFound("There is no model at this address.")
    name = PurePosixPath(path.name)
    if path.suffix in PICKLE_SUFFIXES:
        raise PickledWeights(f"{name} is pickled. {HOW_TO_CONVERT}")
    index = name if path.name.endswith(INDEX_SUFFIX) else None
    weight_map = _read_index(path.parent, name) if index else {}
    return Placement(
        root=path.parent,
        weights_dir=PurePosixPath("."),
        stem=_stem(path.name, suffix),
        weights=tuple(sorted(set(weight_map.values()))) if index else (name,),
        index=index,
        weight_map=weight_map,
        companions=(),
        config={},
        stated={},
        warnings=(),
    )


def weights_folder(root: Path) -> PurePosixPath:
    """Where in a model folder the weights are: the denoiser's folder of a pipeline, else the root."""
    if (root / PIPELINE_FILE).is_file():
        for name in DENOISERS:
            if (root / name).is_dir():
                return PurePosixPath(name)
    return PurePosixPath(".")


def read_json_object(root: Path, name: PurePosixPath) -> dict[str, Any]:
    """A JSON object of the model, `{}` when the file is not there; raises CorruptModel for anything else."""
    if not (root / name).is_file():
        return {}
    file = SourceFile(root, name)
    try:
        if file.size > MAX_JSON_BYTES:
            raise CorruptModel(f"{name} has {file.size} bytes; at most {MAX_JSON_BYTES} are read.")
        value = parse_json(file.read(0, file.size).tobytes(), name)
    finally:
        file.close()
    if not isinstance(value, dict):
        raise CorruptModel(f"{name} is damaged: it holds no JSON object.")
    return value


def _folder(root: Path, suffix: str) -> Placement:
    weights_dir = weights_folder(root)
    names = list(_walk(root))
    here = [name for name in names if name.parent == weights_dir]
    index = next((n for n in here if suffix == WEIGHTS_SUFFIX and n.name.endswith(INDEX_SUFFIX)), None)
    weight_map = _read_index(root, index) if index else {}
    weights = sorted(set(weight_map.values())) if index else [n for n in here if n.name.endswith(suffix)]
    if not weights:
        _raise_no_weights(weights_dir, here, suffix)
    taken = {*weights, *(n for n in here if n.name.endswith((suffix, INDEX_SUFFIX)))}
    skipped = [n for n in names if n.suffix in OTHER_WEIGHT_SUFFIXES or (n in taken and n not in {*weights, index})]
    return Placement(
        root=root,
        weights_dir=weights_dir,
        stem=_stem((index or weights[0]).name, suffix),
        weights=tuple(weights),
        index=index,
        weight_map=weight_map,
        companions=tuple(n for n in names if n not in taken and n not in set(skipped)),
        config=read_json_object(root, weights_dir / "config.json"),
        stated=read_json_object(root, PurePosixPath("metadata.json")),
        warnings=tuple(f"{n} holds weights that are neither read nor copied" for n in skipped),
    )


def _walk(root: Path) -> Iterator[PurePosixPath]:
    """Regular files, and links to such, sorted; hidden ones and what lies in hidden or linked folders left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        base = Path(folder)
        yield from (
            PurePosixPath((base / name).relative_to(root).as_posix())
            for name in sorted(files)
            if not name.startswith(".") and (base / name).is_file()
        )


def _raise_no_weights(weights_dir: PurePosixPath, here: list[PurePosixPath], suffix: str) -> None:
    pickled = [n.name for n in here if n.suffix in PICKLE_SUFFIXES]
    if pickled:
        raise PickledWeights(f"The model has only pickled weights ({', '.join(pickled[:3])}). {HOW_TO_CONVERT}")
    where = "the folder" if weights_dir == PurePosixPath(".") else f"{weights_dir}/"
    raise ModelNotFound(f"There is no `*{suffix}` in {where}.")


def _read_index(root: Path, index: PurePosixPath) -> dict[str, PurePosixPath]:
    weight_map = read_json_object(root, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptModel(f"{index} is damaged: it has no `weight_map`.")
    names: dict[str, PurePosixPath] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(WEIGHTS_SUFFIX) or "\0" in shard:
            raise CorruptModel(
                f"{index} is damaged: tensor {tensor!r} is in no `*{WEIGHTS_SUFFIX}` file.", tensor=tensor
            )
        inner = PurePosixPath(shard)
        if inner.is_absolute() or ".." in inner.parts or "\\" in shard:
            raise ForbiddenPath(
                f"{index} names the file of tensor {tensor!r} outside the model's folder.", tensor=tensor
            )
        names[tensor] = index.parent / inner
    for shard_name in sorted(set(names.values())):
        if not (root / shard_name).is_file():
            raise CorruptModel(f"{index} names {shard_name}, which is not there. Fetch the model again.")
    return names


def _stem(name: str, suffix: str) -> str:
    """`model` of model.safetensors, model.safetensors.index.json and model-00001-of-00002.safetensors."""
    stem = name.removesuffix(".index.json").removesuffix(suffix)
    head, _, tail = stem.partition("-0")
    return head if head and tail.replace("-of-", "").isdigit() else stem


def _fingerprint(headers: Iterable[tuple[PurePosixPath, int, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, size, header in sorted(headers):
        digest.update(json.dumps([str(name), size, len(header)]).encode())
        digest.update(header)
    return digest.hexdigest()
