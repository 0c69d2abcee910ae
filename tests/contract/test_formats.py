"""What holds for every format, looked up as a user does."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

from service.engine.formats import base
from service.engine.formats.base import Format, FormatOptions
from service.engine.formats.registry import find_format, formats, open_model
from service.engine.formats.source import LocalFiles
from service.engine.schemes.base import Scheme
from service.engine.schemes.registry import build_scheme
from service.errors import UnsupportedByFormat, UnsupportedModel
from tests.contract.cases import all_schemes
from tests.engine.formats.outputs import BACKEND, Item, Output, contents, label, normal
from tests.engine.helpers import run, save_folder, specs

WRITABLE = [id_ for id_, cls in formats().items() if cls.can_write]


@pytest.mark.parametrize("format_id", WRITABLE)
@pytest.mark.parametrize("scheme", list(all_schemes()), ids=label)
def test_a_writable_format_round_trips_every_scheme_it_does_not_refuse(
    tmp_path: Path, format_id: str, scheme: Scheme
) -> None:
    cls = find_format(format_id)
    if cls.refuses_scheme(scheme, cls.options()):
        pytest.skip(f"{format_id} says that it cannot hold {scheme.id}")
    item = Item("layer.weight", normal(170, 128), scheme)
    assert cls.refuses_tensor(item.info, scheme) is None
    made = Output(tmp_path, cls, [item, Item("layer.bias", normal(3))])
    sums = made.run()
    assert made.stored["layer.weight"] == cls.stored_bytes(item.info, scheme, cls.options())
    reader = open_model(tmp_path)
    assert reader.format_id == format_id
    assert [t.name for t in reader.tensors] == ["layer.weight", "layer.bias"]
    info = reader.tensors[0]
    assert (info.shape, info.stored_as, info.is_float) == ((170, 128), scheme.id, True)
    read = np.concatenate([reader.rows(info, start, min(start + 9, 170)) for start in range(0, 170, 9)])
    assert BACKEND.compare(item.data, read).sum_dd == pytest.approx(sums["layer.weight"].sum_dd, rel=1e-9)
    reader.close()


@pytest.mark.parametrize("format_id", WRITABLE)
def test_an_output_reads_back_whatever_lies_beside_its_source(tmp_path: Path, format_id: str) -> None:
    source = save_folder(tmp_path / "model", {"w.weight": normal(64, 128)})
    strays = [f"model-0000{i}.parquet" for i in range(3)] + ["adapter_model.safetensors", "model.fp16.safetensors",
              "model-00001-of-00002.safetensors", "metadata.json", "manifest.json", "sub/manifest.json"]  # fmt: skip
    (source / "sub").mkdir()
    for name in strays:
        (source / name).write_text("{}")
    report = run(source, tmp_path / "work", specs(format_id))
    assert {str(f.path) for f in report.outputs[0].files} >= {"tokenizer.json", "sub/manifest.json"}
    stored = tmp_path / "work" / format_id
    (stored / "model-00009.parquet").write_text("put there later")
    reader = open_model(stored)
    assert (reader.format_id, [t.name for t in reader.tensors]) == (format_id, ["w.weight"])
    reader.close()


@pytest.mark.parametrize("format_id", WRITABLE)
def test_the_same_calls_write_the_same_bytes_whatever_the_folder(tmp_path: Path, format_id: str) -> None:
    scheme = build_scheme("int4", symmetric=True, group_size=32)
    for name in ("one", "two"):
        Output(tmp_path / name, find_format(format_id), [Item("a.weight", normal(40, 64), scheme)]).run()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("cls", formats().values(), ids=lambda c: c.id)
def test_a_format_says_what_it_can_do(cls: type[Format], tmp_path: Path) -> None:
    assert cls.can_read or cls.can_write
    assert cls.description
    assert inspect.getmodule(cls).__name__.endswith(cls.id.replace("-", "_"))  # type: ignore[union-attr]
    assert issubclass(cls.options, FormatOptions)
    assert cls.recognizes(LocalFiles(tmp_path)) is False
    assert cls.recognizes(LocalFiles(tmp_path / "nothing")) is False


@pytest.mark.parametrize("cls", [c for c in formats().values() if not c.can_write], ids=lambda c: c.id)
def test_a_format_that_is_only_read_refuses_to_write(cls: type[Format], tmp_path: Path) -> None:
    scheme = build_scheme("int4", symmetric=True)
    assert "not written" in str(cls.refuses_scheme(scheme, cls.options()))
    context = Output(tmp_path, find_format(WRITABLE[0]), []).writer().context
    with pytest.raises(UnsupportedByFormat, match=cls.id):
        cls.writer(tmp_path, context)


def test_a_format_that_is_only_written_refuses_to_read(tmp_path: Path) -> None:
    class Written(Format):
        id = "written"

    assert base.Format.recognizes(LocalFiles(tmp_path)) is False
    with pytest.raises(UnsupportedModel, match="written"):
        Written.open(LocalFiles(tmp_path))
