"""What a format is: a way for a model's tensors to lie in files, with a reader, a writer or both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from service.engine.beside import Beside
from service.engine.metrics import Quality
from service.engine.schemes.base import Scheme
from service.engine.tensors import Array, QuantizedRows, TensorInfo
from service.errors import UnsupportedByFormat, UnsupportedModel
from service.storage.model_files import Identity, ModelFiles

Cancelled = Callable[[], bool]


class FormatOptions(BaseModel):
    """What a format can be told beside the configuration; a format with choices defines its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """How a model lies in its files, as far as an output has to look like it.

    `source` are its files, by whose names everything goes. `weights_dir` is the folder of the weights,
    relative to the root (`.`; `transformer` of a diffusers pipeline); `stem` the name of its weight
    file without suffix (`model`, `diffusion_pytorch_model`). `companions` are all other files of the
    folder that go along, relative to the root. `config` is the `config.json` in `weights_dir`, `{}`
    if there is none.
    `identities` tells whether a companion is still what it was when the model was opened.
    `fingerprint` is a SHA-256 over headers and sizes: two copies of a model have the same.
    """

    source: ModelFiles
    weights_dir: PurePosixPath
    stem: str
    companions: tuple[PurePosixPath, ...]
    config: dict[str, Any]
    modality: str
    is_diffusion: bool
    fingerprint: str
    modality_from: str = "default"  # where the modality was found
    tensor_count: int = 0
    name_bytes: int = 0  # of all tensor names together, as JSON
    warnings: tuple[str, ...] = ()
    identities: Mapping[PurePosixPath, Identity] = field(default_factory=dict)


