"""Where in a folder a model's weights lie, and what else belongs to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring
from pathlib import Path, PurePosixPath
from typing import Any

from service.engine.formats.base import ModelLayout
from service.engine.formats.modality import find_modality
from service.engine.formats.source import LocalFiles
from service.engine.formats.weights import (
    ANY_INDEX,
    INDEX_SUFFIX,
    MANIFEST,
    WEIGHTS_SUFFIX,
    Weights,
    choose_weights,
    read_index,
    read_json_object,
    weights_of_index,
)
from service.engine.tensors import TensorInfo
from service.errors import ModelNotFound, PickledWeights
from service.storage.model_files import ModelFiles

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".ckpt", ".pth"})
#: Weights that are neither read nor carried along.
OTHER_WEIGHT_SUFFIXES = PICKLE_SUFFIXES | {".h5", ".msgpack", ".onnx", ".gguf", ".ot"}
#: What outputs hold their weights in: a reader would take any such file beside them for one of theirs.
WRITTEN_SUFFIXES = frozenset({WEIGHTS_SUFFIX, ".parquet"})
METADATA = PurePosixPath("metadata.json")
PIPELINE_FILE = "model_index.json"
DENOISERS = ("transformer", "unet")

HOW_TO_CONVERT = (
    "Pickled weights are never loaded. Convert them where you trust them: "
    '`safetensors.torch.save_file(torch.load(path, weights_only=True), "model.safetensors")`.'
)


@dataclass(frozen=True, slots=True)
class Placement:
    """A model before its weights are opened; all names are those of `source`.

    `index` is a file that maps tensors to weight files, `weight_map` what it says; without one,
    all of `weights` are read. `pipeline` is `model_index.json` where the weights are those of a denoiser.
    """

    source: ModelFiles
    weights_dir: PurePosixPath
    stem: str
    weights: tuple[PurePosixPath, ...]
    index: PurePosixPath | None
    weight_map: Mapping[str, PurePosixPath]
    companions: tuple[PurePosixPath, ...]
    config: dict[str, Any]
    stated: dict[str, Any]  # metadata.json
    pipeline: dict[str, Any] | None
    warnings: tuple[str, ...]

    @property
    def files(self) -> tuple[PurePosixPath, ...]:
        """Everything that is read or copied."""
        return (*self.weights, *((self.index,) if self.index else ()), *self.companions)

    def layout(
        self,
        tensors: Iterable[TensorInfo],
        headers: Iterable[tuple[PurePosixPath, int, bytes]],
        metadata: Mapping[str, str],
        warnings: Iterable[str] = (),
    ) -> ModelLayout:
        """The layout, now that the headers, (file, file size, header), are known."""
        names = [t.name for t in tensors]
        modality = find_modality(self.stated, self.config, metadata, names, self.pipeline)
        return ModelLayout(
            source=self.source,
            weights_dir=self.weights_dir,
            stem=self.stem,
            companions=self.companions,
            identities={name: self.source.identity(name) for name in self.companions},
            config=self.config,
            modality=modality.name,
            is_diffusion=modality.is_diffusion,
            fingerprint=_fingerprint(headers),
            modality_from=modality.found_in,
            tensor_count=len(names),
            name_bytes=len("".join(map(encode_basestring, names)).encode()),
            warnings=(*self.warnings, *warnings),
        )


def files_under(path: Path) -> Iterator[Path]:
    """Every file that opening or copying the model at `path` may touch, found without reading weights.

    Links are listed and not resolved, nor asked whether they lead anywhere: whoever has rules about
    them resolves and checks each. Raises CorruptModel or ForbiddenPath for an index.
    """
    if path.is_dir():
        yield from (path / name for name in LocalFiles(path).list().files)
        return
    yield path
    if path.name.endswith(INDEX_SUFFIX):
        yield from (path.parent / name for name in read_index(LocalFiles(path), PurePosixPath(path.name)).files)


def find_placement(source: ModelFiles, suffix: str = WEIGHTS_SUFFIX) -> Placement:
    """How the model of these files lies, its weight files ending in `suffix`.

    Raises ModelNotFound, PickledWeights, ForbiddenPath or CorruptModel.
    """
    name = source.entry
    if name is None:
        return _folder(source, suffix)
    if not source.has(name):
        raise ModelNotFound("There is no model at this address.")
    if name.suffix in PICKLE_SUFFIXES:
        raise PickledWeights(f"{name} is pickled. {HOW_TO_CONVERT}")
    weights = weights_of_index(source, name) if name.name.endswith(INDEX_SUFFIX) else Weights((name,))
    return Placement(
        source=source,
        weights_dir=PurePosixPath("."),
        stem=_stem(name.name, suffix),
        weights=weights.files,
        index=weights.index,
        weight_map=weights.weight_map,
        companions=(),
        config={},
        stated={},
        pipeline=None,
        warnings=(),
    )


def weights_folder(source: ModelFiles) -> PurePosixPath:
    """Where in a model folder the weights are: the denoiser's folder of a pipeline, else the root."""
    if source.has(PurePosixPath(PIPELINE_FILE)):
        for name in DENOISERS:
            if source.has_folder(PurePosixPath(name)):
                return PurePosixPath(name)
    return PurePosixPath(".")


