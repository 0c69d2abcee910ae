"""What has to hold of a killed server: of its folders while it is dead, of its answers when it is back."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.kill_clients import Place, Promises
from bench.retrying import Json, Retrying

MANIFEST = "manifest.json"
TERMINAL = {"job.succeeded": "succeeded", "job.failed": "failed", "job.cancelled": "cancelled"}


class Visible:
    """Looks at the folders that jobs have written: each is whole, with the manifest that lists its files."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._known: set[tuple[Path, int]] = set()
        #: How many folders were looked at.
        self.looked_at = 0

    def check(self) -> None:
        """Raise AssertionError for a target that is there and not whole."""
        for root in {self._place.targets, self._place.elsewhere}:
            for folder in root.iterdir():
                if not folder.name.startswith("."):
                    self._check(folder)

    def _check(self, folder: Path) -> None:
        key = (folder, folder.stat().st_ino)
        if key not in self._known:
            check_output(folder)
            self._known.add(key)
            self.looked_at += 1


def check_output(folder: Path) -> None:
    """Raise AssertionError unless the files below are those of the manifest, to the byte."""
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert MANIFEST in there, f"{folder} has no manifest: {sorted(there)}"
    listed = {entry["path"]: entry for entry in json.loads((folder / MANIFEST).read_bytes())["files"]}
    assert there == {*listed, MANIFEST}, f"{folder} holds {sorted(there)}, its manifest lists {sorted(listed)}"
    for path, entry in listed.items():
        digest = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        assert digest == entry["sha256"], f"{folder / path} is not what its manifest says"


def check_not_lost(promises: Promises, accepted: Sequence[str], shown: Mapping[str, str], client: Retrying) -> None:
    """Raise AssertionError when what was `accepted` is gone, or what was `shown` to have ended is undone."""
    jobs = {job["id"]: job["status"] for job in client.jobs()}
    for job_id in accepted:
        assert job_id in jobs or job_id in promises.purged, f"{job_id}, which was accepted, is gone"
    for job_id, event in shown.items():
        if job_id in jobs:
            assert jobs[job_id] == TERMINAL[event], f"{job_id} ended with {event}, and is {jobs[job_id]}"


def check_end(promises: Promises, client: Retrying, data: Path, place: Place) -> None:
    """Raise AssertionError unless all jobs are there once, with all that belongs to them and nothing else."""
    jobs = {job["id"]: job for job in client.jobs()}
    expected = set(promises.accepted) - promises.purged
    assert set(jobs) == expected, f"lost {expected - set(jobs)}, not asked for {set(jobs) - expected}"
    for job in jobs.values():
        _check_job(job, promises, client)
    succeeded = {job_id for job_id, job in jobs.items() if job["status"] == "succeeded"}
    assert {path.name for path in (data / "artifacts").iterdir()} == succeeded
    for job_id, target in promises.targets.items():
        end = promises.shown[job_id][-1][1]
        assert target.exists() == (end == "job.succeeded"), f"{job_id} ended with {end}: {target}"
    assert not list((data / "work").iterdir()), "something is left in the work folder"
    assert not list((data / "blobs" / "parts").glob("*/*")), "a part of a blob is left"
    for root in {place.targets, place.elsewhere}:
        assert not [path for path in root.iterdir() if path.name.startswith(".")], f"something is left in {root}"


def _check_job(job: Json, promises: Promises, client: Retrying) -> None:
    job_id = job["id"]
    log = _log(job_id, client)
    ids = [event["id"] for event in log]
    assert ids == sorted(set(ids)), f"{job_id}: event ids do not grow: {ids}"
    types = Counter(event["type"] for event in log)
    assert sum(types[type_] for type_ in TERMINAL) == 1, f"{job_id}: {types}"
    assert types["job.queued"] == 1, f"{job_id}: {types}"
    assert types["job.started"] <= 1, f"{job_id}: {types}"
    assert TERMINAL[log[-1]["type"]] == job["status"], f"{job_id} is {job['status']} after {log[-1]['type']}"
    told = [(event["output"], event["name"]) for event in log if event["type"] == "tensor.completed"]
    assert len(told) == len(set(told)), f"{job_id}: a tensor was told twice"
    assert job["status"] != "failed", f"{job_id}: {job['error']}"
    assert job_id not in promises.cancelled or job["status"] == "cancelled", f"{job_id}: {job['status']}"
    # Whoever followed it over all restarts has seen all of the log, once, and nothing else.
    assert promises.shown[job_id] == [(event["id"], event["type"]) for event in log], f"{job_id}: shown otherwise"


def _log(job_id: str, client: Retrying) -> list[Json]:
    found: list[Json] = []
    after = 0
    while True:
        path = f"/v1/jobs/{job_id}/events?limit=200&after={after}"
        page = client.call("GET", "GET", path, accepted={200}, headers={"Accept": "application/json"}).json()
        found += page["data"]
        if "next_cursor" not in page:
            return found
        after = int(page["next_cursor"])


def check_same(promises: Promises, undisturbed: Promises) -> int:
    """How many results there are; raises AssertionError unless each is that of the undisturbed run."""
    count = 0
    for name, results in promises.results.items():
        ((_, expected),) = undisturbed.results[name]
        for job_id, files in results:
            assert files == expected, f"{name}, {job_id}: {_difference(files, expected)}"
            count += 1
    return count


def _difference(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    return sorted({path for path, _ in set(found.items()) ^ set(expected.items())})
