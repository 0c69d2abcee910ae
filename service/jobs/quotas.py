"""What a tenant may use, and whether there is room for more of it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from service.errors import StorageQuotaExceeded, TooManyOpenJobs


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use; None is no limit, or, among overrides, that of all tenants."""

    max_open_jobs: int | None = None
    max_stored_bytes: int | None = None
    requests_per_minute: int | None = None

    def over(self, defaults: Limits) -> Limits:
        """These limits, and the defaults where there is none."""
        names = [field.name for field in fields(self)]
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return Limits(**({name: getattr(defaults, name) for name in names} | own))


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant stores, and its own limits."""

    stored_bytes: int = 0
    overrides: Limits = NO_LIMITS


def check_room(limits: Limits, *, open_jobs: int, new_jobs: int, stored_bytes: int) -> None:
    """Raise TooManyOpenJobs or StorageQuotaExceeded unless a tenant may have so many new jobs.

    What a job will store is known when it has run: one that was accepted may go beyond the quota, the next is refused.
    """
    most = limits.max_open_jobs
    if most is not None and open_jobs + new_jobs > most:
        raise TooManyOpenJobs(f"{open_jobs} of your jobs have not ended, and {most} may: wait for one, or cancel one")
    room = limits.max_stored_bytes
    if room is not None and stored_bytes >= room:
        raise StorageQuotaExceeded(
            f"{stored_bytes} bytes are stored of the {room} that you may store: purge jobs, or wait until blobs expire"
        )
