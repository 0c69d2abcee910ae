"""`arrowquant keys`: makes, lists and revokes API keys, sets what a tenant may use; also beside a running server."""

from __future__ import annotations

import sys
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.data_dir import DataDir, data_folder
from service.cli.outcome import Json, outcome, print_json
from service.cli.records import document, state

if TYPE_CHECKING:
    from service.jobs.api_keys import ApiKeys

app = typer.Typer(
    help="API keys: make, list and revoke them, and set what a tenant may use.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PerMinute = Annotated[int | None, typer.Option("--requests-per-minute", min=1, help="Calls in a minute.")]


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose resources the key sees.")] = "default",
    scope: Annotated[
        list[str] | None, typer.Option(help="read, submit or admin; can be given again. [read and submit]")
    ] = None,
    name: Annotated[str, typer.Option(help="What it is for; shown by `list`.")] = "",
    days: Annotated[float | None, typer.Option(min=0, help="Until it expires; without it never.")] = None,
    requests_per_minute: PerMinute = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Make a key and show it, this once: only its hash is kept."""
    with outcome(as_json=as_json), _open(data_dir) as keys:
        expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
        key, text = keys.create(
            tenant,
            _scopes(scope or ["read", "submit"]),
            name=name,
            expires_at=expires_at,
            requests_per_minute=requests_per_minute,
        )
        if as_json:
            print_json(document(key) | {"key": text})
            return
        print(f"{key.id} of tenant {tenant} in {keys.data_dir}; it is shown only now:", file=sys.stderr)
        print(text)


@app.command(name="list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List all keys, the revoked and the expired as well; what they read like is known to their owners alone."""
    with outcome(as_json=as_json), _open(data_dir, must_exist=True) as keys:
        found = keys.all(tenant)
        if as_json:
            print_json([document(key) for key in found])
            return
        for key in found:
            scopes = ",".join(sorted(key.scopes))
            print(f"{key.id}  {key.tenant:<16}  {scopes:<18}  {state(key, 'usable'):<28}  {key.name}".rstrip())


@app.command()
def revoke(key_id: str, data_dir: DataDir = None, as_json: Json = False) -> None:
    """End a key for good. A running server refuses it within a second."""
    with outcome(as_json=as_json), _open(data_dir, must_exist=True) as keys:
        key = keys.revoke(key_id)
        if as_json:
            print_json(document(key))
        else:
            print(f"{key_id} revoked")


@app.command()
def limits(
    tenant: str,
    max_open_jobs: Annotated[int | None, typer.Option(min=0, help="Jobs that have not ended.")] = None,
    max_stored_bytes: Annotated[int | None, typer.Option(min=0, help="Artifacts and blobs.")] = None,
    requests_per_minute: PerMinute = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Back to what holds for all; before what else is given.")
    ] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show what is set for a tenant alone, after setting what is given; the rest comes from the server's settings."""
    with outcome(as_json=as_json), _open(data_dir) as keys:
        from service.jobs.quotas import NO_LIMITS, Limits

        given = Limits(max_open_jobs, max_stored_bytes, requests_per_minute)
        if reset or given != NO_LIMITS:
            keys.set_limits(tenant, given.over(NO_LIMITS if reset else keys.limits(tenant)))
        found = keys.limits(tenant)
        values = {field.name: getattr(found, field.name) for field in fields(found)}
        if as_json:
            print_json({"tenant": tenant} | {name: value for name, value in values.items() if value is not None})
            return
        for limit, value in values.items():
            print(f"{limit:<20} {'as for all' if value is None else value}")


def _open(data_dir: Path | None, *, must_exist: bool = False) -> ApiKeys:
    from service.jobs.api_keys import ApiKeys

    return ApiKeys(data_folder(data_dir, must_exist=must_exist))


def _scopes(names: list[str]) -> set[Any]:
    from service.errors import InvalidConfig
    from service.jobs.api_keys import Scope

    known = {scope.value: scope for scope in Scope}
    for name in names:
        if name not in known:
            raise InvalidConfig(f"{name!r} is no scope; there are {', '.join(known)}")
    return {known[name] for name in names}
