"""The code in docs/parquet.md does what the page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine.formats.registry import open_model
from service.engine.schemes.registry import build_scheme
from tests.engine.formats.outputs import Item, Output, all_float_schemes, all_integer_schemes, normal

PAGE = Path(__file__).parents[3] / "docs" / "parquet.md"


def page_code() -> dict[str, Any]:
    """The names that the page's block defines."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.mark.parametrize("scale_dtype", ["F32", "F16", "BF16"])
def test_the_page_dequantizes_every_scheme_as_the_service_does(output: Callable[..., Output], scale_dtype: str) -> None:
    schemes = list(all_integer_schemes(scale_dtype))
    schemes += [
        build_scheme("nf4", symmetric=True, granularity=granularity, group_size=size, scale_dtype=scale_dtype)
        for granularity, size in (("tensor", None), ("channel", None), ("group", 64))
    ]
    schemes += [
        build_scheme(f"int{bits}_nested", symmetric=False, group_size=size, scale_dtype=scale_dtype)
        for bits in (2, 3, 4, 5, 6)
        for size in (16, 32)
    ]
    schemes += all_float_schemes(scale_dtype)
    items = [
        Item(f"{i}.{j}", normal(*shape, seed=i), scheme)
        for i, scheme in enumerate(schemes)
        for j, shape in enumerate([(33, 96), (5, 7, 11), (2, 1100), (130, 131)])
    ]
    made = output("parquet", items)
    made.run()
    load = page_code()["load"]
    reader = open_model(made.folder)
    for info in reader.tensors:
        ours = reader.rows(info, 0, info.rows).reshape(info.shape)
        np.testing.assert_array_equal(load(made.folder / "model-00000.parquet", info.name), ours)
