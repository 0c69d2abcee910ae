"""Sweeps a data folder that no server holds."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from service.jobs.blobs import BlobLimits, Blobs
from service.jobs.collector import Collector
from service.jobs.database import Database
from service.jobs.folders import Folders
from service.jobs.leases import Leases
from service.jobs.orphans import remove_orphans
from service.jobs.removal import Removals
from service.jobs.retention import Rules, Swept
from service.jobs.sources import blobs_used, jobs_used
from service.jobs.store import Store


def sweep_folder(data_dir: Path, rules: Rules, now: datetime, *, dry_run: bool) -> Swept:
    """Remove what these rules do not keep, or only say what that would be. Blocks.

    Raises StorageFailure when a server holds the folder, when it cannot be written, or when it would have to be changed
    to be looked at.
    """
    store = Store(data_dir, as_it_is=dry_run)
    try:
        swept = asyncio.run(_sweep(store, data_dir, rules, now, dry_run=dry_run))
        if not dry_run:
            store.compact()
        return swept
    finally:
        store.close()


async def _sweep(store: Store, data_dir: Path, rules: Rules, now: datetime, *, dry_run: bool) -> Swept:
    with ThreadPoolExecutor(1) as thread:
        database, folders, leases = Database(lambda: store, thread), Folders(data_dir), Leases()
        blobs = Blobs(data_dir / "blobs", lambda: store, BlobLimits())
        # What the next server goes on with.
        unfinished = await database.run(Store.active)
        for job in unfinished:
            leases.take(job.id, *jobs_used(job.request))
        if not dry_run:
            await asyncio.to_thread(folders.create)
            await asyncio.to_thread(blobs.create)
            await remove_orphans(database, folders, leases, blobs)
        removals = Removals(database, folders, leases, _nobody_waits)
        in_use = {key for job in unfinished for key in blobs_used(job)}
        return await Collector(database, leases, removals, blobs, lambda: in_use).sweep(rules, now, dry_run=dry_run)


def _nobody_waits(later: Coroutine[Any, Any, None]) -> None:
    """Nobody gives a lease back here: what is held goes at another sweep."""
    later.close()
