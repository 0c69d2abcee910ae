"""From pydantic's locations to JSON pointers into the body that the client sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.api.schemas.common import FieldProblem

#: More than these tell a client nothing new.
MAX_PROBLEMS = 50
#: Fields by which the body's unions are told apart; pydantic puts their values into a location.
_TAGS = ("kind", "type")


def field_problems(errors: Sequence[Any], body: Any) -> list[FieldProblem]:
    """One entry for each error of a request that failed validation."""
    return [_field_problem(error, body) for error in errors[:MAX_PROBLEMS]]


def pointer_to(location: Sequence[str | int], body: Any) -> str:
    """The JSON pointer of a location inside the body, the names of union members left out."""
    parts: list[str] = []
    node, tag_seen = body, False
    for part in location:
        if part == "[key]":
            continue
        if not tag_seen and isinstance(node, dict) and part in [node.get(tag) for tag in _TAGS]:
            tag_seen = True
            continue
        parts.append(str(part).replace("~", "~0").replace("/", "~1"))
        node, tag_seen = _child(node, part), False
    return "".join(f"/{part}" for part in parts)


def _child(node: Any, part: str | int) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, list) and isinstance(part, int) and part < len(node):
        return node[part]
    return None


def _field_problem(error: Any, body: Any) -> FieldProblem:
    place, *location = error["loc"]
    detail = error["msg"].removeprefix("Value error, ")
    if place != "body":
        return FieldProblem(parameter=str(location[-1]) if location else str(place), detail=detail)
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = error["ctx"]["discriminator"].strip("'")
        expected = error["ctx"].get("expected_tags")
        detail = f"must be one of {expected}" if expected else "is required: it says which of several forms this is"
        location = [*location, tag]
    return FieldProblem(pointer=pointer_to(location, body), detail=detail)
