"""Where a request's sources lie: an address, an output of an earlier job, or blobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath

from service.engine.calibration.calibration import Calibration
from service.engine.calibration.opening import open_calibration
from service.engine.formats.base import ModelReader
from service.engine.formats.layout import files_under
from service.engine.formats.registry import open_model
from service.engine.formats.source import LocalFiles
from service.engine.progress import Cancelled
from service.errors import ArrowQuantError, ArtifactsExpired, InvalidConfig, ModelNotFound, SourceChanged
from service.jobs.blobs import Blobs
from service.jobs.blobs import Key as BlobKey
from service.jobs.folders import Folders
from service.jobs.job import Job, Status
from service.jobs.request import BlobsSource, JobRequest, JobSource, OutputRequest, QuantizeRequest, Source
from service.storage.durable import write_file
from service.storage.file import check_links, resolve_model
from service.storage.model_files import ModelFiles
from service.storage.remote_address import HUB_SCHEME, RemoteAddress
from service.storage.stores import Stores

#: The field of a request that names no model.
CALIBRATION = "calibration"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model or a calibration lies, and the folders that its files must not lead out of.

    `path` is that of a file or folder of this machine, or the key of an address in a store; the files of
    that are looked up by `find`. `pointer` is where the request names it.
    """

    path: PurePath
    roots: tuple[Path, ...]
    pointer: str
    find: Callable[[Cancelled | None], ModelFiles] | None = None
    is_calibration: bool = False

    def files(self, cancelled: Cancelled | None = None) -> ModelFiles:
        """Its files, for a format to look at or to open, and to be closed.

        `cancelled` is asked while they are read; without it a client waits. Raises what `Stores.files`
        raises, with the pointer.
        """
        if self.find is None:
            return LocalFiles(Path(self.path), self.roots)
        with pointing(self.pointer):
            return self.find(cancelled)

    @property
    def is_remote(self) -> bool:
        """Whether looking at its files takes calls to a store."""
        return self.find is not None

    def check(self, reader: ModelReader) -> None:
        """Raise ForbiddenPath when one of the files that a reader has opened, or will, leads out of the roots."""
        source = reader.layout.source
        if isinstance(source, LocalFiles):
            check_links((source.root / name for name in reader.files), self.roots)


@dataclass(frozen=True, slots=True)
class Opened:
    """The models of a request: one to quantize, original and quantized to validate; and its calibration, if it has."""

    models: Sequence[ModelReader]
    calibration: Calibration | None


