"""`arrowquant webhooks secret`: makes, lists and revokes what signs webhooks; also beside a running server."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.data_dir import DataDir, data_folder
from service.cli.outcome import Json, outcome, print_json
from service.cli.records import document, state

if TYPE_CHECKING:
    from service.jobs.webhooks.secrets import SigningSecrets

app = typer.Typer(
    help="Webhooks: the secrets that sign them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
secret = typer.Typer(
    help="Secrets that sign a tenant's webhooks: make, list and revoke them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(secret, name="secret")


@secret.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose webhooks it signs.")] = "default",
    others_expire_in_hours: Annotated[
        float | None, typer.Option(min=0, help="Until the tenant's other secrets stop signing; without it never.")
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Make a secret and show it, this once. It signs beside those there are, so that receivers can change over."""
    with outcome(as_json=as_json), _open(data_dir) as secrets:
        hours = others_expire_in_hours
        others_expire_at = None if hours is None else datetime.now(UTC) + timedelta(hours=hours)
        made, text = secrets.create(tenant, others_expire_at=others_expire_at)
        if as_json:
            print_json(document(made) | {"secret": text})
            return
        print(f"{made.id} of tenant {tenant} in {secrets.data_dir}; it is shown only now:", file=sys.stderr)
        print(text)


@secret.command(name="list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List all secrets, without what they read like; the revoked and the expired as well."""
    with outcome(as_json=as_json), _open(data_dir, must_exist=True) as secrets:
        found = secrets.all(tenant)
        if as_json:
            print_json([document(one) for one in found])
            return
        for one in found:
            print(f"{one.id}  {one.tenant:<16}  {state(one, 'signs')}")


@secret.command()
def revoke(secret_id: str, data_dir: DataDir = None, as_json: Json = False) -> None:
    """End a secret for good, and forget what it was. A running server signs with it no more."""
    with outcome(as_json=as_json), _open(data_dir, must_exist=True) as secrets:
        revoked = secrets.revoke(secret_id)
        if as_json:
            print_json(document(revoked))
        else:
            print(f"{secret_id} revoked")


def _open(data_dir: Path | None, *, must_exist: bool = False) -> SigningSecrets:
    from service.jobs.webhooks.secrets import SigningSecrets

    return SigningSecrets(data_folder(data_dir, must_exist=must_exist))
