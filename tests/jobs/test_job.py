"""A job's states: what follows what, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import IllegalTransition
from service.jobs.job import TRANSITIONS, Artifact, Failure, Job, Status
from service.jobs.record import from_record, to_record
from tests.jobs.models import quantize_request


def a_job(status: Status = Status.QUEUED) -> Job:
    return Job("job_1", quantize_request(Path("/models/a")), {"bit_width": 4}, status, datetime.now(UTC))


def test_the_contract_knows_these_transitions_and_no_others() -> None:
    q, r, c = Status.QUEUED, Status.RUNNING, Status.CANCELLING
    ends = {Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}
    allowed = {(old, new) for old, following in TRANSITIONS.items() for new in following}
    assert (q, r) in allowed
    assert (r, Status.SUCCEEDED) in allowed
    assert (r, c) in allowed
    assert (c, Status.CANCELLED) in allowed
    assert (c, Status.SUCCEEDED) not in allowed, "a cancelled job never succeeds"
    assert (r, q) not in allowed, "a job never goes back"
    assert {status for status in Status if status.is_terminal} == ends


@given(st.lists(st.sampled_from(list(Status)), max_size=12))
def test_on_any_walk_a_job_changes_only_as_allowed_and_never_after_its_end(walk: list[Status]) -> None:
    job = a_job()
    for status in walk:
        if status in TRANSITIONS[job.status]:
            job = job.to(status)
            assert job.status is status
        else:
            with pytest.raises(IllegalTransition, match=job.id):
                job.to(status)
    assert (job.finished_at is not None) == job.status.is_terminal
    if job.started_at and job.finished_at:
        assert job.created_at <= job.started_at <= job.finished_at


@pytest.mark.parametrize("end", [status for status in Status if status.is_terminal])
def test_an_ended_job_refuses_every_state(end: Status) -> None:
    for status in Status:
        with pytest.raises(IllegalTransition):
            a_job(end).to(status)


def test_a_job_is_the_same_after_a_round_trip_through_its_record() -> None:
    job = a_job().to(Status.RUNNING)
    artifact = Artifact("out/a", 3, "00", "text/plain", "/data/a")
    failed = job.to(Status.FAILED, error=Failure("disk_full", "no space", tensor="a"))
    done = job.to(Status.SUCCEEDED, result={"passed": True}, artifacts=(artifact,))
    for each in (a_job(), job, failed, done):
        assert from_record(to_record(each)) == each


def test_a_field_that_a_request_left_out_is_still_left_out_when_read_back() -> None:
    request = quantize_request(Path("/models/a"), config={"bit_width": 8})
    job = Job("job_1", request, {}, Status.QUEUED, datetime.now(UTC))
    back = from_record(to_record(job)).request
    assert back.config is not None
    assert back.config.model_fields_set == {"bit_width"}
