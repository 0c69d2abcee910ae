"""What is checked before a job is accepted, and what its request means, settled once for its whole life."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from service.engine.backends.base import CPU
from service.engine.backends.registry import backends, choose_backend
from service.engine.calibration.opening import open_calibration
from service.engine.checkpoint import JOURNAL
from service.engine.config import QuantizationConfig, ResolvedConfig, resolve
from service.engine.formats.registry import is_readable, open_model
from service.engine.memory_need import Need, check_need, need_to_quantize, need_to_validate
from service.engine.plan import OutputSpec, check_outputs, make_feed, make_plan
from service.errors import ArrowQuantError, InvalidCalibration, InvalidConfig, TargetInUse
from service.jobs.folders import REPORT
from service.jobs.job import Job
from service.jobs.looks import Looks
from service.jobs.request import JobRequest, OutputRequest, QuantizeRequest
from service.jobs.sources import Place, Sources, pointing
from service.storage.faults import storage_faults
from service.storage.file import resolve_target
from service.storage.remote_address import REMOTE_SCHEMES, scheme_of
from service.storage.stores import Stores

#: Names that the work folder needs for itself.
RESERVED = frozenset({REPORT, JOURNAL})
#: Of models that have more of them together, a caller is not made to wait until all plans are made.
MAX_TENSORS = 4_000


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may run: its configuration as JSON, and the folders that it alone may write to.

    `memory_bytes` is what it is predicted to need, by headers of so many `tensors`; None where that was not seen at
    once.
    """

    config: dict[str, Any]
    targets: tuple[PurePath, ...]
    device: str
    memory_bytes: int | None
    tensors: int


class Admission:
    """Checks requests. Blocks on files and the network."""

    def __init__(
        self,
        roots: Sequence[Path],
        stores: Stores,
        defaults: QuantizationConfig | None,
        sources: Sources,
        *,
        block_bytes: int,
        memory_limit_bytes: int,
    ) -> None:
        """`defaults` come between a profile and a request; no job may need more than `memory_limit_bytes`."""
        self._roots = tuple(roots)
        self._stores = stores.hurried
        self._defaults = defaults
        self._sources = sources
        self._block_bytes = block_bytes
        self._memory_limit_bytes = memory_limit_bytes

    def is_remote(self, request: JobRequest, tenant: str) -> bool:
        """Whether a tenant's request names anything in a store. Blocks on the job store."""
        outputs = request.outputs if isinstance(request, QuantizeRequest) else []
        return any(
            scheme_of(uri) in REMOTE_SCHEMES
            for uri in (*(output.uri or "" for output in outputs), *self._sources.uris(request, tenant))
        )

    def admit(
        self, request: JobRequest, tenant: str, max_tensors: int = MAX_TENSORS, looks: Looks | None = None
    ) -> Admitted:
        """All that a tenant's request can be refused for without reading more of a model than headers.

        `looks` are those of other requests that are admitted together. Headers of more than `max_tensors` are left
        to the job.
        Raises InvalidConfig, UnsupportedByFormat, ForbiddenPath, ModelNotFound, BlobNotFound, UnsupportedModel
        (PickledWeights, AlreadyQuantized), CorruptModel, InvalidCalibration, TargetInUse or ExceedsMemory, with a
        pointer where there is one; of addresses in a store also StoreRefused and StoreUnavailable.
        """
        config = self.resolve(request)
        targets: tuple[PurePath, ...] = ()
        with storage_faults("looking at the request's addresses"):
            if isinstance(request, QuantizeRequest):
                check_outputs(output_specs(request, config), is_calibrated=request.calibration is not None)
            with self._sources.looked_at(request, tenant) as places:
                for place in places:
                    if place.is_remote and looks is not None:
                        looks.once((place.path, place.pointer), partial(_check_readable, place))
                    else:
                        _check_readable(place)
                if isinstance(request, QuantizeRequest):
                    targets = self._targets(request.outputs, places)
                need, tensors = self._need(request, config, places, max_tensors)
        if need is not None:
            check_need(need, self._memory_limit_bytes)
        nbytes = None if need is None else need.nbytes
        return Admitted(config.model_dump(mode="json", exclude_none=True), targets, device_of(config), nbytes, tensors)

    def resolve(self, request: JobRequest) -> ResolvedConfig:
        """The configuration that holds for this request now."""
        config = resolve(request.profile, [self._defaults, request.config])
        with pointing("/config"):
            choose_backend(config.backend or "auto")
        return config

    def _need(
        self, request: JobRequest, config: ResolvedConfig, places: Sequence[Place], max_tensors: int
    ) -> tuple[Need | None, int]:
        """What the headers say that the job needs, and of how many tensors they are.

        None where these are too many or far away, or something is wrong with a model, which the job tells that reads
        it. Raises InvalidCalibration when a calibration is not the model's.
        """
        if max_tensors <= 0 or any(place.is_remote for place in places):
            return None, 0
        try:
            with ExitStack() as stack:
                readers = [stack.enter_context(closing(open_model(p.files()))) for p in places if not p.is_calibration]
                fed = [stack.enter_context(closing(open_calibration(p.files()))) for p in places if p.is_calibration]
                tensors = sum(len(reader.tensors) for reader in readers)
                if tensors > max_tensors:
                    return None, tensors
                if isinstance(request, QuantizeRequest):
                    plan = make_plan(readers[0], output_specs(request, config), *fed)
                    return need_to_quantize(plan, self._block_bytes), tensors
                feed = make_feed([config], fed[0]) if fed else None
                return need_to_validate(readers[0], readers[1], self._block_bytes, feed), tensors
        except InvalidCalibration:
            raise
        except ArrowQuantError:
            return None, 0

    def _targets(self, outputs: Sequence[OutputRequest], sources: Sequence[Place]) -> tuple[PurePath, ...]:
        targets: list[PurePath] = []
        claims = Claims()
        for index, output in enumerate(outputs):
            if output.uri is not None:
                with pointing(f"/outputs/{index}/uri"):
                    targets.append(self._free_target(output.uri))
                    claims.add(targets[-1])
                    _check_apart(targets[-1], sources)
        return tuple(targets)

    def _free_target(self, uri: str) -> PurePath:
        address = self._stores.target(uri)
        if address is None:
            return resolve_target(uri, self._roots)
        self._stores.check_free(address)
        return address.key


