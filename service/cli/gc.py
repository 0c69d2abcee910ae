"""`arrowquant gc`: removes what is kept no longer, or shows it; a server that runs does it itself."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.cli.client import Server
from service.cli.outcome import USAGE, Failed, mib


def collect_there(url: str, api_key: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Have the service at an address do it."""
    with Server(url, api_key) as server:
        return server.collect_garbage(asked)


def collect(data_dir: Path, api_key: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Have the server of a data folder do it, or do it here, by the settings, when none runs.

    Raises Failed when there is no such folder, or when a server holds it that does not say where it listens.
    """
    from service.api.routes.gc import garbage
    from service.jobs.offline import sweep_folder
    from service.jobs.store import DATABASE, address_of_server
    from service.settings import load_settings

    if not (data_dir / DATABASE).exists():
        detail = f"{data_dir} is no data folder of a server: name it with --data-dir, or the server with --server"
        raise Failed({"code": "invalid_config", "detail": detail}, status=USAGE)
    address = address_of_server(data_dir)
    if address is not None:
        return collect_there(address, api_key, asked)
    given = {name: value for name, value in asked.items() if name != "dry_run"}
    rules = load_settings(data_dir=data_dir).retention.overridden(**given)
    swept = sweep_folder(data_dir, rules, datetime.now(UTC), dry_run=asked["dry_run"])
    found: dict[str, Any] = garbage(swept).model_dump(mode="json", exclude_none=True)
    return found


def print_garbage(found: dict[str, Any]) -> None:
    """A line for each thing that went, and the sums."""
    for item in found["items"]:
        size = mib(item["size_bytes"]) if item["size_bytes"] else "-"
        since = item["since"][:19].replace("T", " ")
        thing = f"{item['what']:<9}  {item['id']:<40}  {item['tenant']:<16}"
        print(f"{thing}  {item['why']:<4}  since {since}  {size:>12}")
    tallies = found["removed"].items()
    more = sum(tally["count"] for _, tally in tallies) - len(found["items"])
    if more > 0:
        print(f"and {more} more")
    word = "would go" if found["dry_run"] else "removed"
    parts = [f"{tally['count']} {what}" for what, tally in tallies if tally["count"]]
    total = mib(sum(tally["size_bytes"] for _, tally in tallies))
    print(f"{word}: {', '.join(parts)}, {total}" if parts else f"{word}: nothing")
