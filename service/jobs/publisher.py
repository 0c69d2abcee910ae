"""From complete outputs to published ones, so that a crash anywhere in between can be gone on from.

The engine leaves complete outputs in the work folder. Then, in this order: the report is written
beside them, which commits the job to publishing; each output is renamed to its target, or uploaded; the report
moves to the artifacts; the work folder goes. Once the report is there, an output that is missing
from the work folder has been published.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from service.engine.formats.weights import MANIFEST
from service.engine.progress import Cancelled as Stopped
from service.engine.publish import publish, stop_when
from service.engine.report import RunReport
from service.errors import ArrowQuantError, RequestError, StorageFailure
from service.jobs.folders import Folders
from service.jobs.job import Artifact, Job
from service.jobs.remote_output import RemoteOutput
from service.jobs.request import OutputRequest, QuantizeRequest
from service.jobs.sources import pointing
from service.storage.durable import copy_folder, remove, sync, write_file
from service.storage.faults import storage_faults
from service.storage.file import locate_target
from service.storage.remote_address import RemoteAddress
from service.storage.stores import Stores

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """Where an output goes: a folder of the artifacts, or `is_elsewhere` at an address of its own."""

    name: str
    path: Path
    is_elsewhere: bool

    def location(self, file: PurePosixPath) -> str:
        """Where one of its files lies then."""
        return str(self.path / file)


@dataclass(frozen=True, slots=True)
class RemoteTarget:
    """An address in a store, where an output goes."""

    name: str
    address: RemoteAddress

    def location(self, file: PurePosixPath) -> str:
        """Where one of its files lies then."""
        return self.address.file(str(file))


class Publisher:
    """Publishes and discards what jobs write. Blocks on files and the network; raises OSError or ArrowQuantError."""

    def __init__(self, folders: Folders, roots: Sequence[Path], stores: Stores) -> None:
        self._folders = folders
        self._roots = tuple(roots)
        self._stores = stores
        self._remotes: dict[tuple[str, str], RemoteOutput] = {}

    def committed(self, job_id: str) -> RunReport | None:
        """The report of a job whose outputs are complete, published or not."""
        for path in (self._folders.report(job_id), self._folders.pending_report(job_id)):
            if path.exists():
                return load_report(path)
        return None

    def commit(self, job_id: str, report: RunReport) -> None:
        """Note that all outputs are complete."""
        path = self._folders.pending_report(job_id)
        path.parent.mkdir(exist_ok=True)
        with storage_faults("writing the report"):
            write_file(path, json.dumps(report.to_json()).encode())

    def publish(self, job: Job, report: RunReport, stopped: Stopped) -> tuple[Artifact, ...]:
        """Put every output that is not there yet in its place, and the report last."""
        targets = self._targets(job)
        folder = self._folders.artifacts(job.id)
        folder.mkdir(exist_ok=True)
        for target in targets:
            stop_when(stopped)
            with storage_faults(f"putting output {target.name!r} in its place"):
                if isinstance(target, RemoteTarget):
                    self._remote(job.id, target).publish(stopped)
                    self._forget(job.id, target)
                    continue
                self._publish(job.id, target, stopped)
        pending = self._folders.pending_report(job.id)
        if pending.exists():
            pending.replace(self._folders.report(job.id))
        # Once for all that lies here: before that nothing is gone from the work folder for good.
        sync(folder)
        sync(folder.parent)
        remove(self._folders.work(job.id))
        return _artifacts(report, targets)

    def discard(self, job: Job) -> None:
        """Remove all that a job has written, published or not. Says nothing of what is not there."""
        is_committed = self._folders.report(job.id).exists() or self._folders.pending_report(job.id).exists()
        for target in self._targets_elsewhere(job):
            if isinstance(target, RemoteTarget):
                if is_committed:  # nothing is uploaded before
                    self._take_back(job.id, target)
                continue
            beside = _beside(target, job.id)
            remove(beside)
            if is_committed and self._is_published(job.id, target):
                # Out of sight in one step: a crash must not leave half of it where others look.
                with suppress(FileNotFoundError):
                    target.path.rename(beside)
                remove(beside)
        remove(self._folders.artifacts(job.id))
        remove(self._folders.work(job.id))

    def _take_back(self, job_id: str, target: RemoteTarget) -> None:
        """Remove what was uploaded; a store that does not let us keeps it, and the log says where."""

        def published() -> list[PurePosixPath]:
            report = self.committed(job_id)
            outputs = report.outputs if report is not None else ()
            return [file.path for output in outputs if output.name == target.name for file in output.files]

        try:
            self._remote(job_id, target).discard(published)
        except (ArrowQuantError, ValueError) as error:
            why = error.detail if isinstance(error, ArrowQuantError) else "its report is damaged"
            address = target.address.file("")
            logger.warning("job %s: what it wrote to %s could not be removed: %s", job_id, address, why)
        finally:
            self._forget(job_id, target)

    def _remote(self, job_id: str, target: RemoteTarget) -> RemoteOutput:
        """The same from when it is published until that is done or taken back: it knows what is under way."""
        made = RemoteOutput(job_id, target.name, self._folders.work(job_id), target.address, self._stores)
        return self._remotes.setdefault((job_id, target.name), made)

    def _forget(self, job_id: str, target: RemoteTarget) -> None:
        self._remotes.pop((job_id, target.name), None)

    def _publish(self, job_id: str, target: Target, stopped: Stopped) -> None:
        work = self._folders.work(job_id) / target.name
        if self._is_published(job_id, target):
            if not target.path.exists():
                raise StorageFailure(f"output {target.name!r} was written and then removed by someone else")
            remove(work)
            return
        if not _on_one_file_system(work, target.path.parent):
            beside = _beside(target, job_id)
            remove(beside)
            copy_folder(work, beside, stopped)
            stop_when(stopped)
            publish(beside, target.path)
            remove(work)
            return
        publish(work, target.path, synced=target.is_elsewhere)

    def _is_published(self, job_id: str, target: Target) -> bool:
        """Of a committed job: whether the output is at its target already."""
        work = self._folders.work(job_id) / target.name
        if not work.exists():
            return True
        if _on_one_file_system(work, target.path.parent):
            return False
        # Perhaps copied, and killed before all of the original was removed: one without a manifest is half gone.
        ours, there = work / MANIFEST, target.path / MANIFEST
        return there.is_file() and (not ours.is_file() or there.read_bytes() == ours.read_bytes())

    def _targets(self, job: Job) -> list[Target | RemoteTarget]:
        if not isinstance(job.request, QuantizeRequest):
            return []
        return [self._target(job.id, index, output) for index, output in enumerate(job.request.outputs)]

    def targets_elsewhere(self, job: Job) -> tuple[PurePath, ...]:
        """The folders outside the artifacts that a job may write to, and the keys of addresses in stores."""
        targets = self._targets_elsewhere(job)
        return tuple(target.path if isinstance(target, Target) else target.address.key for target in targets)

    def _targets_elsewhere(self, job: Job) -> list[Target | RemoteTarget]:
        try:
            targets = self._targets(job)
            return [target for target in targets if isinstance(target, RemoteTarget) or target.is_elsewhere]
        except RequestError:
            # The roots were changed or the folder around it is gone: nothing of ours can be reached there.
            return []

    def _target(self, job_id: str, index: int, output: OutputRequest) -> Target | RemoteTarget:
        if output.uri is None:
            return Target(output.folder, self._folders.artifacts(job_id) / output.folder, False)
        with pointing(f"/outputs/{index}/uri"):
            if (address := self._stores.target(output.uri)) is not None:
                return RemoteTarget(output.folder, address)
            return Target(output.folder, locate_target(output.uri, self._roots), True)


def load_report(path: Path) -> RunReport:
    """The report that a file holds."""
    return RunReport.from_json(json.loads(path.read_bytes()))


def _on_one_file_system(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _beside(target: Target, job_id: str) -> Path:
    return target.path.with_name(f".{target.path.name}.arrowquant-{job_id}")


def _artifacts(report: RunReport, targets: Sequence[Target | RemoteTarget]) -> tuple[Artifact, ...]:
    by_name = {target.name: target for target in targets}
    return tuple(
        Artifact(
            path=f"{output.name}/{file.path}",
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            media_type=file.media_type,
            location=by_name[output.name].location(file.path),
        )
        for output in report.outputs
        if output.name in by_name
        for file in output.files
    )