def output_specs(request: QuantizeRequest, config: ResolvedConfig) -> list[OutputSpec]:
    """The outputs as the engine takes them; `config` is the resolved one of the job."""
    return [_output_spec(index, request, output, config) for index, output in enumerate(request.outputs)]


def job_config(job: Job) -> ResolvedConfig:
    """The configuration that was resolved when the job was accepted."""
    return ResolvedConfig.model_validate(job.config)


def device_of(config: ResolvedConfig) -> str:
    """Where a job with this configuration computes."""
    try:
        return backends()[choose_backend(config.backend or "auto")].device
    except InvalidConfig:
        return CPU  # a backend that could run when the job was accepted: running it tells what is wrong


def target_pointers(request: JobRequest) -> list[str]:
    """Where in the request each of its targets stands, as JSON pointers."""
    outputs = request.outputs if isinstance(request, QuantizeRequest) else []
    return [f"/outputs/{index}/uri" for index, output in enumerate(outputs) if output.uri is not None]


class Claims:
    """Folders of which none is, holds, or lies in another; a look costs the same at a thousand of them."""

    def __init__(self, claimed: Iterable[PurePath] = ()) -> None:
        """What is claimed already is taken as it is."""
        self._claimed: set[PurePath] = set()
        self._above: set[PurePath] = set()
        for target in claimed:
            self._claim(target)

    def add(self, target: PurePath) -> None:
        """Claim one more; raises TargetInUse when it is not free."""
        if target in self._claimed or target in self._above or not self._claimed.isdisjoint(target.parents):
            raise TargetInUse("another output is being written to this address: choose another, or wait for its job")
        self._claim(target)

    def _claim(self, target: PurePath) -> None:
        self._claimed.add(target)
        self._above.update(target.parents)


def _check_apart(target: PurePath, sources: Sequence[Place]) -> None:
    """Raise InvalidConfig when a target lies in a model that is read, or around it."""
    for source in sources:
        if target.is_relative_to(source.path) or source.path.is_relative_to(target):
            raise InvalidConfig("the output would lie in the model that it is made of, or around it: write elsewhere")


def _output_spec(index: int, request: QuantizeRequest, output: OutputRequest, config: ResolvedConfig) -> OutputSpec:
    if output.folder in RESERVED:
        raise InvalidConfig(f"{output.folder!r} is a name the service needs itself", pointer=f"/outputs/{index}/name")
    if output.config is not None:
        base = QuantizationConfig.model_validate(config.model_dump(exclude={"profile"}, exclude_none=True))
        with pointing(f"/outputs/{index}"):
            config = resolve(request.profile, [base, output.config])
    return OutputSpec(name=output.folder, format=output.format, config=config, options=output.options or {})


def _check_readable(place: Place) -> None:
    """Refuse what no format takes for its own, such as pickled weights; the rest shows when it is read."""
    with closing(place.files()) as files:
        if place.is_calibration:
            with pointing(place.pointer):
                open_calibration(files).close()
        elif not is_readable(files):
            open_model(files).close()
