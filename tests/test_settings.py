"""Settings: arguments before variables before defaults, and errors that name what was set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.engine.config import Profile, QuantizationConfig, resolve
from service.errors import InvalidConfig
from service.settings import Settings, config_from, load_settings, scalar_fields


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ARROWQUANT_")]:
        monkeypatch.delenv(name)


def test_the_defaults_listen_on_this_machine_only_and_allow_no_folder() -> None:
    settings = load_settings()
    assert settings.host == "127.0.0.1"
    assert settings.model_roots == ()
    assert settings.block_bytes == 64 << 20
    assert settings.config_defaults == QuantizationConfig()


def test_an_argument_wins_over_a_variable_and_a_variable_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWQUANT_PORT", "9000")
    monkeypatch.setenv("ARROWQUANT_MODEL_ROOTS", "/a:/b")
    assert load_settings(port=None).port == 9000
    assert load_settings(port=9001).port == 9001
    assert load_settings().model_roots == (Path("/a"), Path("/b"))
    assert load_settings(model_roots=(Path("/c"),)).model_roots == (Path("/c"),)


def test_every_scalar_field_of_a_configuration_can_be_set_by_a_variable() -> None:
    values = {
        "ARROWQUANT_BIT_WIDTH": "8",
        "ARROWQUANT_GROUP_SIZE": "64",
        "ARROWQUANT_SYMMETRIC": "True",
        "ARROWQUANT_METHOD": "minmax",
        "ARROWQUANT_MIN_ACCURACY": "0.9",
        "ARROWQUANT_ON_FAILURE": "warn",
    }
    config = config_from(values)
    assert (config.bit_width, config.group_size, config.symmetric) == (8, 64, True)
    assert (config.method, config.min_accuracy, config.on_failure) == ("minmax", 0.9, "warn")
    assert set(QuantizationConfig.model_fields) - set(scalar_fields()) == {"skip", "layers", "candidates"}


def test_a_variable_stands_between_profile_and_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWQUANT_BIT_WIDTH", "8")
    defaults = load_settings().config_defaults
    assert resolve(Profile.EDGE, [defaults, None]).bit_width == 8
    assert resolve(Profile.EDGE, [defaults, QuantizationConfig(bit_width=3)]).bit_width == 3


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWQUANT_BIT_WIDTH", "")
    assert load_settings().config_defaults == QuantizationConfig()


@pytest.mark.parametrize(
    ("name", "value"),
    [("BIT_WIDTH", "9"), ("GROUP_SIZE", "17"), ("METHOD", "magic"), ("PORT", "x"), ("THREADS", "0")],
)
def test_a_bad_value_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"ARROWQUANT_{name}", value)
    with pytest.raises(InvalidConfig, match=f"ARROWQUANT_{name}"):
        load_settings()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        pytest.param({"require_keys": True}, 100, id="a tenth"),
        pytest.param({"require_keys": True, "max_queued_jobs": 3}, 1, id="one at least"),
        pytest.param({}, 0, id="none without keys"),
    ],
)
def test_places_in_the_queue_are_kept_where_there_are_tenants(options: dict[str, Any], kept: int) -> None:
    assert load_settings(**options).kept_places == kept


def test_settings_cannot_be_changed() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_remote_roots_are_separated_by_spaces_and_have_to_be_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWQUANT_REMOTE_ROOTS", "s3://models/public/ hf://")
    assert [root.parts for root in load_settings().stores.roots] == [("models", "public"), ()]
    for wrong in ("models", "s3://user:hunter2@models", "s3://models/../x", "file:///models"):
        with pytest.raises(InvalidConfig, match="remote_roots") as caught:
            load_settings(remote_roots=(wrong,))
        assert "hunter2" not in caught.value.detail


@pytest.mark.parametrize(
    "endpoint", ["http://user:hunter2@host", "host:9000", "ftp://host", "https://host?key=hunter2"]
)
def test_an_endpoint_holds_no_credentials(endpoint: str) -> None:
    with pytest.raises(InvalidConfig, match="s3_endpoint") as caught:
        load_settings(s3_endpoint=endpoint)
    assert "hunter2" not in caught.value.detail
    assert load_settings(s3_endpoint="http://host:9000/path").stores.s3_endpoint == "http://host:9000/path"
