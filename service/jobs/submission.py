"""What is submitted together, and is accepted together or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime

import uuid_utils

from service.jobs.admission import MAX_TENSORS, Admission, Admitted
from service.jobs.batch import Batch
from service.jobs.idempotency import Key, Once
from service.jobs.job import Job, Status
from service.jobs.request import JobRequest
from service.jobs.sources import pointing
from service.logs import context


@dataclass(frozen=True, slots=True)
class Submission:
    """One job, or with `labels` the jobs of a batch; and how the answer is stored with them, if it is."""

    requests: Sequence[JobRequest]
    tenant: str
    labels: dict[str, str] | None = None
    once_job: Once[Job] | None = None
    once_batch: Once[Batch] | None = None

    def at(self, index: int) -> AbstractContextManager[None]:
        """Has errors point into the body that was sent."""
        return nullcontext() if self.labels is None else pointing(f"/items/{index}")

    def admit(self, admission: Admission) -> list[Admitted]:
        """What may be made of each request; raises what `Admission.admit` raises. Blocks on files."""
        admitted: list[Admitted] = []
        tensors = 0
        for index, request in enumerate(self.requests):
            with self.at(index):
                admitted.append(admission.admit(request, self.tenant, MAX_TENSORS - tensors))
            tensors += admitted[-1].tensors
        return admitted

    def jobs(self, admitted: Sequence[Admitted], now: datetime) -> list[Job]:
        """The new jobs."""
        batch_id = None if self.labels is None else f"batch_{uuid_utils.uuid7()}"
        return [
            Job(
                id=f"job_{uuid_utils.uuid7()}",
                request=request,
                config=entry.config,
                status=Status.QUEUED,
                created_at=now,
                tenant=self.tenant,
                request_id=context().get("request_id"),
                traceparent=context().get("traceparent"),
                batch_id=batch_id,
                batch_index=None if batch_id is None else index,
            )
            for index, (request, entry) in enumerate(zip(self.requests, admitted, strict=True))
        ]

    def batch(self, jobs: Sequence[Job]) -> Batch | None:
        """The batch of the new jobs, if they are one."""
        batch_id, labels = jobs[0].batch_id, self.labels
        if batch_id is None or labels is None:
            return None
        ids = tuple(job.id for job in jobs)
        return Batch(batch_id, self.tenant, labels, ids, jobs[0].created_at, counts={Status.QUEUED: len(ids)})

    def kept(self, jobs: Sequence[Job], batch: Batch | None) -> tuple[Key, str] | None:
        """The key of the call and the answer to it."""
        if batch is not None:
            return (self.once_batch.key, self.once_batch.answer(batch)) if self.once_batch else None
        return (self.once_job.key, self.once_job.answer(jobs[0])) if self.once_job else None

    def order(self) -> list[int]:
        """Of each request: how many of the others go before it in the queue."""
        first = sorted(range(len(self.requests)), key=lambda index: -self.requests[index].priority)
        ranks = [0] * len(first)
        for rank, index in enumerate(first):
            ranks[index] = rank
        return ranks