class ModelReader(ABC):
    """An open model. Reads are positioned, so threads may share it.

    Every read raises SourceChanged when the file was replaced, shortened or removed meanwhile.
    """

    format_id: ClassVar[str]
    layout: ModelLayout
    #: Every file that belongs to the model, companions included, by its name in `layout.source`.
    files: tuple[PurePosixPath, ...]
    #: In model order.
    tensors: tuple[TensorInfo, ...]

    @abstractmethod
    def rows(self, info: TensorInfo, start: int, stop: int) -> Array:
        """Rows start to stop of the tensor as a matrix (rows, cols), in its float dtype.

        A quantized tensor is dequantized to float32. Only for tensors with `is_float`.
        """

    @abstractmethod
    def raw(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """Stored bytes start to stop of a tensor that is not quantized."""

    def raws(self, infos: Sequence[TensorInfo]) -> list[memoryview]:
        """All stored bytes of some tensors, none of which is quantized, as `raw` gives them."""
        return [self.raw(info, 0, info.nbytes) for info in infos]

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    def identity(self) -> list[list[int | str]]:
        """What has to be the same of all files, for a run to go on from what another one did with them."""
        return [[str(name), *self.layout.source.identity(name)] for name in self.files]

    def find(self, name: str) -> TensorInfo | None:
        """The tensor of this name."""
        return next((t for t in self.tensors if t.name == name), None)


@dataclass(frozen=True, slots=True)
class WriterContext:
    """What a writer knows of the job; nothing in it may differ between two runs of the same job."""

    layout: ModelLayout
    config: dict[str, Any]  # the resolved configuration, as JSON
    options: FormatOptions
    service_version: str


class ModelWriter(ABC):
    """Writes one output folder, tensor by tensor, rows in order; one thread at a time.

    begin, then write_rows or write_raw until all is there, then commit, or abandon to do the
    tensor again. After a commit `state` says all that `restore` needs to go on from there in
    another process, on the files that this one left: bytes may be held back until it is asked.
    The bytes written depend on the calls alone: no times, no ids, no names of folders.
    """

    def __init__(self, folder: Path, context: WriterContext) -> None:
        self.folder = folder
        self.context = context

    @abstractmethod
    def begin(self, info: TensorInfo, scheme: Scheme | None, beside: Beside | None = None) -> None:
        """The next tensor, in this scheme, or copied byte for byte when it is None.

        `beside` has parts that the format keeps.
        """

    @abstractmethod
    def write_rows(self, rows: QuantizedRows) -> None:
        """The next rows of the tensor begun."""

    @abstractmethod
    def write_raw(self, data: memoryview) -> None:
        """The next bytes of the tensor begun."""

    @abstractmethod
    def commit(self, quality: Quality | None) -> int:
        """The tensor is whole; the bytes it takes. `quality` is None for copies."""

    @abstractmethod
    def abandon(self) -> None:
        """Forget the tensor begun, as if `begin` had not been called."""

    def copy_all(self, infos: Sequence[TensorInfo], data: Sequence[memoryview]) -> list[int]:
        """`begin`, `write_raw` and `commit` for small tensors that are copied, `data` being all bytes of each."""
        stored = []
        for info, raw in zip(infos, data, strict=True):
            self.begin(info, None)
            self.write_raw(raw)
            stored.append(self.commit(None))
        return stored

    def store_all(self, tensors: Sequence[tuple[TensorInfo, QuantizedRows]]) -> list[int]:
        """`begin`, `write_rows` and `commit` for small tensors that are quantized in one scheme, given all rows."""
        stored = []
        for info, rows in tensors:
            self.begin(info, rows.scheme)
            self.write_rows(rows)
            stored.append(self.commit(Quality.of(rows.errors, rows.scheme.stored_bytes(info.rows, info.cols))))
        return stored

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """JSON for `restore`, as of the last commit; small: what changed since the last call may be enough."""

    @abstractmethod
    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on behind the last of `states`, all that `state` returned in order; cut off what came after."""

    def expect(self, tensors: Sequence[tuple[TensorInfo, Scheme | None]]) -> None:  # noqa: B027 - most need not know
        """What will be begun from here on, unless one is abandoned; nothing that is written depends on it."""

    def digest(self, path: Path, advance: Callable[[int], None]) -> str | None:
        """The SHA-256 in hexadecimal of a file that `close` has completed, if it was made on the way, or None.

        `advance` is called with bytes just hashed; what it raises comes through.
        """
        del path, advance
        return None

    @abstractmethod
    def close(self, cancelled: Cancelled) -> None:
        """Write headers, indexes and metadata, and drop auxiliary files. Returns early when `cancelled`.

        Afterwards the folder holds just what belongs to the output; the pipeline adds the
        companions whose names are still free, syncs, hashes and publishes. May be called again
        after a `restore`, when an earlier call was cut short.
        """

    def remarks(self) -> list[str]:
        """What users of the closed output should know that hardly follows from what they asked for; sentences."""
        return []

    @abstractmethod
    def discard(self) -> None:
        """Close the files without finishing them."""


class Format(ABC):
    """A format by its public id; also the module's name, with `-` as `_`."""

    id: ClassVar[str]
    description: ClassVar[str]
    can_read: ClassVar[bool] = False
    can_write: ClassVar[bool] = False
    options: ClassVar[type[FormatOptions]] = FormatOptions
    #: Whether a row may end in a group shorter than the others.
    short_groups: ClassVar[bool] = False
    #: Whether weights go without zero points unless a request says otherwise.
    prefers_symmetric: ClassVar[bool] = False
    #: Whether its loaders stack layers, whose weights have to be stored alike.
    fuses: ClassVar[bool] = False
    #: The parts of `Beside` that it keeps.
    keeps: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def recognizes(cls, source: ModelFiles) -> bool:
        """Whether `open` should be tried on this file or folder. Cheap; never raises for strange content."""
        del source
        return False

    @classmethod
    def open(cls, source: ModelFiles) -> ModelReader:
        """Open a model for reading; raises the ModelErrors, PickledWeights or UnsupportedModel."""
        del source
        raise UnsupportedModel(f"The format {cls.id} can be written but not read.")

    @classmethod
    def refuses_scheme(cls, scheme: Scheme, options: FormatOptions) -> str | None:
        """Why no tensor can be held in this scheme (the request is then refused), or None."""
        del scheme, options
        return f"the format {cls.id} can be read but not written"

    @classmethod
    def refuses_tensor(cls, info: TensorInfo, scheme: Scheme) -> str | None:
        """Why this tensor is copied although it could be quantized, or None."""
        del info, scheme
        return None

    @classmethod
    def stored_bytes(cls, info: TensorInfo, scheme: Scheme, options: FormatOptions) -> int:
        """What the tensor takes in this scheme, as a writer's `commit` will tell."""
        del options
        return scheme.stored_bytes(info.rows, info.cols)

    @classmethod
    def reading_bytes(cls, info: TensorInfo, nbytes: int) -> int:
        """What a reader holds of memory while it gives so many bytes of a tensor, these included."""
        del info
        return nbytes

    @classmethod
    def writing_bytes(cls, rows: int, cols: int, bits: int) -> int:
        """What a writer holds while it takes rows of codes, beside these."""
        del rows, cols, bits
        return 0

    @classmethod
    def writer(cls, folder: Path, context: WriterContext) -> ModelWriter:
        """A writer into an existing, empty folder (or one to `restore`)."""
        del folder, context
        raise UnsupportedByFormat(f"The format {cls.id} can be read but not written.")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A finished file of an output."""

    path: PurePosixPath
    size_bytes: int
    sha256: str
    media_type: str = field(default="application/octet-stream")
