"""Writes compressed-tensors: codes, scales and zero points as tensors of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from service.engine.beside import Beside
from service.engine.formats.base import Cancelled, ModelWriter, WriterContext
from service.engine.formats.compressed_tensors_config import (
    GLOBAL,
    Group,
    Packing,
    parts_of,
    quantization_config,
    runs_in_bfloat16_only,
)
from service.engine.formats.compressed_tensors_parts import signed, stored_codes, stored_parts
from service.engine.formats.shard_layout import Parts, Region, header_reserve
from service.engine.formats.shards import ShardWriter
from service.engine.metrics import Quality
from service.engine.packing import WORD_BITS, pack_columns
from service.engine.schemes.base import Scheme
from service.engine.tensors import Array, CodeArray, QuantizedRows, TensorInfo
from service.errors import UnsupportedModel
from service.storage.faults import storage_faults

WEIGHT = ".weight"
MAX_PARTS = 4
METADATA = {"format": "pt"}
BFLOAT16_REMARK = (
    "config.json now has `dtype` bfloat16: transformers runs mixed schemes with mxfp4, mxfp8 or nvfp4 among them in"
    " bfloat16 only; with one scheme for all layers it runs them in any dtype"
)
#: Of tensors smaller than this on the average, headers take longer to foresee than files to hash.
FORESEEN_BYTES = 256 << 10


class CompressedTensorsWriter(ModelWriter):
    """See `ModelWriter`; `packing_of` chooses the packing of a scheme."""

    def __init__(
        self, folder: Path, context: WriterContext, packing_of: Callable[[Scheme], Packing], max_shard_bytes: int
    ) -> None:
        super().__init__(folder, context)
        self._packing_of = packing_of
        layout = context.layout
        self._folder = folder / layout.weights_dir
        with storage_faults("making the output's folder"):
            self._folder.mkdir(parents=True, exist_ok=True)
        reserve = header_reserve(layout.tensor_count, layout.name_bytes, MAX_PARTS)
        self._shards = ShardWriter(self._folder, layout.stem, reserve, max_shard_bytes)
        self._names: set[str] = set()
        self._modules: dict[str, Group] = {}
        self._untouched: list[str] = []
        # What `state` has not told yet: a model may have very many tensors, so nothing is looked through again.
        self._new_modules: list[list[Any]] = []
        self._new_untouched: list[str] = []
        self._tensor: _Copy | _Weight | None = None

    def expect(self, tensors: Sequence[tuple[TensorInfo, Scheme | None]]) -> None:
        """See `ModelWriter.expect`."""
        if sum(info.nbytes for info, _ in tensors) >= len(tensors) * FORESEEN_BYTES:
            self._shards.expect((self._parts(*tensor) for tensor in tensors), METADATA)

    def begin(self, info: TensorInfo, scheme: Scheme | None, beside: Beside | None = None) -> None:
        """See `ModelWriter.begin`."""
        assert beside is None, "the format keeps nothing beside"
        regions = self._shards.begin(self._parts(info, scheme))
        if scheme is None:
            self._tensor = _Copy(info, self._shards, regions[0])
        else:
            self._tensor = _Weight(info, scheme, self._packing_of(scheme), self._shards, regions)
        if twice := self._names.intersection(self._tensor.names):
            raise _named_twice(twice.pop(), info)

    def write_rows(self, rows: QuantizedRows) -> None:
        """See `ModelWriter.write_rows`."""
        assert isinstance(self._tensor, _Weight)
        self._tensor.write(rows)

    def write_raw(self, data: memoryview) -> None:
        """See `ModelWriter.write_raw`."""
        assert isinstance(self._tensor, _Copy)
        self._tensor.write(data)

    def commit(self, quality: Quality | None) -> int:
        """See `ModelWriter.commit`."""
        del quality
        tensor = self._tensor
        assert tensor is not None
        tensor.check_whole()
        module = tensor.info.name.removesuffix(WEIGHT)
        if isinstance(tensor, _Weight):
            group = self._modules[module] = Group.of(tensor.scheme, tensor.packing)
            self._new_modules.append([module, *_group_json(group)])
        elif tensor.info.name.endswith(WEIGHT) and len(tensor.info.shape) == 2:
            self._new_untouched.append(module)
        self._names.update(tensor.names)
        self._tensor = None
        return self._shards.commit()

    def copy_all(self, infos: Sequence[TensorInfo], data: Sequence[memoryview]) -> list[int]:
        """See `ModelWriter.copy_all`."""
        for info in infos:
            if info.name in self._names:
                raise _named_twice(info.name, info)
            self._names.add(info.name)
            if info.name.endswith(WEIGHT) and len(info.shape) == 2:
                self._new_untouched.append(info.name.removesuffix(WEIGHT))
        self._shards.put_all([self._parts(info, None) for info in infos], data)
        return [info.nbytes for info in infos]

    def store_all(self, tensors: Sequence[tuple[TensorInfo, QuantizedRows]]) -> list[int]:
        """See `ModelWriter.store_all`."""
        scheme = tensors[0][1].scheme
        packing = self._packing_of(scheme)
        group = Group.of(scheme, packing)
        described = _group_json(group)
        found = []
        for info, rows in tensors:
            module = info.name.removesuffix(WEIGHT)
            parts = parts_of(module, scheme, packing, rows.rows, rows.cols)
            for name, *_ in parts:
                if name in self._names:
                    raise _named_twice(name, info)
                self._names.add(name)
            self._modules[module] = group
            self._new_modules.append([module, *described])
            found.append(parts)
        self._shards.put_all(found, stored_parts([rows for _, rows in tensors], packing))
        return [sum([nbytes for *_, nbytes in parts]) for parts in found]

    def abandon(self) -> None:
        """See `ModelWriter.abandon`."""
        self._tensor = None
        self._shards.abandon()

    def state(self) -> dict[str, Any]:
        """See `ModelWriter.state`."""
        new = {"modules": self._new_modules, "untouched": self._new_untouched}
        self._untouched += self._new_untouched
        self._new_modules, self._new_untouched = [], []
        return self._shards.state() | new

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """See `ModelWriter.restore`."""
        self._shards.restore(states)
        self._modules = {name: Group(*group) for state in states for name, *group in state["modules"]}
        self._untouched = [name for state in states for name in state["untouched"]]
        self._new_modules, self._new_untouched = [], []
        self._names = {region.name for shard in self._shards.shards for region in shard.regions}
        self._tensor = None

    def close(self, cancelled: Cancelled) -> None:
        """See `ModelWriter.close`."""
        files = self._shards.finish(METADATA, cancelled)
        if not files:
            return
        with storage_faults("writing the index and the configuration"):
            if len(files) > 1:
                self._write_json(f"{self.context.layout.stem}.safetensors.index.json", self._index(files))
            if self._modules:
                untouched = self._untouched + self._new_untouched
                described = {"quantization_config": quantization_config(self._modules, untouched)}
                self._write_json("config.json", self.context.layout.config | described | self._dtype())

    def remarks(self) -> list[str]:
        """See `ModelWriter.remarks`."""
        return [BFLOAT16_REMARK] if self._dtype() else []

    def digest(self, path: Path, advance: Callable[[int], None]) -> str | None:
        """See `ModelWriter.digest`."""
        return self._shards.digest(path, advance)

    def discard(self) -> None:
        """See `ModelWriter.discard`."""
        self._shards.discard()

    def _parts(self, info: TensorInfo, scheme: Scheme | None) -> Parts:
        """The tensors that stand for this one."""
        if scheme is None:
            return [(info.name, info.dtype, info.shape, info.nbytes)]
        packing = self._packing_of(scheme)
        return parts_of(info.name.removesuffix(WEIGHT), scheme, packing, info.rows, info.cols)

    def _dtype(self) -> dict[str, str]:
        """What the model's configuration has to say in another way of the dtype that it is loaded in."""
        config = self.context.layout.config
        # Older configurations have the second name for it, which some loaders still look for.
        names = ["dtype", "torch_dtype"] if "torch_dtype" in config else ["dtype"]
        if not runs_in_bfloat16_only(set(self._modules.values())):
            return {}
        stated = config.get("dtype", config.get("torch_dtype"))
        return {} if stated == "bfloat16" else dict.fromkeys(names, "bfloat16")

    def _index(self, files: dict[str, list[str]]) -> dict[str, Any]:
        total = sum(shard.nbytes for shard in self._shards.shards)
        weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (self._folder / name).write_text(text, encoding="utf-8")


