"""How jobs are found in the database: the filters of a list, each combination of which has an index that also sorts.

So a page costs the same at a million jobs, also where a filter that fits most of them meets one that fits few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product
from typing import Any
from uuid import UUID

from service.jobs.job import Status
from service.jobs.times import in_utc, text_of


def _label_indices() -> Iterator[str]:
    for tenant, status, kind in product(("", "tenant"), ("", "status"), ("", "kind")):
        given = [name for name in (tenant, status, kind) if name]
        if status or kind:
            columns = ", ".join([tenant, "key", "value", status, kind, "job_id"]).replace(" ,", "").removeprefix(", ")
            yield f"CREATE INDEX labels_by_{'_'.join(given)} ON labels ({columns});"


#: Labels know the kind and, by a trigger, the status of their job.
SCHEMA = f"""
    CREATE INDEX jobs_by_status_kind ON jobs (status, kind, id);
    CREATE INDEX jobs_by_tenant_status_kind ON jobs (tenant, status, kind, id);
    ALTER TABLE labels ADD COLUMN kind TEXT NOT NULL DEFAULT '';
    ALTER TABLE labels ADD COLUMN status TEXT NOT NULL DEFAULT 'queued';
    UPDATE labels SET (kind, status) = (SELECT kind, status FROM jobs WHERE id = labels.job_id);
    {" ".join(_label_indices())}
    CREATE TRIGGER label_status AFTER UPDATE OF status ON jobs WHEN new.status <> old.status BEGIN
        UPDATE labels SET status = new.status WHERE job_id = new.id;
    END;
"""


@dataclass(slots=True)
class _Where:
    conditions: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def add(self, condition: str, *values: Any) -> None:
        if None not in values:
            self.conditions.append(condition)
            self.values += values

    def __str__(self) -> str:
        return f"WHERE {' AND '.join(self.conditions)}" if self.conditions else ""


def query(
    *,
    tenant: str | None,
    status: Status | None,
    kind: str | None,
    batch_id: str | None,
    label: tuple[str, str] | None,
    created_after: datetime | None,
    after: str | None,
    limit: int,
) -> tuple[str, Sequence[Any]]:
    """The statement that selects the records of a page, newest first, and its values; what is None does not filter."""
    key, value = label or (None, None)
    # Batches are small, so there the others may be looked at job by job. A cross join keeps its order, whatever the
    # planner believes.
    tables, lead, id_ = "jobs", "jobs", "jobs.id"
    if batch_id is not None:
        tables = "jobs INDEXED BY jobs_by_batch"
        if label is not None:
            tables += " CROSS JOIN labels ON labels.job_id = jobs.id"
    elif label is not None:
        tables, lead, id_ = "labels CROSS JOIN jobs ON jobs.id = labels.job_id", "labels", "labels.job_id"
    where = _Where()
    where.add("jobs.batch_id = ?", batch_id)
    where.add("labels.key = ? AND labels.value = ?", key, value)
    where.add(f"{lead}.tenant = ?", tenant)
    where.add(f"{lead}.status = ?", status)
    where.add(f"{lead}.kind = ?", kind)
    where.add(f"{id_} < ?", after)
    if created_after is not None:
        # Ids begin with their time: the index ends the search, created_at then decides to the microsecond.
        where.add(f"{id_} >= ? AND jobs.created_at > ?", _first_id_at(created_after), text_of(created_after))
    return f"SELECT record FROM {tables} {where} ORDER BY {id_} DESC LIMIT ?", (*where.values, limit)


def _first_id_at(time: datetime) -> str:
    """The smallest job id of this millisecond: a UUIDv7 begins with it."""
    return f"job_{UUID(int=max(0, int(in_utc(time).timestamp() * 1000)) << 80)}"
