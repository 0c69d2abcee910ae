"""The OpenAPI document: what the framework makes of the routes, tidied for generators of clients.

`python -m service.api.openapi` writes it to `openapi/openapi.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.api.auth import is_open, scope_for
from service.api.openapi_links import add_links
from service.api.problems import documented
from service.errors import ForbiddenScope, RateLimited, Unauthorized

PATH = Path(__file__).parents[2] / "openapi" / "openapi.json"
_BEARER = {
    "type": "http",
    "scheme": "bearer",
    "description": "A key that the operator made with `arrowquant keys create`. A server on loopback may ask for none.",
}
#: Bodies that the framework spells out although they have a name.
_NAMED_BODIES = {"create_job": "JobRequest"}
#: What of a stream of events one event is; before OpenAPI 3.2 the schema of a stream describes each of its items.
_STREAMED_EVENT = {
    "type": "object",
    "description": "An event as `text/event-stream` carries it.",
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9]+$"},
        "event": {"type": "string", "description": "The `type` of the event."},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/Event"},
        },
    },
    "required": ["event", "data"],
}
_LOCATION = {"description": "Address of what was created.", "required": True, "schema": {"type": "string"}}
_ETAG = {"description": "Give it as `If-None-Match`.", "required": True, "schema": {"type": "string"}}


def install(app: FastAPI, *, asks_for_keys: bool) -> None:
    """Have the application serve the tidied document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = build(app, asks_for_keys=asks_for_keys)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def build(app: FastAPI, *, asks_for_keys: bool = False) -> dict[str, Any]:
    """The document of an application; where it asks for keys, the document says that it does."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        routes=app.routes,
        webhooks=app.webhooks.routes,
    )
    document["components"]["securitySchemes"] = {"bearer": _BEARER}
    document["components"]["schemas"]["StreamedEvent"] = _STREAMED_EVENT
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _name_body(operation)
            _name_parameter(operation)
            _secure(operation, method, path, asks_for_keys=asks_for_keys)
            _promise_headers(operation)
            add_links(operation)
    _tidy(document)
    return document


def render(document: dict[str, Any]) -> str:
    """The document as it is committed."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _name_body(operation: dict[str, Any]) -> None:
    if name := _NAMED_BODIES.get(operation["operationId"]):
        operation["requestBody"]["content"]["application/json"]["schema"] = {"$ref": f"#/components/schemas/{name}"}


def _name_parameter(operation: dict[str, Any]) -> None:
    if operation["operationId"] == "get_problem":
        operation["parameters"][0]["schema"] = {"$ref": "#/components/schemas/ErrorCode"}


def _promise_headers(operation: dict[str, Any]) -> None:
    """`Location` of what is created, `ETag` of what can be asked for again."""
    answers = operation["responses"]
    if operation["operationId"].startswith("create_") and "202" in answers:
        answers["202"]["headers"] = {"Location": _LOCATION}
    for status in ("200", "206", "304") if "304" in answers else ():
        if status in answers:
            answers[status].setdefault("headers", {})["ETag"] = _ETAG


def _secure(operation: dict[str, Any], method: str, path: str, *, asks_for_keys: bool) -> None:
    """What a key means to an operation; a server that asks for none ignores it."""
    if is_open(path):
        operation["security"] = []
        return
    operation["security"] = [{"bearer": []}] if asks_for_keys else [{"bearer": []}, {}]
    operation["x-scope"] = scope_for(method.upper(), path).value
    for status, added in documented(Unauthorized, ForbiddenScope, RateLimited).items():
        known = operation["responses"].setdefault(str(status), added)
        if known is not added:
            known["description"] += f"; {added['description']}"
            known.setdefault("headers", {}).update(added.get("headers", {}))


def _tidy(node: Any) -> None:
    """Drop generated titles, and the null of optional fields: what is not there is left out."""
    if isinstance(node, list):
        for item in node:
            _tidy(item)
    if not isinstance(node, dict):
        return
    for value in node.values():
        _tidy(value)
    if isinstance(node.get("title"), str) and node.keys() & {"type", "anyOf", "oneOf", "$ref", "const", "enum"}:
        del node["title"]
    some = [choice for choice in node.get("anyOf", []) if choice != {"type": "null"}]
    if len(some) == 1:
        del node["anyOf"]
        node.update(some[0])
        if node.get("default", 0) is None:
            del node["default"]


def main() -> None:
    """Write the document."""
    from service.api.app import create_app
    from service.settings import Settings

    PATH.write_text(render(build(create_app(Settings()))), encoding="utf-8")


if __name__ == "__main__":
    main()
