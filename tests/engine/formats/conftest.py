"""Outputs of any format in a folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from service.engine.formats.registry import find_format
from tests.engine.formats.outputs import Item, Output


@pytest.fixture
def output(tmp_path: Path) -> Callable[..., Output]:
    """Makes an `Output` of a format by its id."""

    def make(format_id: str, items: Sequence[Item], folder: str = "out", **kwargs: Any) -> Output:
        return Output(tmp_path / folder, find_format(format_id), items, **kwargs)

    return make
