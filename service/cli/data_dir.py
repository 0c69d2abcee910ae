"""The data folder that commands of the operator work on, beside the server or without it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="The server's data folder. [ARROWQUANT_DATA_DIR]")]


def data_folder(data_dir: Path | None, *, must_exist: bool) -> Path:
    """The folder that is given or set; raises InvalidConfig when it has to be a server's and is none."""
    from service.errors import InvalidConfig
    from service.jobs.store import DATABASE
    from service.settings import load_settings

    folder = load_settings(data_dir=data_dir).data_dir.absolute()
    if must_exist and not (folder / DATABASE).exists():
        raise InvalidConfig(f"{folder} is no data folder of a server: name it with --data-dir")
    return folder