def _folder(source: ModelFiles, suffix: str) -> Placement:
    weights_dir = weights_folder(source)
    walked = source.list()
    here = [name for name in walked.files if name.parent == weights_dir]
    weights = choose_weights(source, here, suffix)
    if not weights.files:
        _raise_no_weights(weights_dir, here, suffix)
    taken = {*weights.files, weights.index}
    left_out = {n: why for n in walked.files if n not in taken and (why := _why_left_out(n, weights_dir))}
    stated = read_json_object(source, METADATA)
    return Placement(
        source=source,
        weights_dir=weights_dir,
        stem=_stem((weights.index or weights.files[0]).name, suffix),
        weights=weights.files,
        index=weights.index,
        weight_map=weights.weight_map,
        companions=tuple(n for n in walked.files if n not in taken and n not in left_out),
        config=read_json_object(source, weights_dir / "config.json"),
        stated=stated,
        pipeline=read_json_object(source, PurePosixPath(PIPELINE_FILE)) if weights_dir.name else None,
        warnings=(
            *walked.warnings,
            *(f"{name} {why}" for name, why in left_out.items()),
            *((f"{METADATA} goes along only with outputs that have none of their own",) if stated else ()),
        ),
    )


def _why_left_out(name: PurePosixPath, weights_dir: PurePosixPath) -> str | None:
    """Why a file that is not read does not go along, or None when it does."""
    if name == PurePosixPath(MANIFEST):
        return "is left out: every output has one of its own"
    if name.suffix in OTHER_WEIGHT_SUFFIXES:
        return "holds weights that are neither read nor copied"
    if name.parent != weights_dir:
        return None
    if name.name.endswith(WEIGHTS_SUFFIX):
        return "holds weights that are neither read nor copied"
    if ANY_INDEX.search(name.name):
        return "lists weights that are neither read nor copied"
    return "is left out: it would be taken for weights" if name.suffix in WRITTEN_SUFFIXES else None


def _raise_no_weights(weights_dir: PurePosixPath, here: list[PurePosixPath], suffix: str) -> None:
    pickled = [n.name for n in here if n.suffix in PICKLE_SUFFIXES]
    if pickled:
        raise PickledWeights(f"The model has only pickled weights ({', '.join(pickled[:3])}). {HOW_TO_CONVERT}")
    where = "the folder" if weights_dir == PurePosixPath(".") else f"{weights_dir}/"
    raise ModelNotFound(f"There is no `*{suffix}` in {where}.")


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