class _Copy:
    """A tensor written as it came."""

    def __init__(self, info: TensorInfo, shards: ShardWriter, region: Region) -> None:
        self.info = info
        self.names = [region.name]
        self._shards, self._region, self._done = shards, region, 0

    def write(self, data: memoryview) -> None:
        """The next bytes."""
        self._shards.write(self._region, self._done, data)
        self._done += data.nbytes

    def check_whole(self) -> None:
        """Raises ValueError when bytes are missing or too many."""
        if self._done != self._region.nbytes:
            raise ValueError(f"{self._done} of {self._region.nbytes} bytes of {self.info.name!r} were written")


class _Weight:
    """A weight in the making: rows arrive in order, and go to the places of its parts."""

    def __init__(
        self, info: TensorInfo, scheme: Scheme, packing: Packing, shards: ShardWriter, regions: list[Region]
    ) -> None:
        self.info, self.scheme, self.packing = info, scheme, packing
        self.names = [region.name for region in regions]
        self._shards = shards
        self._codes, self._scale = regions[0], regions[1]
        by_suffix = {region.name.rpartition(".")[2]: region for region in regions}
        self._zero = by_suffix.get("weight_zero_point")
        self._global = by_suffix.get(GLOBAL)
        self._pending = np.empty((0, scheme.groups(info.cols)), np.uint8)  # zero points short of a whole word
        self._zero_rows = 0
        self._rows = 0
        self._shape = by_suffix.get("weight_shape")

    def write(self, q: QuantizedRows) -> None:
        """The next rows."""
        self._put_rows(self._codes, self.info.rows, stored_codes(q, self.packing))
        if self.scheme.granularity != "tensor":
            row_bytes = self._scale.nbytes // self.scheme.scale_rows(self.info.rows)
            self._put(self._scale, self.scheme.scale_rows(self._rows) * row_bytes, q.scale)
        elif self._rows == 0:
            self._put(self._scale, 0, q.scale)
        if self._global is not None and self._rows == 0:
            self._put(self._global, 0, np.array([q.tensor_scale], "<f4"))
        if self._shape is not None and self._rows == 0:
            self._put(self._shape, 0, np.array([self.info.rows, self.info.cols], "<i8"))
        if self._zero is not None and q.zero_point is not None:
            self._write_zeros(self._zero, q.zero_point, self._rows + q.rows == self.info.rows)
        self._rows += q.rows

    def check_whole(self) -> None:
        """Raises ValueError when rows are missing or too many."""
        if self._rows != self.info.rows:
            raise ValueError(f"{self._rows} of {self.info.rows} rows of {self.info.name!r} were written")

    def _write_zeros(self, region: Region, zeros: CodeArray, last: bool) -> None:
        if self.scheme.granularity == "tensor":
            if self._rows == 0:
                self._put(region, 0, signed(zeros, self.scheme.bits))
        elif self.packing == "int-quantized":
            self._put_rows(region, self.info.rows, signed(zeros, self.scheme.bits))
        else:
            self._write_packed_zeros(region, zeros, last)

    def _write_packed_zeros(self, region: Region, zeros: CodeArray, last: bool) -> None:
        """Packed along the rows: 32 of them fill whole words, so what is over waits for the next block."""
        waiting = np.concatenate([self._pending, zeros]) if len(self._pending) else zeros
        ready = len(waiting) if last else len(waiting) // WORD_BITS * WORD_BITS
        if ready:
            words = pack_columns(waiting[:ready], self.scheme.bits)  # (words, groups)
            offset = self._zero_rows * self.scheme.bits // WORD_BITS * waiting.shape[1] * words.itemsize
            self._put(region, offset, words)
        self._zero_rows += ready
        self._pending = waiting[ready:]

    def _put_rows(self, region: Region, rows: int, data: Array) -> None:
        self._put(region, self._rows * (region.nbytes // rows), data)

    def _put(self, region: Region, offset: int, data: Array) -> None:
        self._shards.write(region, offset, np.ascontiguousarray(data).view(np.uint8).data)


def _named_twice(name: str, info: TensorInfo) -> UnsupportedModel:
    return UnsupportedModel(f"two tensors would be named {name!r} in the output", tensor=info.name)


def _group_json(group: Group) -> list[Any]:
    return list(astuple(group))
