"""What is submitted together, and is accepted together or not at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import uuid_utils

from service.errors import ArrowQuantError, Cancelled, StoreUnavailable
from service.jobs.admission import MAX_TENSORS, Admission, Admitted
from service.jobs.batch import Batch
from service.jobs.idempotency import Key, Once
from service.jobs.job import Job, Status
from service.jobs.looks import Looks
from service.jobs.request import JobRequest
from service.jobs.sources import pointing
from service.logs import context
from service.storage.calls import Calls
from service.storage.stores import CLIENT_WAITS_S

#: Requests whose addresses in stores are looked at together.
LOOKS_AT_ONCE = 16


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
        """What may be made of each request; raises what `Admission.admit` raises. Blocks on files and the network.

        For all that lies in stores together a client waits CLIENT_WAITS_S at most: StoreUnavailable after that.
        """
        remote = self._admit_remote(admission)
        admitted: list[Admitted] = []
        tensors = 0
        for index, request in enumerate(self.requests):
            with self.at(index):
                found = remote.get(index) or admission.admit(request, self.tenant, MAX_TENSORS - tensors)
                if isinstance(found, ArrowQuantError):
                    raise found
            admitted.append(found)
            tensors += found.tensors
        return admitted

    def admit_local(self, admission: Admission) -> list[Admitted] | None:
        """As `admit`, and None where that would make calls to stores. Blocks on files and the job store."""
        is_remote = any(admission.is_remote(request, self.tenant) for request in self.requests)
        return None if is_remote else self.admit(admission)

    def _admit_remote(self, admission: Admission) -> dict[int, Admitted | ArrowQuantError]:
        """What may be made of requests that have to do with stores: several at once, each address looked at once."""
        looks = Looks()

        def admit(request: JobRequest) -> Admitted | ArrowQuantError:
            try:
                return admission.admit(request, self.tenant, looks=looks)
            except ArrowQuantError as error:
                return error

        remote = [i for i, request in enumerate(self.requests) if admission.is_remote(request, self.tenant)]
        deadline = time.monotonic() + CLIENT_WAITS_S
        with closing(Calls(LOOKS_AT_ONCE, lambda: time.monotonic() > deadline, CLIENT_WAITS_S)) as calls:
            try:
                found = calls.run_all([partial(admit, self.requests[index]) for index in remote])
            except Cancelled:
                raise StoreUnavailable(
                    f"the addresses in stores could not all be looked at in {CLIENT_WAITS_S:g} seconds: ask for fewer "
                    "at once, or try again when the stores are well"
                ) from None
        return dict(zip(remote, found, strict=True))

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
