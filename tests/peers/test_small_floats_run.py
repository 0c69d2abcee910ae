"""Small floats made of models of any dtype run in transformers, and give what the weights that we read give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine.formats.registry import open_model
from tests.engine.helpers import run, specs

torch = pytest.importorskip("torch", reason="install the extra `peers`")
transformers = pytest.importorskip("transformers", reason="install the extra `peers`")
pytest.importorskip("compressed_tensors", reason="install the extra `peers`")

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers about themselves

DTYPES = ["float32", "float16", "bfloat16"]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
}
WORDS = torch.arange(24).reshape(2, 12)
QUANTIZED = 2 * 7  # linear layers


@pytest.fixture(scope="module", params=DTYPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of one dtype."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(7)
    model: Any = transformers.AutoModel.from_config(transformers.LlamaConfig(**SHAPE))
    for weight in model.parameters():
        weight.data *= 4  # so that its layers do something
    folder: Path = tmp_path_factory.mktemp("tiny") / request.param
    model.to(getattr(torch, request.param)).save_pretrained(folder)
    return folder


def written(source: Path, work: Path, **config: Any) -> tuple[Path, list[str]]:
    """The model as compressed-tensors, with every linear layer quantized, and what the run warned of."""
    report = run(source, work, specs("compressed-tensors", **config))
    assert sum(tensor.sums is not None for tensor in report.outputs[0].tensors) == QUANTIZED
    return work / "compressed-tensors", list(report.warnings)


def output_of(model: Any) -> Any:
    """What the model makes of the words."""
    with torch.no_grad():
        return model.eval()(WORDS).last_hidden_state


def check_runs(folder: Path, source: Path, stated: str, bound: float = 0.0, *, asked: str | None = None) -> None:
    """The dtype is what it is `asked` for, else the `stated` one, and the output that of the weights that we read."""
    how = {} if asked is None else {"dtype": getattr(torch, asked)}
    found = output_of(transformers.AutoModel.from_pretrained(folder, **how))
    assert found.dtype == getattr(torch, asked or stated)
    plain = transformers.AutoModel.from_pretrained(source, dtype=found.dtype)
    reader = open_model(folder)
    weights = plain.state_dict()
    for info in reader.tensors:
        if info.stored_as:
            read = torch.from_numpy(np.asarray(reader.rows(info, 0, info.rows)))
            weights[info.name].copy_(read.bfloat16())  # the library rounds to this, whatever the model's dtype
    reader.close()
    expected = output_of(plain)
    error = ((found - expected).float().norm() / expected.float().norm()).item()
    print(f"{folder.parent.name}: {found.dtype}, {error:.2e} off")
    assert error <= bound


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp8", "nvfp4"])
def test_one_scheme_for_all_layers_runs_in_the_dtype_of_the_model_and_in_any_other(
    source: Path, tmp_path: Path, scheme: str
) -> None:
    folder, warnings = written(source, tmp_path, scheme=scheme)
    assert not warnings
    assert json.loads((folder / "config.json").read_text())["dtype"] == source.name
    check_runs(folder, source, source.name)
    for other in {"float32", "bfloat16"} - {source.name}:
        check_runs(folder, source, source.name, asked=other)


@pytest.mark.parametrize(
    ("other", "bound"),
    [({"scheme": "mxfp8"}, 0.0), ({"scheme": "int8", "group_size": 32}, 0.03)],
    ids=["mxfp8", "int8"],  # of integers the scales are rounded as well when they are loaded
)
def test_mixed_schemes_run_in_bfloat16_and_the_run_tells(
    source: Path, tmp_path: Path, other: dict[str, Any], bound: float
) -> None:
    layers = [{"match": "*.mlp.*", **other}]
    folder, warnings = written(source, tmp_path, scheme="mxfp4", layers=layers)
    check_runs(folder, source, "bfloat16", bound)
    assert ["bfloat16" in text for text in warnings] == [True] * (source.name != "bfloat16")
    original, copied = open_model(source), open_model(folder)
    before, after = (reader.find("embed_tokens.weight") for reader in (original, copied))
    assert before is not None
    assert after is not None
    assert original.raw(before, 0, before.nbytes) == copied.raw(after, 0, after.nbytes)


def test_where_no_small_float_is_among_mixed_schemes_the_dtype_stays(source: Path, tmp_path: Path) -> None:
    layers = [{"match": "*.mlp.*", "scheme": "int8", "symmetric": True, "group_size": 32}]
    folder, warnings = written(source, tmp_path, scheme="int4", symmetric=True, group_size=32, layers=layers)
    assert not warnings
    assert json.loads((folder / "config.json").read_text())["dtype"] == source.name
