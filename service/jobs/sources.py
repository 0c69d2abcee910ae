"""Where a request's sources lie: an address, or an output of an earlier job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from service.errors import ArrowQuantError, InvalidConfig, ModelNotFound
from service.jobs.folders import Folders
from service.jobs.job import Job, Status
from service.jobs.request import JobRequest, JobSource, OutputRequest, QuantizeRequest, Source
from service.storage.file import locate_target, resolve_model


class Sources:
    """Finds models for requests. Blocks on files and the store."""

    def __init__(self, roots: Sequence[Path], folders: Folders, find_job: Callable[[str, str], Job | None]) -> None:
        """`find_job` takes an id and the tenant whose the job has to be."""
        self._roots = tuple(roots)
        self._folders = folders
        self._find_job = find_job

    def of(self, request: JobRequest, tenant: str) -> tuple[Path, ...]:
        """The paths of all sources of a request: one to quantize, original and quantized to validate.

        Only the tenant's own jobs are sources: any other's is as good as unknown.
        Raises InvalidConfig, ForbiddenPath, ModelNotFound or UnsupportedModel, with a pointer.
        """
        if isinstance(request, QuantizeRequest):
            return (self._resolve(request.source, "/source", tenant),)
        sources = ((request.original, "/original"), (request.quantized, "/quantized"))
        return tuple(self._resolve(source, pointer, tenant) for source, pointer in sources)

    def _resolve(self, source: Source, pointer: str, tenant: str) -> Path:
        if isinstance(source, JobSource):
            with pointing(pointer):
                return self._output_of_job(source, tenant)
        with pointing(f"{pointer}/uri"):
            return resolve_model(source.uri, self._roots)

    def _output_of_job(self, source: JobSource, tenant: str) -> Path:
        job = self._find_job(source.job_id, tenant)
        if job is None:
            raise ModelNotFound(f"there is no job {source.job_id!r}", pointer="/job_id")
        if job.status is not Status.SUCCEEDED or not isinstance(job.request, QuantizeRequest):
            raise InvalidConfig(f"job {job.id} is {job.status} and has written no model", pointer="/job_id")
        output = _choose(job.request.outputs, source.output)
        if output.uri is not None:
            return locate_target(output.uri, self._roots)
        return self._folders.artifacts(job.id) / output.folder


def _choose(outputs: Sequence[OutputRequest], name: str | None) -> OutputRequest:
    names = ", ".join(output.folder for output in outputs)
    if name is None and len(outputs) > 1:
        raise InvalidConfig(f"the job has several outputs: name one of {names}", pointer="/output")
    for output in outputs:
        if name in (None, output.folder):
            return output
    raise ModelNotFound(f"the job has no output {name!r}; there are {names}", pointer="/output")


@contextmanager
def pointing(prefix: str) -> Iterator[None]:
    """Put `prefix` before the pointer of an error that comes from a part of the request."""
    try:
        yield
    except ArrowQuantError as error:
        error.pointer = prefix + (error.pointer or "")
        raise
