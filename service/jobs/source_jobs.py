"""Which jobs are sources of others, and which are being purged: no job is ever both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from service.errors import JobInUse
from service.jobs.leases import Leases


class SourceJobs:
    """Counts, by id, the jobs that have not ended, or are being accepted, and read what a job wrote.

    Taking and purging are for the event loop alone, `is_going` for any thread.
    """

    def __init__(self) -> None:
        #: Held by those who read.
        self.leases = Leases()
        self._going = Leases()

    @contextmanager
    def purging(self, job_ids: Sequence[str]) -> Iterator[None]:
        """As long as the context is open none of these becomes a source; raises JobInUse when one is."""
        taken = self.leases.taken()
        for job_id in job_ids:
            if job_id in taken:
                raise JobInUse(
                    f"job {job_id} is the source of a job that has not ended: wait for that one to end, or cancel it"
                )
        with self._going.held(*job_ids):
            yield

    def is_going(self, job_id: str) -> bool:
        """Whether a job is being purged: it is as good as unknown to whoever looks for a source."""
        return job_id in self._going.taken()