class Sources:
    """Finds models for requests. Blocks on files, the job store and the network."""

    def __init__(
        self,
        roots: Sequence[Path],
        stores: Stores,
        folders: Folders,
        find_job: Callable[[str, str], Job | None],
        blobs: Blobs,
    ) -> None:
        """`find_job` takes an id and the tenant whose the job has to be."""
        self._roots = tuple(roots)
        self._stores = stores
        self._folders = folders
        self._find_job = find_job
        self._blobs = blobs

    def uris(self, request: JobRequest, tenant: str) -> Iterator[str]:
        """The addresses that a tenant's request may lead to, those among them that earlier jobs wrote to."""
        for _, source in _named_sources(request):
            if isinstance(source, JobSource):
                job = self._find_job(source.job_id, tenant)
                if job is not None and isinstance(job.request, QuantizeRequest):
                    yield from (output.uri for output in job.request.outputs if output.uri is not None)
            elif not isinstance(source, BlobsSource):
                yield source.uri

    @contextmanager
    def looked_at(self, request: JobRequest, tenant: str) -> Iterator[tuple[Place, ...]]:
        """Where all sources of a request lie: one to quantize and its calibration, original and quantized to validate.

        For as long as the context is open: links to blobs are gone afterwards. Only the tenant's own jobs
        and blobs are sources: any other's are as good as unknown. Raises InvalidConfig, ForbiddenPath,
        ModelNotFound, BlobNotFound, UnsupportedModel or, for an index, CorruptModel, with a pointer.
        """
        with self._folders.scratch() as inputs:
            yield tuple(self._places(request, tenant, inputs))

    @contextmanager
    def opened(
        self, request: JobRequest, tenant: str, inputs: Path, cancelled: Cancelled | None = None
    ) -> Iterator[Opened]:
        """The sources, open until the block ends.

        Blobs are linked below the folder `inputs`, which is made if need be and may hold the links already; it
        also keeps which commit of the hub is read. Raises Cancelled when `cancelled` says so, and what
        `looked_at`, `open_model` and `open_calibration` raise.
        """
        with ExitStack() as stack:
            models: list[ModelReader] = []
            calibration: Calibration | None = None
            for place in self._places(request, tenant, inputs):
                files = stack.enter_context(closing(place.files(cancelled)))
                if place.is_calibration:
                    with pointing(place.pointer):
                        calibration = stack.enter_context(closing(open_calibration(files)))
                    continue
                models.append(stack.enter_context(closing(open_model(files))))
                # Once more: a file may have become a link since. From here on the reader knows its files.
                place.check(models[-1])
            yield Opened(models, calibration)

    def _places(self, request: JobRequest, tenant: str, inputs: Path) -> Iterator[Place]:
        for name, source in _named_sources(request):
            place = self._resolve(source, f"/{name}", tenant, inputs / name)
            yield replace(place, is_calibration=name == CALIBRATION)

    def _resolve(self, source: Source, pointer: str, tenant: str, inputs: Path) -> Place:
        if isinstance(source, JobSource):
            with pointing(pointer):
                return self._output_of_job(source, pointer, tenant, inputs)
        if isinstance(source, BlobsSource):
            with pointing(pointer):
                self._blobs.lay_out(tenant, source.digests, inputs)
                # Where there are no hard links, what lies in `inputs` are links to where the blobs lie.
                return Place(inputs, (inputs, self._blobs.root), pointer)
        with pointing(f"{pointer}/uri"):
            return self._at(source.uri, f"{pointer}/uri", inputs)

    def _output_of_job(self, source: JobSource, pointer: str, tenant: str, inputs: Path) -> Place:
        job = self._find_job(source.job_id, tenant)
        if job is None:
            raise ModelNotFound(f"there is no job {source.job_id!r}", pointer="/job_id")
        if job.status is not Status.SUCCEEDED or not isinstance(job.request, QuantizeRequest):
            raise InvalidConfig(f"job {job.id} is {job.status} and has written no model", pointer="/job_id")
        output = _choose(job.request.outputs, source.output)
        if output.uri is not None:
            return self._at(output.uri, pointer, inputs)  # where anybody may have put links since
        if job.artifacts_expired_at is not None:
            detail = f"the files of job {job.id} were kept until {job.artifacts_expired_at:%Y-%m-%d %H:%M:%S} UTC"
            raise ArtifactsExpired(f"{detail}: run it again, or write to a `uri` of your own", pointer="/job_id")
        artifacts = self._folders.artifacts(job.id)
        return Place(artifacts / output.folder, (artifacts,), pointer)

    def _at(self, uri: str, pointer: str, inputs: Path) -> Place:
        address = self._stores.address(uri)
        if address is not None:
            return Place(address.key, (), pointer, partial(self._in_store, address, inputs))
        path = resolve_model(uri, self._roots)
        try:
            check_links(files_under(path), self._roots)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SourceChanged(f"{uri!r} changed while it was looked at: submit the job again") from error
        return Place(path, self._roots, pointer)

    def _in_store(self, address: RemoteAddress, inputs: Path, cancelled: Cancelled | None) -> ModelFiles:
        """The files at an address; a branch of the hub is what it was when the job first looked."""
        stores, stopped = (self._stores, cancelled) if cancelled else (self._stores.hurried, lambda: False)
        if address.scheme == HUB_SCHEME:
            pin = inputs.with_name(f"{inputs.name}.commit")
            if not pin.exists():
                pin.parent.mkdir(parents=True, exist_ok=True)
                write_file(pin, stores.pinned(address, stopped).revision.encode())
            return stores.files(address, stopped, pin.read_text())
        return stores.files(address, stopped)


def jobs_used(request: JobRequest) -> Iterator[str]:
    """The jobs whose outputs a request reads."""
    yield from (source.job_id for _, source in _named_sources(request) if isinstance(source, JobSource))


def blobs_used(job: Job) -> Iterator[BlobKey]:
    """The blobs that a job is made of."""
    for _, source in _named_sources(job.request):
        if isinstance(source, BlobsSource):
            yield from ((job.tenant, digest) for digest in source.digests.values())


def _named_sources(request: JobRequest) -> tuple[tuple[str, Source], ...]:
    """The sources with the names of their fields."""
    fed = () if request.calibration is None else ((CALIBRATION, request.calibration),)
    if isinstance(request, QuantizeRequest):
        return (("source", request.source), *fed)
    return (("original", request.original), ("quantized", request.quantized), *fed)


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
