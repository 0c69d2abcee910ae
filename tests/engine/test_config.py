"""Resolving a configuration."""

import pytest
from pydantic import ValidationError

from service.engine.config import Profile, QuantizationConfig, build, matches, resolve
from service.errors import InvalidConfig


@pytest.mark.parametrize(
    ("profile", "bits", "group", "floor"), [("edge", 2, 256, 0.65), ("local", 4, 128, 0.85), ("cloud", 8, 64, 0.95)]
)
def test_a_profile_gives_the_documented_defaults(profile: str, bits: int, group: int, floor: float) -> None:
    config = resolve(Profile(profile), [])
    assert (config.bit_width, config.group_size, config.min_accuracy) == (bits, group, floor)


def test_a_request_wins_over_the_environment_which_wins_over_the_profile() -> None:
    environment = QuantizationConfig(bit_width=3, group_size=64)
    config = resolve(Profile.LOCAL, [environment, QuantizationConfig(bit_width=6)])
    assert (config.bit_width, config.group_size) == (6, 64)


def test_a_scheme_named_whole_replaces_the_width_of_the_profile() -> None:
    scheme = build(resolve(Profile.CLOUD, [QuantizationConfig(scheme="nf4")]), "F32")
    assert (scheme.id, scheme.symmetric, scheme.group_size) == ("nf4", True, 64)


def test_a_width_replaces_a_scheme_named_in_the_layer_below() -> None:
    config = resolve(Profile.LOCAL, [QuantizationConfig(scheme="nf4"), QuantizationConfig(bit_width=8)])
    assert build(config, "F32").id == "int8"


def test_a_nested_scheme_has_small_groups_whatever_the_profile_says() -> None:
    config = resolve(Profile.LOCAL, [QuantizationConfig(symmetric=True), QuantizationConfig(scheme="int4_nested")])
    scheme = build(config, "F32")
    assert (scheme.id, scheme.symmetric, scheme.group_size) == ("int4_nested", False, 16)
    larger = resolve(Profile.LOCAL, [QuantizationConfig(scheme="int4_nested", group_size=32)])
    assert build(larger, "F32").group_size == 32
    layers = [{"match": "head.*", "bit_width": 8}]
    mixed = resolve(Profile.LOCAL, [QuantizationConfig(scheme="int4_nested", layers=layers)])
    other = build(mixed.tensor_config("head.weight")[0], "F32")
    assert (other.id, other.granularity, other.group_size) == ("int8", "group", 128)


def test_a_granularity_without_groups_drops_the_group_size_of_the_profile() -> None:
    scheme = build(resolve(Profile.LOCAL, [QuantizationConfig(granularity="channel")]), "F32")
    assert scheme.group_size is None
    assert scheme.groups(4096) == 1


def test_the_first_matching_override_decides() -> None:
    layers = [{"match": "a.*", "bit_width": 8}, {"match": "*", "bit_width": 2}]
    config = resolve(Profile.LOCAL, [QuantizationConfig(layers=layers)])
    assert config.tensor_config("a.weight")[0].bit_width == 8
    assert config.tensor_config("b.weight") == (config.tensor_config("c.weight")[0], "*")


@pytest.mark.parametrize(
    "fields",
    [
        {"bit_width": 1},
        {"bit_width": 7},
        {"bit_width": 9},
        {"bit_width": "4"},
        {"group_size": 17},
        {"scheme": "int7"},
        {"method": "magic"},
        {"scheme": "int4", "bit_width": 4},
        {"scheme": "nf4", "symmetric": False},
        {"scheme": "int4_nested", "symmetric": True},
        {"scheme": "int4_nested", "group_size": 64},
        {"scheme": "int4_nested", "granularity": "channel"},
        {"number_format": "nf", "bit_width": 8},
        {"granularity": "channel", "group_size": 128},
        {"min_accuracy": 1.5},
        {"num_time_groups": 0},
        {"layers": [{"bit_width": 4}]},
        {"surprise": 1},
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        QuantizationConfig.model_validate(fields)


def test_layers_that_contradict_each_other_are_refused_with_a_pointer() -> None:
    with pytest.raises(InvalidConfig, match="nf4 has no zero point") as caught:
        resolve(Profile.LOCAL, [QuantizationConfig(scheme="nf4"), QuantizationConfig(symmetric=False)])
    assert caught.value.pointer == "/config"


def test_patterns_are_case_sensitive_and_cross_dots() -> None:
    assert matches("blocks.0.attn.q.weight", "blocks.*.weight")
    assert not matches("Blocks.0", "blocks.*")


@pytest.mark.parametrize("fields", [{"target_bits_per_weight": 4.0}, {"target_size_bytes": 1000, "bit_width": 4}])
def test_a_target_without_anything_to_choose_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig, match="goes with `bit_width` auto"):
        resolve(Profile.LOCAL, [QuantizationConfig(**fields)])


def test_a_choice_without_a_target_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="needs a target"):
        resolve(Profile.LOCAL, [QuantizationConfig(bit_width="auto")])
    with pytest.raises(ValidationError, match="exclude each other"):
        QuantizationConfig(bit_width="auto", target_bits_per_weight=4.0, target_size_bytes=1000)


def test_an_output_with_a_width_of_its_own_has_no_target() -> None:
    job = QuantizationConfig(bit_width="auto", target_bits_per_weight=4.0)
    assert resolve(Profile.LOCAL, [job, QuantizationConfig(bit_width=8)]).target_bits_per_weight is None
    by_size = resolve(Profile.LOCAL, [job, QuantizationConfig(target_size_bytes=1000)])
    assert (by_size.target_bits_per_weight, by_size.target_size_bytes) == (None, 1000)
