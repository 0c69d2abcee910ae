"""Quantizing and validating on a server: submit, follow, fetch what was written."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.cli.client import Server
from service.cli.display import open_display
from service.cli.outcome import INTERRUPTED, Failed, mib
from service.cli.target import new_folder, refuse_inside, write_report
from service.cli.upload import upload_source
from service.engine.progress import Happening, Notice, Progress


def quantize_there(
    server: Server, body: dict[str, Any], out: Path, uploads: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """Have a service quantize, and fetch into `out` all that it wrote.

    `uploads` go there first, as the fields of the body by whose names they are: the source, its calibration.
    """
    for path in (uploads or {}).values():
        refuse_inside(out, path)
    with new_folder(out) as folder, server:
        for name, path in (uploads or {}).items():
            body = body | {name: upload_source(server, path)}
        job = run_job(server, body)
        _fetch(server, job["id"], folder)
    return job


def run_there(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """Have a service carry out a job that writes nothing but a report; the job."""
    with server:
        return run_job(server, body)


def run_job(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """Submit a job and see it through; Ctrl-C cancels it. Raises Failed when it does not succeed."""
    job_id = str(server.submit(body)["id"])
    print(f"{job_id} submitted to {server.url}", file=sys.stderr)
    try:
        return watch_job(server, job_id)
    except KeyboardInterrupt:
        job = server.cancel(job_id)
        problem = {"code": "interrupted", "detail": f"interrupted; job {job_id} is {job['status']}"}
        raise Failed(problem, status=INTERRUPTED, job=job) from None


def watch_job(server: Server, job_id: str) -> dict[str, Any]:
    """Show the events of a job until it has ended. Raises Failed when it did not succeed."""
    with open_display() as display:
        for event in server.follow(job_id):
            if happening := _happening(event.event, event.data):
                display(happening)
    job = server.job(job_id)
    if job["status"] != "succeeded":
        cancelled = {"code": "job_cancelled", "detail": f"job {job_id} was cancelled"}
        raise Failed(job.get("error", cancelled), job=job)
    return job


def _fetch(server: Server, job_id: str, folder: Path) -> None:
    for artifact in server.artifacts(job_id):
        print(f"fetching {artifact['path']} ({mib(artifact['size_bytes'])})", file=sys.stderr)
        server.download(job_id, artifact, _inside(folder, artifact["path"]))
    write_report(folder, server.report(job_id), server.report_page(job_id))


def _inside(folder: Path, path: str) -> Path:
    target = (folder / path).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise Failed({"code": "path_forbidden", "detail": f"the server names a file outside of its folder: {path}"})
    return target


def _happening(event: str, text: str) -> Happening | None:
    match event:
        case "job.progress":
            return Progress(**({"eta_s": None} | json.loads(text)["progress"]))
        case "job.warning":
            data = json.loads(text)
            return Notice(data["code"], data["text"], data.get("tensor"), data.get("output"))
    return None
