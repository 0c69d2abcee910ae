"""Which tensors are quantized how, and which rule says so."""

from __future__ import annotations

from math import prod
from pathlib import Path, PurePosixPath

import pytest

from service.engine.backends.reference import ReferenceBackend
from service.engine.estimate import describe
from service.engine.formats.registry import open_model
from service.engine.plan import check_outputs, decide, make_plan
from service.engine.tensors import TensorInfo
from service.errors import AlreadyQuantized, InvalidConfig, UnsupportedByFormat
from tests.engine.helpers import normal, run, save, specs


def _info(name: str, *shape: int, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, dtype, shape, PurePosixPath("m.safetensors"), 0, 4 * prod(shape))


@pytest.mark.parametrize(
    ("info", "rule"),
    [
        (_info("a.weight", 64), "dimensions"),
        (_info("a.weight", 4, 4), "elements"),
        (_info("a.weight", 64, 64, dtype="I32"), "I32"),
        (_info("model.embed_tokens.weight", 640, 64), "skip pattern"),
        (_info("lm_head.weight", 640, 64), "skip pattern"),
        (_info("layers.0.norm.weight", 64, 64), "skip pattern"),
    ],
)
def test_what_is_not_to_be_quantized_is_copied_with_its_rule(info: TensorInfo, rule: str) -> None:
    [output] = check_outputs(specs("parquet"))
    decision = decide(info, output)
    assert decision.scheme is None
    assert rule in decision.rule
    assert not decision.notable


@pytest.mark.parametrize(("rows", "cols", "is_copied"), [(32, 1 << 22, True), (1, 1 << 27, True), (4, 1 << 22, False)])
def test_rows_that_would_not_fit_into_a_block_are_copied_and_told_of(rows: int, cols: int, is_copied: bool) -> None:
    [output] = check_outputs(specs("parquet"))
    decision = decide(_info("a.weight", rows, cols), output)
    assert (decision.scheme is None) == is_copied
    assert decision.notable == is_copied


def test_an_override_that_names_a_skipped_tensor_means_it() -> None:
    [output] = check_outputs(specs("parquet", layers=[{"match": "*embed*", "bit_width": 8}]))
    scheme = decide(_info("embed_tokens.weight", 640, 64), output).scheme
    assert scheme is not None
    assert scheme.id == "int8"


def test_a_convolution_is_a_matrix_with_all_inner_dimensions_in_a_row() -> None:
    [output] = check_outputs(specs("parquet"))
    info = _info("conv.weight", 32, 16, 3, 3)
    assert (info.rows, info.cols) == (32, 144)
    assert decide(info, output).scheme is not None


@pytest.mark.parametrize(("cols", "group"), [(256, 128), (320, 64), (96, 32), (48, 16), (130, None)])
def test_a_row_takes_the_next_smaller_group_that_divides_it(cols: int, group: int | None) -> None:
    [output] = check_outputs(specs("compressed-tensors"))
    decision = decide(_info("a.weight", 96, cols), output)
    assert decision.scheme is not None
    assert decision.scheme.group_size == group
    assert decision.scheme.granularity == ("group" if group else "channel")
    assert decision.notable == (group != 128)


def test_parquet_allows_a_short_group_at_the_end_of_a_row() -> None:
    [output] = check_outputs(specs("parquet"))
    scheme = decide(_info("a.weight", 64, 130), output).scheme
    assert scheme is not None
    assert scheme.groups(130) == 2


def test_zero_points_are_left_out_where_the_formats_loaders_like_that_best() -> None:
    info = _info("a.weight", 64, 128)
    for asked, expected in ((None, [True, False]), (True, [True, True]), (False, [False, False])):
        outputs = check_outputs(
            specs("compressed-tensors", "parquet", **({} if asked is None else {"symmetric": asked}))
        )
        schemes = [decide(info, output).scheme for output in outputs]
        assert [s.symmetric for s in schemes if s] == expected


def test_zero_points_are_left_out_as_well_where_integers_stand_in_for_small_floats() -> None:
    for asked, expected in (({}, [True, False]), ({"symmetric": False}, [False, False])):
        override = {"match": "a.*", "scheme": "int8", **asked}
        outputs = check_outputs(specs("compressed-tensors", "parquet", scheme="mxfp4", layers=[override]))
        schemes = [decide(_info("a.weight", 64, 128), output).scheme for output in outputs]
        assert [(s.id, s.symmetric) for s in schemes if s] == [("int8", symmetric) for symmetric in expected]


def test_a_format_copies_what_it_cannot_hold_and_says_so() -> None:
    [output] = check_outputs(specs("compressed-tensors"))
    decision = decide(_info("conv.weight", 32, 16, 3, 3), output)
    assert decision.scheme is None
    assert decision.notable


@pytest.mark.parametrize("scheme", ["nf4", "int4_nested"])
def test_a_format_that_cannot_hold_the_scheme_is_refused_before_any_work(scheme: str) -> None:
    with pytest.raises(UnsupportedByFormat, match=scheme) as caught:
        check_outputs(specs("parquet", "compressed-tensors", scheme=scheme))
    assert caught.value.pointer == "/outputs/1/format"


def test_unknown_formats_options_and_doubled_names_are_refused_with_a_pointer() -> None:
    with pytest.raises(InvalidConfig) as caught:
        check_outputs(specs("gguf9"))
    assert caught.value.pointer == "/outputs/0/format"
    with pytest.raises(InvalidConfig) as caught:
        check_outputs(specs("compressed-tensors", options={"layuot": "auto"}))
    assert caught.value.pointer == "/outputs/0/options/layuot"
    with pytest.raises(InvalidConfig, match="parquet"):
        check_outputs(specs("parquet", "parquet"))


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"a.weight": normal(64, 128)})
    run(source, tmp_path / "work", specs("parquet"))
    with pytest.raises(AlreadyQuantized, match=r"a\.weight"):
        make_plan(open_model(tmp_path / "work" / "parquet"), specs("parquet"))


def test_the_description_predicts_what_a_run_then_stores(tmp_path: Path) -> None:
    tensors = {"a.weight": normal(96, 256), "b.weight": normal(64, 130, seed=1), "c.bias": normal(64, seed=2)}
    source = save(tmp_path / "m.safetensors", tensors)
    outputs = specs("compressed-tensors", "parquet")
    described = describe(make_plan(open_model(source), outputs), ReferenceBackend(), 1 << 20, tmp_path)
    report = run(source, tmp_path / "work", outputs)
    for planned, measured in zip(described["outputs"], report.outputs, strict=True):
        assert [t["name"] for t in planned["tensors"]] == [t.name for t in measured.tensors]
        for before, after in zip(planned["tensors"], measured.tensors, strict=True):
            assert before["scheme"] == after.scheme
            assert before["predicted_bytes"] == pytest.approx(after.stored_bytes, rel=0.05, abs=64)
    assert described["predicted"]["seconds"] > 0
    assert described["predicted"]["memory_bytes"] >= 96 * 256 * 4
