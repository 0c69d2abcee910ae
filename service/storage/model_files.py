"""What a reader sees of a model's files, wherever they lie: their names, who they are, and positioned reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

#: What changes when a file is replaced or written to; goes into the journal of a run as JSON.
Identity: TypeAlias = tuple[int | str, ...]
Bytes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a folder with all below it, relative to it, sorted; `warnings` of what was left out."""

    files: Sequence[PurePosixPath]
    warnings: Sequence[str] = ()


class OpenFile(ABC):
    """A file open for reading. `name`, relative to the model's root, is all that errors tell of where it lies."""

    name: PurePosixPath

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the file when it was opened."""

    @abstractmethod
    def read(self, offset: int, count: int) -> Bytes:
        """`count` bytes from `offset` on, in memory of their own; threads may read at once.

        Raises SourceChanged when it is no longer the file that was opened, StorageFailure, or Cancelled.
        """

    @abstractmethod
    def check(self) -> None:
        """Raise SourceChanged when the file is no longer the one that was opened."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; may be called twice."""


class ModelFiles(ABC):
    """The files at an address, by names relative to their root."""

    #: The last part of the address; all that errors tell of it.
    name: str
    #: The file that the address names; None when it is that of a folder.
    entry: PurePosixPath | None

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is anything at the address."""

    @abstractmethod
    def list(self) -> Listing:
        """Every regular file of the folder; hidden ones are passed over. Raises UnsupportedModel for too many."""

    @abstractmethod
    def names_in(self, folder: PurePosixPath) -> Sequence[str]:
        """The names of what lies directly in a folder that `has_folder` knows."""

    @abstractmethod
    def has(self, name: PurePosixPath) -> bool:
        """Whether there is a regular file of this name."""

    @abstractmethod
    def has_folder(self, name: PurePosixPath) -> bool:
        """Whether there is a folder of this name."""

    @abstractmethod
    def size(self, name: PurePosixPath) -> int:
        """Bytes of a file."""

    @abstractmethod
    def identity(self, name: PurePosixPath) -> Identity:
        """Who a file is now, or was when the address was looked at."""

    @abstractmethod
    def open(self, name: PurePosixPath, expected: Identity | None = None) -> OpenFile:
        """Raises SourceChanged when it is another file than `expected`, ModelNotFound or StorageFailure."""

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of what is held; open files are of no use afterwards."""
