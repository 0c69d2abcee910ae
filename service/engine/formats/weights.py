"""Which files of a model folder hold its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from service.engine.formats.safetensors_header import parse_json
from service.errors import CorruptModel, ForbiddenPath
from service.storage.model_files import ModelFiles

WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
#: Of one variant, such as `diffusion_pytorch_model.safetensors.index.fp16.json`, too.
ANY_INDEX = re.compile(r"\.safetensors\.index(\.[^.]+)?\.json")
#: What libraries save under. Files beside them are variants (`model.fp16`), or weights of something else (adapters).
CANONICAL_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
#: Lists the files of an output; every output has one, in its topmost folder.
MANIFEST = "manifest.json"
MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Weights:
    """Files relative to the model's root; `index` is the one that maps tensors to them, `weight_map` what it says."""

    files: tuple[PurePosixPath, ...]
    index: PurePosixPath | None = None
    weight_map: Mapping[str, PurePosixPath] = field(default_factory=dict)


def choose_weights(files: ModelFiles, here: Sequence[PurePosixPath], suffix: str) -> Weights:
    """The weights, of files that end in `suffix`, among those in one folder; raises CorruptModel or ForbiddenPath.

    What an index or a manifest names, else what has a canonical name, else all that there are.
    """
    found = tuple(name for name in here if name.name.endswith(suffix))
    if suffix != WEIGHTS_SUFFIX:
        return Weights(_of_manifest(files, found, suffix) or _canonical(found, suffix) or found)
    indexes = [name for name in here if name.name.endswith(INDEX_SUFFIX)]
    index = next((i for stem in CANONICAL_STEMS for i in indexes if i.name == stem + INDEX_SUFFIX), None)
    if index is not None:
        return weights_of_index(files, index)
    if canonical := _canonical(found, suffix):
        return Weights(canonical)
    return weights_of_index(files, indexes[0]) if indexes else Weights(found)


def weights_of_index(files: ModelFiles, index: PurePosixPath) -> Weights:
    """The files that an index names, all of them there; raises CorruptModel or ForbiddenPath."""
    weights = read_index(files, index)
    for shard in weights.files:
        if not files.has(shard):
            raise CorruptModel(f"{index} names {shard}, which is not there. Fetch the model again.")
    return weights


def read_index(files: ModelFiles, index: PurePosixPath) -> Weights:
    """The files that an index names, without a look at them; raises CorruptModel or ForbiddenPath."""
    weight_map = read_json_object(files, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptModel(f"{index} is damaged: it has no `weight_map`.")
    names = {tensor: _shard(index, tensor, shard) for tensor, shard in weight_map.items()}
    return Weights(tuple(sorted(set(names.values()))), index, names)


def read_json_object(files: ModelFiles, name: PurePosixPath) -> dict[str, Any]:
    """A JSON object of the model, `{}` when the file is not there; raises CorruptModel for anything else."""
    if not files.has(name):
        return {}
    file = files.open(name)
    try:
        if file.size > MAX_JSON_BYTES:
            raise CorruptModel(f"{name} has {file.size} bytes; at most {MAX_JSON_BYTES} are read.")
        value = parse_json(file.read(0, file.size).tobytes(), name)
    finally:
        file.close()
    if not isinstance(value, dict):
        raise CorruptModel(f"{name} is damaged: it holds no JSON object.")
    return value


def _shard(index: PurePosixPath, tensor: str, shard: Any) -> PurePosixPath:
    if not isinstance(shard, str) or not shard.endswith(WEIGHTS_SUFFIX) or "\0" in shard:
        raise CorruptModel(f"{index} is damaged: tensor {tensor!r} is in no `*{WEIGHTS_SUFFIX}` file.", tensor=tensor)
    inner = PurePosixPath(shard)
    if inner.is_absolute() or ".." in inner.parts or "\\" in shard:
        raise ForbiddenPath(f"{index} names the file of tensor {tensor!r} outside the model's folder.", tensor=tensor)
    return index.parent / inner


def _of_manifest(files: ModelFiles, found: tuple[PurePosixPath, ...], suffix: str) -> tuple[PurePosixPath, ...]:
    """Those that the manifest of an output lists; none when there is no such manifest."""
    manifest = read_json_object(files, PurePosixPath(MANIFEST))
    entries = manifest.get("files")
    if "source_fingerprint" not in manifest or not isinstance(entries, list) or not found:
        return ()
    folder = found[0].parent
    listed = {str(entry.get("path")) for entry in entries if isinstance(entry, dict)}
    named = {n for path in listed if (n := PurePosixPath(path)).parent == folder and n.name.endswith(suffix)}
    if missing := sorted(named.difference(found)):
        raise CorruptModel(f"{MANIFEST} names {missing[0]}, which is not there. Fetch the model again.")
    return tuple(sorted(named))


def _canonical(found: tuple[PurePosixPath, ...], suffix: str) -> tuple[PurePosixPath, ...]:
    """The single file or the numbered ones of the first stem that there is."""
    for stem in CANONICAL_STEMS:
        if single := tuple(n for n in found if n.name == stem + suffix):
            return single
        numbered = re.compile(rf"{stem}-\d{{5}}(-of-\d{{5}})?{re.escape(suffix)}")
        if shards := tuple(n for n in found if numbered.fullmatch(n.name)):
            return shards
    return ()
