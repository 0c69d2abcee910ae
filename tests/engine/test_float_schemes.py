"""Small floating-point numbers: rounding, configuration, and whole runs of the engine with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from service.engine.backends.reference import ReferenceBackend
from service.engine.config import Profile, QuantizationConfig, build, resolve
from service.engine.formats.registry import open_model
from service.engine.methods.minmax import MinMax
from service.engine.methods.mse import Mse
from service.engine.plan import make_plan
from service.engine.progress import Notice
from service.engine.schemes.microscaling import Mx, NvFp4
from service.engine.schemes.minifloat import E2M1, E4M3, E5M2, MiniFloat, round_to
from service.engine.tables import Tools, dequantize_table, quantize_table
from service.engine.validation import validate
from service.errors import InvalidConfig
from tests.engine.helpers import normal, run, save, save_folder, specs

NAMES = ("fp4", "fp8_e4m3", "fp8_e5m2", "mxfp4", "mxfp8", "nvfp4")
BLOCK = {"scheme": "fp8_e4m3", "granularity": "block"}


@pytest.mark.parametrize("element", [E2M1, E4M3, E5M2], ids=lambda e: str(e.dtype))
def test_numbers_are_rounded_as_the_reference_of_their_format_does(element: MiniFloat, rng) -> None:
    held = element.table[np.isfinite(element.table)]
    middles = (held[1:] + held[:-1]) / np.float32(2)
    ends = [np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)]
    wide = rng.standard_normal(20_000) * np.exp(rng.uniform(-20, 12, 20_000))
    x = np.concatenate([held, middles, *ends, wide]).astype(np.float32)
    expected = np.clip(x, -element.largest, element.largest).astype(element.dtype).view(np.uint8)
    np.testing.assert_array_equal(round_to(np, element, x), expected)


def test_the_scales_of_groups_are_stored_under_that_of_the_tensor(rng) -> None:
    backend, scheme, x = ReferenceBackend(), NvFp4(), rng.standard_normal((64, 256)).astype(np.float32)
    grid = backend.tensor_grid(backend.observe(x), scheme, MinMax())
    q = backend.quantize(x, scheme, MinMax(), grid)
    assert grid.scale == np.float32(6 * 448 / np.abs(x).max()) == q.tensor_scale
    assert float(q.scale.astype(np.float32).max()) == 448
    steps = np.abs(x.reshape(64, 16, 16)).max(-1) / 6
    stored = q.scale.astype(np.float32) / q.tensor_scale
    np.testing.assert_allclose(stored, steps, rtol=2.0**-4, atol=2.0**-10 / grid.scale)


def test_a_tensor_of_extreme_weights_has_a_scale_that_can_be_divided_by() -> None:
    backend, scheme = ReferenceBackend(), NvFp4()
    for size in (0.0, 1e-38, 1e38):
        x = np.full((32, 64), size, np.float32)
        q = backend.quantize(x, scheme, MinMax(), backend.tensor_grid(backend.observe(x), scheme, MinMax()))
        np.testing.assert_allclose(backend.dequantize(q), x, rtol=0.07, atol=1e-37)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_search_finds_the_better_of_neighbouring_powers_of_two(bits: int, rng) -> None:
    scheme = Mx(bits=bits)
    x = rng.standard_t(3, (2000, 32)).astype(np.float32)
    found, zero = Mse().find(np, x, scheme)
    errors = []
    for shift in (-1, 0, 1):
        scale = MinMax().find(np, x, scheme)[0] * np.float32(2.0**shift)
        errors.append(((x - scheme.decode(np, scheme.encode(np, x, scale, zero), scale, zero)) ** 2).sum(-1))
    best = ((x - scheme.decode(np, scheme.encode(np, x, found, zero), found, zero)) ** 2).sum(-1)
    assert (best <= np.min(errors, axis=0) * 1.0001).all()
    # Of 8 bits nearly all exponents do as well.
    assert bits == 8 or (found != MinMax().find(np, x, scheme)[0]).any()


@pytest.mark.parametrize("profile", list(Profile))
@pytest.mark.parametrize("name", NAMES)
def test_a_scheme_named_whole_is_what_it_is_in_every_profile(profile: Profile, name: str) -> None:
    assert build(resolve(profile, [QuantizationConfig(scheme=name)]), "BF16").id == name


@pytest.mark.parametrize(
    ("fields", "id_", "granularity"),
    [
        ({"number_format": "fp", "bit_width": 4}, "fp4", "group"),
        ({"number_format": "fp", "bit_width": 8}, "fp8_e4m3", "channel"),
        ({"number_format": "fp"}, "fp4", "group"),
        (BLOCK, "fp8_e4m3", "block"),
        ({"scheme": "fp8_e5m2", "granularity": "tensor"}, "fp8_e5m2", "tensor"),
        ({"scheme": "mxfp4", "group_size": 32}, "mxfp4", "group"),
        ({"scheme": "fp4", "group_size": 16, "scale_dtype": "BF16"}, "fp4", "group"),
    ],
)
def test_a_number_format_and_a_width_make_a_scheme(fields: dict[str, Any], id_: str, granularity: str) -> None:
    scheme = build(resolve(Profile.LOCAL, [QuantizationConfig(**fields)]), "F32")
    assert (scheme.id, scheme.granularity) == (id_, granularity)
    assert scheme.symmetric


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"number_format": "fp", "bit_width": 6}, "fp has 4 or 8 bits"),
        ({"number_format": "fp", "bit_width": "auto"}, "candidates"),
        ({"scheme": "mxfp4", "group_size": 64}, "`group_size` of mxfp4 is 32, not 64"),
        ({"scheme": "nvfp4", "granularity": "channel"}, "`granularity` of nvfp4 is group, not channel"),
        ({"scheme": "nvfp4", "scale_dtype": "F16"}, "`scale_dtype` of nvfp4 is E4M3, not F16"),
        ({"scheme": "fp8_e4m3", "group_size": 128}, "fp8_e4m3 has no groups"),
        ({"scheme": "fp8_e4m3", "granularity": "group"}, "tensor or channel or block, not group"),
        ({"scheme": "int4", "granularity": "block"}, "tensor or channel or group, not block"),
        ({"scheme": "mxfp8", "symmetric": False}, "mxfp8 has no zero point"),
    ],
)
def test_settings_that_a_scheme_cannot_have_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        QuantizationConfig(**fields)


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([{"granularity": "block"}], "of int4 is tensor or channel or group, not block"),
        ([{"scheme": "mxfp4"}, {"group_size": 64}], "`group_size` of mxfp4 is 32"),
        ([{"bit_width": 2}, {"number_format": "fp"}], "fp has 4 or 8 bits"),
    ],
)
def test_layers_of_settings_that_no_scheme_has_together_are_refused(layers: list[dict[str, Any]], text: str) -> None:
    with pytest.raises(InvalidConfig, match=text):
        resolve(Profile.LOCAL, [QuantizationConfig(**layer) for layer in layers])


def test_a_format_that_has_whole_groups_only_copies_rows_of_other_lengths(tmp_path: Path) -> None:
    reader = open_model(save(tmp_path / "m.safetensors", {"a.weight": normal(128, 100)}))
    packed, parquet = make_plan(reader, specs("compressed-tensors", "parquet", scheme="nvfp4")).tensors[0].decisions
    assert packed.scheme is None
    assert "whole groups of 16" in packed.rule
    assert parquet.scheme == NvFp4()
    reader.close()


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("config", [*({"scheme": name} for name in NAMES), BLOCK], ids=str)
def test_a_run_stores_what_it_measured(tmp_path: Path, config: dict[str, Any], method: str) -> None:
    tensors = {"a.weight": normal(300, 256), "b.weight": normal(70, 128, dtype=np.float16), "c.bias": normal(9)}
    source = save_folder(tmp_path / "model", tensors)
    formats = ["parquet", "compressed-tensors"]
    formats = formats[:1] if config["scheme"] in ("fp4", "fp8_e5m2") else formats
    happenings: list[Any] = []
    outputs = specs(*formats, **config, method=method, on_failure="warn")
    report = run(source, tmp_path / "work", outputs, block_bytes=64 << 10, happenings=happenings)
    assert not [h for h in happenings if isinstance(h, Notice)]
    for output in report.outputs:
        original, stored = open_model(source), open_model(tmp_path / "work" / output.name)
        names = dict.fromkeys(tensors, config["scheme"]) | {"c.bias": None}
        assert {t.name: t.stored_as for t in stored.tensors} == names
        found = validate(
            original, stored, min_accuracy=0.9, backend=ReferenceBackend(), block_bytes=50_000,
            report=lambda _: None, cancelled=lambda: False,
        )  # fmt: skip
        for mine, theirs in zip(output.tensors, found.outputs[0].tensors, strict=True):
            assert mine.name == theirs.name
            if mine.sums is None or theirs.sums is None:
                assert mine.name == "c.bias"
                continue
            assert theirs.sums.sum_dd == pytest.approx(mine.sums.sum_dd, rel=1e-9)
            assert theirs.stored_bytes == mine.stored_bytes
        original.close(), stored.close()


def test_a_fallback_goes_to_integers_of_more_bits(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"a.weight": normal(256, 256)})
    for config, expected in (({"scheme": "mxfp4"}, "int6"), ({"scheme": "nvfp4"}, "int6"), (BLOCK, "none")):
        outputs = specs("parquet", **config, min_accuracy=0.9999 if expected == "none" else 0.997)
        report = run(source, tmp_path / f"work-{config['scheme']}", outputs)
        assert report.outputs[0].tensors[0].scheme == expected


@pytest.mark.parametrize("config", [*({"scheme": name} for name in NAMES), BLOCK], ids=str)
def test_a_table_goes_there_and_back(config: dict[str, Any]) -> None:
    tools = Tools(ReferenceBackend(), block_bytes=1 << 12, cancelled=lambda: False)
    x = normal(300, 48)
    columns = {"layer_name": ["a", "b"], "weights": [x.ravel(), x[:0].ravel()], "shape": [[300, 48], [0, 48]]}
    chosen = resolve(Profile.LOCAL, [QuantizationConfig(**config)])
    quantized = quantize_table(pa.table(columns), chosen, tools)
    back = dequantize_table(quantized, tools, 1 << 26)
    row, y = quantized.to_pylist()[0], np.array(back["weights"][0].as_py()).reshape(x.shape)
    assert np.linalg.norm(y - x) / np.linalg.norm(x) == pytest.approx(row["relative_error"], rel=1e-4)
    assert row["relative_error"] < 0.15
    assert (row["tensor_scale"] is not None) == (config["scheme"] == "nvfp4")
