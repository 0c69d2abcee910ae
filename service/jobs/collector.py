"""Removes what the rules of retention do not keep, a little at a time, beside all other work.

The database comes first, then the files: a job that has lost its artifacts lists none of them, whenever a crash comes.
In the thread of the store each slice takes a few milliseconds, and looks in its transaction at who holds what; a
reader that takes its lease later finds a record that has changed already.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from service.jobs import blob_table, key_table, retention_table
from service.jobs.blobs import Blobs
from service.jobs.blobs import Key as BlobKey
from service.jobs.database import Database
from service.jobs.leases import Leases
from service.jobs.removal import Removals
from service.jobs.retention import Due, Rules, Swept, What, Why, before
from service.jobs.retention_table import START, Cursor

#: Looked at between two turns of others.
PAGE = 200
#: Deleted at once of a log.
EVENTS = 200
#: After which a slice ends.
SLICE_S = 0.003
#: Pages of the database given back to the disk at once.
PAGES = 64
#: Free pages that stay in the database for what comes next.
SPARE_PAGES = 256

#: What is old: before a time, behind a cursor, so many.
Look = Callable[[sqlite3.Connection, str, Cursor, int], list[Due]]
#: Lets go of something; whether there is more to do.
Act = Callable[[sqlite3.Connection, Due], bool]


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the database has of jobs: how the old is found, about how large one is, how it goes.

    What is older than `aged` goes by its age.
    """

    what: What
    look: Look
    size: Callable[[sqlite3.Connection, str], int]
    act: Act
    aged: str


