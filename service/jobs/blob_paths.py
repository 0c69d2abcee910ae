"""Which paths the files of an uploaded model may have: those that lead nowhere but into their own folder."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255


def check_path(path: str) -> str:
    """The path as it is; raises ValueError unless it is relative, plain and visible."""
    if len(path.encode(errors="replace")) > MAX_PATH_BYTES:
        raise ValueError(f"is longer than {MAX_PATH_BYTES} bytes")
    if not path.isprintable() or "\\" in path:
        raise ValueError("holds a backslash or a character that cannot be printed")
    if unicodedata.normalize("NFC", path) != path:
        raise ValueError("is not in Unicode's normal form NFC")
    for name in path.split("/"):
        _check_name(name)
    return path


def check_together(paths: Iterable[str]) -> None:
    """Raise ValueError when two paths are one on some file system, or one lies in another that is a file."""
    seen: dict[str, str] = {}
    for path in paths:
        key = unicodedata.normalize("NFC", path.casefold())
        if key in seen:
            raise ValueError(f"{path!r} and {seen[key]!r} are the same file where letter case is not told apart")
        seen[key] = path
    for key, path in seen.items():
        parts = key.split("/")
        for count in range(1, len(parts)):
            if above := seen.get("/".join(parts[:count])):
                raise ValueError(f"{above!r} is a file, so {path!r} cannot lie in it")


def _check_name(name: str) -> None:
    if name.startswith(".") or not name:
        raise ValueError("has to be relative, without empty parts, and without any that begin with a dot")
    if name != name.strip() or name.endswith("."):
        raise ValueError("has a part that begins or ends with a blank, or ends with a dot")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"has a part longer than {MAX_NAME_BYTES} bytes")
