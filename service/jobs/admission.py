"""What is checked before a job is accepted, and what its request means, settled once for its whole life."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.engine.backends.registry import choose_backend
from service.engine.config import QuantizationConfig, ResolvedConfig, resolve
from service.engine.formats.registry import is_readable, open_model
from service.engine.pipeline import JOURNAL
from service.engine.plan import OutputSpec, check_outputs
from service.errors import InvalidConfig, TargetInUse
from service.jobs.folders import REPORT
from service.jobs.job import Job
from service.jobs.request import JobRequest, OutputRequest, QuantizeRequest
from service.jobs.sources import Place, Sources, pointing
from service.storage.faults import storage_faults
from service.storage.file import resolve_target

#: Names that the work folder needs for itself.
RESERVED = frozenset({REPORT, JOURNAL})


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may run: its configuration as JSON, and the folders that it alone may write to."""

    config: dict[str, Any]
    targets: tuple[Path, ...]


class Admission:
    """Checks requests. Blocks on files."""

    def __init__(self, roots: Sequence[Path], defaults: QuantizationConfig | None, sources: Sources) -> None:
        """`defaults` come between a profile and a request."""
        self._roots = tuple(roots)
        self._defaults = defaults
        self._sources = sources

    def admit(self, request: JobRequest, tenant: str) -> Admitted:
        """All that a tenant's request can be refused for without reading a model.

        Raises InvalidConfig, UnsupportedByFormat, ForbiddenPath, ModelNotFound, BlobNotFound, UnsupportedModel
        (PickledWeights, AlreadyQuantized), CorruptModel or TargetInUse, with a pointer where there is one.
        """
        config = self.resolve(request)
        targets: tuple[Path, ...] = ()
        with storage_faults("looking at the request's addresses"):
            if isinstance(request, QuantizeRequest):
                check_outputs(output_specs(request, config))
            with self._sources.looked_at(request, tenant) as places:
                for place in places:
                    _check_readable(place)
                if isinstance(request, QuantizeRequest):
                    targets = self._targets(request.outputs, places)
        return Admitted(config.model_dump(mode="json", exclude_none=True), targets)

    def resolve(self, request: JobRequest) -> ResolvedConfig:
        """The configuration that holds for this request now."""
        config = resolve(request.profile, [self._defaults, request.config])
        with pointing("/config"):
            choose_backend(config.backend or "auto")
        return config

    def _targets(self, outputs: Sequence[OutputRequest], sources: Sequence[Place]) -> tuple[Path, ...]:
        targets: list[Path] = []
        claims = Claims()
        for index, output in enumerate(outputs):
            if output.uri is not None:
                with pointing(f"/outputs/{index}/uri"):
                    targets.append(resolve_target(output.uri, self._roots))
                    claims.add(targets[-1])
                    _check_apart(targets[-1], sources)
        return tuple(targets)


def output_specs(request: QuantizeRequest, config: ResolvedConfig) -> list[OutputSpec]:
    """The outputs as the engine takes them; `config` is the resolved one of the job."""
    return [_output_spec(index, request, output, config) for index, output in enumerate(request.outputs)]


def job_config(job: Job) -> ResolvedConfig:
    """The configuration that was resolved when the job was accepted."""
    return ResolvedConfig.model_validate(job.config)


def target_pointers(request: JobRequest) -> list[str]:
    """Where in the request each of its targets stands, as JSON pointers."""
    outputs = request.outputs if isinstance(request, QuantizeRequest) else []
    return [f"/outputs/{index}/uri" for index, output in enumerate(outputs) if output.uri is not None]


class Claims:
    """Folders of which none is, holds, or lies in another; a look costs the same at a thousand of them."""

    def __init__(self, claimed: Iterable[Path] = ()) -> None:
        """What is claimed already is taken as it is."""
        self._claimed: set[Path] = set()
        self._above: set[Path] = set()
        for target in claimed:
            self._claim(target)

    def add(self, target: Path) -> None:
        """Claim one more; raises TargetInUse when it is not free."""
        if target in self._claimed or target in self._above or not self._claimed.isdisjoint(target.parents):
            raise TargetInUse("another output is being written to this address: choose another, or wait for its job")
        self._claim(target)

    def _claim(self, target: Path) -> None:
        self._claimed.add(target)
        self._above.update(target.parents)


def _check_apart(target: Path, sources: Sequence[Place]) -> None:
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
    if not is_readable(files := place.files()):
        open_model(files).close()
