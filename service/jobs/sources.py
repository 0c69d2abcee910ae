"""Where a request's sources lie: an address, or an output of an earlier job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from service.engine.formats.base import ModelReader
from service.engine.formats.layout import files_under
from service.engine.formats.registry import open_model
from service.errors import ArrowQuantError, InvalidConfig, ModelNotFound
from service.jobs.folders import Folders
from service.jobs.job import Job, Status
from service.jobs.request import JobRequest, JobSource, OutputRequest, QuantizeRequest, Source
from service.storage.file import check_links, resolve_model


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a model lies, and the folders that its files must not lead out of."""

    path: Path
    roots: tuple[Path, ...]


class Sources:
    """Finds models for requests. Blocks on files and the store."""

    def __init__(self, roots: Sequence[Path], folders: Folders, find_job: Callable[[str], Job | None]) -> None:
        self._roots = tuple(roots)
        self._folders = folders
        self._find_job = find_job

    def of(self, request: JobRequest) -> tuple[Path, ...]:
        """The paths of all sources of a request: one to quantize, original and quantized to validate.

        Raises InvalidConfig, ForbiddenPath, ModelNotFound, UnsupportedModel or, for an index,
        CorruptModel, with a pointer.
        """
        return tuple(place.path for place in self._places(request))

    @contextmanager
    def opened(self, request: JobRequest) -> Iterator[list[ModelReader]]:
        """The sources in the order of `of`, open until the block ends; raises what `of` and `open_model` raise."""
        with ExitStack() as stack:
            readers = []
            for place in self._places(request):
                reader = stack.enter_context(closing(open_model(place.path)))
                # Once more: a file may have become a link since. From here on the reader knows its files.
                check_links(reader.files, place.roots)
                readers.append(reader)
            yield readers

    def _places(self, request: JobRequest) -> Iterator[_Place]:
        if isinstance(request, QuantizeRequest):
            yield self._resolve(request.source, "/source")
        else:
            yield self._resolve(request.original, "/original")
            yield self._resolve(request.quantized, "/quantized")

    def _resolve(self, source: Source, pointer: str) -> _Place:
        if isinstance(source, JobSource):
            with pointing(pointer):
                return self._output_of_job(source)
        with pointing(f"{pointer}/uri"):
            return self._at(source.uri)

    def _output_of_job(self, source: JobSource) -> _Place:
        job = self._find_job(source.job_id)
        if job is None:
            raise ModelNotFound(f"there is no job {source.job_id!r}", pointer="/job_id")
        if job.status is not Status.SUCCEEDED or not isinstance(job.request, QuantizeRequest):
            raise InvalidConfig(f"job {job.id} is {job.status} and has written no model", pointer="/job_id")
        output = _choose(job.request.outputs, source.output)
        if output.uri is not None:
            return self._at(output.uri)  # where anybody may have put links since
        artifacts = self._folders.artifacts(job.id)
        return _Place(artifacts / output.folder, (artifacts,))

    def _at(self, uri: str) -> _Place:
        path = resolve_model(uri, self._roots)
        check_links(files_under(path), self._roots)
        return _Place(path, self._roots)


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
