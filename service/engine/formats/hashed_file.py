"""An append file whose SHA-256 is made while it grows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from service.engine.formats.append_file import AppendFile
from service.engine.formats.trailing_hash import TrailingHash


class HashedFile(AppendFile):
    """What is flushed is hashed in `thread`; once something that was hashed is cut off, nothing is any more."""

    def __init__(self, path: Path, thread: Executor) -> None:
        super().__init__(path)
        self._thread = thread
        self._hash: TrailingHash | None = None
        self._followed = 0
        self._lost = False
        self._sha256: str | None = None

    def flush(self) -> None:
        """See `AppendFile.flush`."""
        super().flush()
        if self.size > self._followed and not self._lost:
            if self._hash is None:
                self._hash = TrailingHash(self._path, b"", self._thread)
            self._followed = self.size
            self._hash.follow(self.size)

    def cut(self, size: int) -> None:
        """See `AppendFile.cut`."""
        if size < self._followed:
            self.forget_hash()
        super().cut(size)

    def remove(self) -> None:
        """See `AppendFile.remove`."""
        self.forget_hash()
        super().remove()

    def complete_hash(self) -> None:
        """The file is whole."""
        self._sha256 = self.digest(lambda _: None)
        self.forget_hash()

    def digest(self, advance: Callable[[int], None]) -> str | None:
        """The SHA-256 in hexadecimal of the file, which is whole, or None; `advance` is called with bytes hashed."""
        if self._sha256 is not None:
            advance(self.size)
            return self._sha256
        return None if self._hash is None else self._hash.finish(self.size, advance)

    def forget_hash(self) -> None:
        """Let go of what the hash was made with."""
        self._lost = True
        if self._hash is not None:
            self._hash.close()
            self._hash = None
