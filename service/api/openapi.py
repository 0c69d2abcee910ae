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


def install(app: FastAPI) -> None:
    """Have the application serve the tidied document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = build(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def build(app: FastAPI) -> dict[str, Any]:
    """The document of an application."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        routes=app.routes,
        webhooks=app.webhooks.routes,
    )
    document["components"]["securitySchemes"] = {"bearer": _BEARER}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _name_body(operation)
            _secure(operation, method, path)
    _tidy(document)
    return document


def render(document: dict[str, Any]) -> str:
    """The document as it is committed."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _name_body(operation: dict[str, Any]) -> None:
    if name := _NAMED_BODIES.get(operation["operationId"]):
        operation["requestBody"]["content"]["application/json"]["schema"] = {"$ref": f"#/components/schemas/{name}"}


def _secure(operation: dict[str, Any], method: str, path: str) -> None:
    """What a key means to an operation; a server that asks for none ignores it."""
    if is_open(path):
        operation["security"] = []
        return
    operation["security"] = [{"bearer": []}, {}]
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
