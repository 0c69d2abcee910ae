"""What the server says it can do is what the registries hold."""

from __future__ import annotations

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from service.engine.backends.registry import backends
from service.engine.config import PROFILES
from service.engine.formats.registry import formats
from service.engine.methods.registry import methods
from service.engine.schemes.registry import schemes
from tests.conftest import StartServer
from tests.server import Server


def listed(server: Server, kind: str) -> dict[str, Any]:
    response = server.client.get(f"/v1/{kind}")
    assert response.status_code == 200, response.text
    return {item["id"]: item for item in response.json()["data"]}


def test_every_registered_thing_is_listed(server: Server) -> None:
    assert listed(server, "profiles").keys() == PROFILES.keys()
    assert listed(server, "schemes").keys() == schemes().keys()
    assert listed(server, "methods").keys() == methods().keys()
    assert listed(server, "formats").keys() == formats().keys()
    assert listed(server, "backends").keys() == backends().keys()


@pytest.mark.parametrize(
    ("kind", "field"), [("schemes", "parameters"), ("methods", "parameters"), ("formats", "options")]
)
def test_parameters_are_told_as_json_schema(server: Server, kind: str, field: str) -> None:
    for item in listed(server, kind).values():
        Draft202012Validator.check_schema(item[field])
        assert item["description"]


def test_one_available_backend_is_preferred(server: Server) -> None:
    preferred = [b for b in listed(server, "backends").values() if b["preferred"]]
    assert [b["available"] for b in preferred] == [True]
    assert all(b.get("reason") for b in listed(server, "backends").values() if not b["available"])


def test_profiles_show_what_the_environment_sets(start_server: StartServer) -> None:
    server = start_server(bit_width=6, method="minmax")
    for profile in listed(server, "profiles").values():
        assert (profile["config"]["bit_width"], profile["config"]["method"]) == (6, "minmax")
