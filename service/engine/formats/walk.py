"""Every file of a model folder, those behind links included: whoever has rules about links checks each."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from service.errors import UnsupportedModel

#: Beyond this a folder is not a model. Links that meet again and again end here as well.
MAX_ENTRIES = 100_000


@dataclass(slots=True)
class Walk:
    """What lies in a folder: `files` relative to it, sorted folder by folder; `warnings` of what was left out."""

    files: list[PurePosixPath] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    entries: int = 0


def walk(root: Path) -> Walk:
    """The regular files below a folder; hidden ones and what lies in hidden folders are passed over.

    Raises UnsupportedModel when there are too many, and OSError.
    """
    found = Walk()
    _enter(root, PurePosixPath("."), (Path(os.path.realpath(root)),), found)
    return found


def _enter(root: Path, folder: PurePosixPath, around: tuple[Path, ...], found: Walk) -> None:
    """Add what lies in `folder`; `around` are this folder and those on the way here, links resolved."""
    folders: list[PurePosixPath] = []
    for name in sorted(folder / path.name for path in (root / folder).iterdir() if not path.name.startswith(".")):
        found.entries += 1
        if found.entries > MAX_ENTRIES:
            raise UnsupportedModel(f"The folder holds more than {MAX_ENTRIES} files. Give the model's own folder.")
        if (root / name).is_file():
            found.files.append(name)
        elif (root / name).is_dir():
            folders.append(name)
        elif (root / name).is_symlink():
            found.warnings.append(f"{name} is left out: it is a link to nothing")
    for name in folders:
        real = Path(os.path.realpath(root / name))
        if any(outer.is_relative_to(real) for outer in around):  # would lead round and round
            found.warnings.append(f"{name} is left out: it is a link to a folder around it")
        else:
            _enter(root, name, (*around, real), found)
