"""What routes depend on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from service.api.app import ROUTERS


def calls(dependant: Dependant) -> Iterator[object]:
    """The functions that are called for a route: its own, and those of all it depends on."""
    yield dependant.call
    for one in dependant.dependencies:
        yield from calls(one)


def test_no_call_goes_through_a_thread_before_it_is_known_to_need_one() -> None:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    called = {call for route in routes for call in calls(route.dependant)}
    assert len(called) > len(routes), "they depend on something"
    assert [
        call for call in called if not (inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call))
    ] == []