class Collector:
    """Sweeps a data folder; on the event loop. Raises StorageFailure, DiskFull or NotReady, and goes on next time."""

    def __init__(
        self,
        database: Database,
        leases: Leases,
        removals: Removals,
        blobs: Blobs,
        blobs_in_use: Callable[[], Iterable[BlobKey]],
    ) -> None:
        """`blobs_in_use` are those of jobs that have not ended."""
        self._database = database
        self._leases = leases
        self._removals = removals
        self._blobs = blobs
        self._blobs_in_use = blobs_in_use
        self._one_at_a_time = asyncio.Lock()

    async def sweep(self, rules: Rules, now: datetime, *, dry_run: bool = False) -> Swept:
        """Remove what these rules do not keep at this time, or only say what that would be."""
        async with self._one_at_a_time:
            swept = Swept(dry_run)
            if not dry_run:
                await self._database.change(key_table.remove_expired)
                await self._removals.clear_all()
                await asyncio.to_thread(self._blobs.touch, set(self._blobs_in_use()))
            await self._sweep_jobs(rules, now, swept)
            await self._sweep_blobs(rules, now, swept)
            await self._make_room(rules, now, swept)
            if swept.count and not dry_run:
                await self._give_back_space()
            return swept

    async def erase(self, job_ids: Sequence[str]) -> None:
        """Delete ended jobs with all that is theirs, whoever reads it; files go when the last reader lets go."""
        now = datetime.now(UTC)
        todo = deque(Due("", "", job_id, 0) for job_id in job_ids)
        while todo:
            await self._slice(todo, lambda db, due: retention_table.erase(db, due.id, now, EVENTS), heeds_leases=False)
        await self._removals.clear(job_ids)

    # --- by age ---

    async def _sweep_jobs(self, rules: Rules, now: datetime, swept: Swept) -> None:
        begin = START
        if end := before(now, rules.job_ttl_s):

            def erase(db: sqlite3.Connection, due: Due) -> bool:
                return retention_table.erase(db, due.id, now, EVENTS)

            await self._sweep_old(What.JOBS, retention_table.old_jobs, begin, end, erase, swept)
            await self._drop_empty_batches(end, swept)
            # What is older went with its job, or is in use.
            begin = (end, "")
        if end := before(now, rules.artifact_ttl_s):
            expire = self._expire_artifacts(now)
            await self._sweep_old(What.ARTIFACTS, retention_table.old_artifacts, begin, end, expire, swept)
        if end := before(now, rules.event_ttl_s):

            def trim(db: sqlite3.Connection, due: Due) -> bool:
                return retention_table.trim_log(db, due.id, now, EVENTS)

            await self._sweep_old(What.EVENTS, retention_table.old_logs, begin, end, trim, swept)

    async def _sweep_old(self, what: What, look: Look, begin: Cursor, end: str, act: Act, swept: Swept) -> None:
        async for page in self._pages(look, begin, end):
            for due in await self._let_go(page, act, swept):
                # A log is no file, and counting its bytes would cost more than deleting them.
                swept.add(what, Why.AGE, due if what is not What.EVENTS else _weightless(due))

    async def _let_go(self, page: Sequence[Due], act: Act, swept: Swept) -> list[Due]:
        """Let go of those that nobody holds, files included; which those are."""
        if swept.is_dry:
            taken = self._leases.taken()
            return [due for due in page if not due.is_among(taken)]
        todo, done = deque(page), list[Due]()
        while todo:
            done += await self._slice(todo, act)
        await self._removals.clear(due.id for due in done)
        return done

    async def _slice(self, todo: deque[Due], act: Act, *, heeds_leases: bool = True) -> list[Due]:
        """Take from the left what there is time for, in one transaction; those that are done with."""

        def work(db: sqlite3.Connection) -> list[Due]:
            taken = self._leases.taken() if heeds_leases else frozenset()
            done, deadline = [], time.monotonic() + SLICE_S
            while todo and time.monotonic() < deadline:
                if todo[0].is_among(taken):
                    todo.popleft()
                elif not act(db, todo[0]):
                    done.append(todo.popleft())
            return done

        return await self._database.change(work)

    async def _drop_empty_batches(self, end: str, swept: Swept) -> None:
        def drop(db: sqlite3.Connection) -> bool:
            return retention_table.drop_empty_batches(db, end, self._leases.taken(), PAGE) > 0

        while not swept.is_dry and await self._database.change(drop):
            pass

    def _expire_artifacts(self, now: datetime) -> Act:
        def expire(db: sqlite3.Connection, due: Due) -> bool:
            retention_table.expire_artifacts(db, due.id, now)
            return False

        return expire

    async def _sweep_blobs(self, rules: Rules, now: datetime, swept: Swept) -> None:
        end = before(now, rules.blob_ttl_s)
        if end is None:
            return
        last = ("", "", "")
        while page := await self._database.read(partial(blob_table.unused, before=end, after=last, limit=PAGE)):
            last = _place(page[-1])
            for due in await self._drop_blobs(page, end, swept):
                swept.add(What.BLOBS, Why.AGE, due)
        stale = await asyncio.to_thread(self._blobs.uploads, end)
        for due in await self._drop_uploads(stale, swept):
            swept.add(What.UPLOADS, Why.AGE, due)

    async def _drop_blobs(self, page: Sequence[Due], end: str, swept: Swept) -> list[Due]:
        in_use = set(self._blobs_in_use())
        unused = [due for due in page if (due.tenant, due.id) not in in_use]
        return unused if swept.is_dry else await asyncio.to_thread(self._blobs.drop, unused, end)

    async def _drop_uploads(self, stale: Sequence[Due], swept: Swept) -> Sequence[Due]:
        return stale if swept.is_dry else await asyncio.to_thread(self._blobs.drop_uploads, stale)

    # --- by size ---

    async def _make_room(self, rules: Rules, now: datetime, swept: Swept) -> None:
        """Let go of what ended or was used longest ago, until the rest fits: files, then logs, then records."""
        if rules.max_total_bytes is None:
            return
        end = before(now, rules.grace_s) or ""
        # What goes by its age anyhow is gone by now, or in a dry run counts as if it were.
        over = await self._total_bytes() - rules.max_total_bytes
        files = (What.JOBS, What.ARTIFACTS, What.BLOBS, What.UPLOADS)
        over -= sum(swept.tallies[what].size_bytes for what in files if swept.is_dry)
        over = await self._make_room_of_files(over, rules, now, end, swept)
        if over > 0:
            await self._make_room_of_rows(over, rules, now, end, swept)

    async def _make_room_of_rows(self, over: int, rules: Rules, now: datetime, end: str, swept: Swept) -> None:
        """Of logs and then of records."""
        jobs, logs = before(now, rules.job_ttl_s) or "", before(now, rules.event_ttl_s) or ""

        def trim(db: sqlite3.Connection, due: Due) -> bool:
            return retention_table.trim_log(db, due.id, now, EVENTS)

        def erase(db: sqlite3.Connection, due: Due) -> bool:
            return retention_table.erase(db, due.id, now, EVENTS)

        for rows in (
            _Rows(What.EVENTS, retention_table.old_logs, retention_table.log_bytes, trim, max(jobs, logs)),
            _Rows(What.JOBS, retention_table.old_jobs, retention_table.record_bytes, erase, jobs),
        ):
            async for page in self._pages(rows.look, START, end):
                for due in page:
                    if over <= 0:
                        break
                    over -= await self._drop_row(rows, due, swept)
        await self._drop_empty_batches(end, swept)

    async def _drop_row(self, rows: _Rows, due: Due, swept: Swept) -> int:
        """How many bytes of the database are free then; of a dry run about."""
        if swept.is_dry:
            freed = await self._database.read(lambda db: rows.size(db, due.id))
        else:
            used = await self._database.read(retention_table.own_bytes)
        gone = await self._let_go([due], rows.act, swept)
        for one in gone:
            # A dry run finds again what it has told to go by its age.
            if one.since >= rows.aged:
                swept.add(rows.what, Why.SIZE, _weightless(one))
        if swept.is_dry:
            return freed if gone else 0
        return used - await self._database.read(retention_table.own_bytes)

    async def _total_bytes(self) -> int:
        return await self._database.read(retention_table.total_bytes) + await asyncio.to_thread(
            self._blobs.upload_bytes
        )

    async def _make_room_of_files(self, over: int, rules: Rules, now: datetime, end: str, swept: Swept) -> int:
        """Of artifacts, blobs and uploads that stand still; how much there still is too much."""
        old = max(filter(None, (before(now, rules.job_ttl_s), before(now, rules.artifact_ttl_s))), default="")
        uploads = before(now, rules.blob_ttl_s) or ""
        jobs, blobs = (old, ""), (uploads, "", "")
        while over > 0:
            candidates = await self._oldest(jobs, blobs, uploads, end)
            if not candidates:
                return over
            for what, due in candidates:
                if over <= 0:
                    return over
                gone: Sequence[Due]
                if what is What.BLOBS:
                    blobs = _place(due)
                    gone = await self._drop_blobs([due], end, swept)
                elif what is What.UPLOADS:
                    uploads = due.since
                    gone = await self._drop_uploads([due], swept)
                else:
                    jobs = (due.since, due.id)
                    gone = await self._let_go([due], self._expire_artifacts(now), swept)
                for one in gone:
                    over -= one.size_bytes
                    swept.add(what, Why.SIZE, one)
        return over

    async def _oldest(
        self, jobs: Cursor, blobs: tuple[str, str, str], uploads: str, end: str
    ) -> list[tuple[What, Due]]:
        """The oldest of all kinds, as far as all have been looked at."""
        stale = [due for due in await asyncio.to_thread(self._blobs.uploads, end) if due.since > uploads][:PAGE]

        def look(db: sqlite3.Connection) -> list[tuple[What, Due]]:
            kinds = {
                What.ARTIFACTS: retention_table.old_artifacts(db, end, jobs, PAGE),
                What.BLOBS: blob_table.unused(db, end, blobs, PAGE),
                What.UPLOADS: stale,
            }
            seen = min((found[-1].since for found in kinds.values() if len(found) == PAGE), default=end)
            seen_of_all = [(what, due) for what, found in kinds.items() for due in found if due.since <= seen]
            return sorted(seen_of_all, key=lambda pair: pair[1].since)

        return await self._database.read(look)

    # --- inside ---

    async def _pages(self, look: Look, begin: Cursor, end: str) -> AsyncIterator[list[Due]]:
        while page := await self._database.read(partial(_called, look, end, begin)):
            begin = (page[-1].since, page[-1].id)
            yield page

    async def _give_back_space(self) -> None:
        """Have the database's file shrink, a few pages at a time, and its write-ahead log end."""

        def shrink(db: sqlite3.Connection) -> bool:
            (free,) = db.execute("PRAGMA freelist_count").fetchone()
            if free <= SPARE_PAGES:
                return False
            db.execute(f"PRAGMA incremental_vacuum({PAGES})").fetchall()
            return bool(db.execute("PRAGMA freelist_count").fetchone()[0] < free)

        while await self._database.read(shrink):
            pass
        await self._database.read(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())


def _called(look: Look, end: str, begin: Cursor, db: sqlite3.Connection) -> list[Due]:
    return look(db, end, begin, PAGE)


def _weightless(due: Due) -> Due:
    return Due(due.since, due.tenant, due.id, 0, due.batch_id)


def _place(due: Due) -> tuple[str, str, str]:
    return due.since, due.tenant, due.id
