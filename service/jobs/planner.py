"""Plans of jobs that nobody has submitted: what they would do, and what that would cost here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from service.engine.budget import within_budgets
from service.engine.estimate import describe
from service.engine.plan import Plan, make_plan
from service.errors import Cancelled, Draining, QueueFull
from service.jobs.admission import Admission, output_specs
from service.jobs.backend_pool import BackendPool
from service.jobs.folders import Folders
from service.jobs.leases import Leases
from service.jobs.limited_threads import LimitedThreads
from service.jobs.request import QuantizeRequest
from service.jobs.sources import Sources, jobs_used
from service.jobs.tenant import DEFAULT_TENANT
from service.storage.faults import storage_faults

#: Plans that read and measure weights at once: each takes all cores for as long as that takes.
MEASURED_AT_ONCE = 1


class Planner:
    """Makes plans, and says what they cost."""

    def __init__(
        self,
        admission: Admission,
        sources: Sources,
        folders: Folders,
        backends: BackendPool,
        leases: Leases,
        store_threads: LimitedThreads,
        block_bytes: int,
        is_draining: Callable[[], bool],
    ) -> None:
        self._admission, self._sources, self._folders = admission, sources, folders
        self._backends, self._leases, self._store_threads = backends, leases, store_threads
        self._block_bytes, self._is_draining = block_bytes, is_draining
        self._measuring = LimitedThreads(MEASURED_AT_ONCE, "plan", _one_is_measured)

    async def make(self, request: QuantizeRequest, tenant: str = DEFAULT_TENANT) -> Plan:
        """What a tenant's job of this request would do to each tensor; raises what `submit` and reading headers do.

        Where a width is `auto` it reads and measures weights, and raises QueueFull while another plan does, or
        Draining when the server goes down.
        """
        with self._leases.held(*jobs_used(request)):
            is_auto, is_remote = await asyncio.to_thread(self._look, request, tenant)
            if is_auto:
                return await self._measuring.run(lambda: self._make(request, tenant))
            if is_remote:
                return await self._store_threads.run(lambda: self._make(request, tenant))
            return await asyncio.to_thread(self._make, request, tenant)

    def describe(self, plan: Plan) -> dict[str, Any]:
        """A plan with what it will cost here, as JSON; blocks, and the first time computes for a moment."""
        backend = self._backends.get(plan.outputs[0].config.backend or "auto")
        return describe(plan, backend, self._block_bytes, self._folders.room)

    def _look(self, request: QuantizeRequest, tenant: str) -> tuple[bool, bool]:
        """Whether weights have to be measured, and whether anything lies in a store."""
        specs = output_specs(request, self._admission.resolve(request))
        return any(spec.config.is_auto for spec in specs), self._admission.is_remote(request, tenant)

    def _make(self, request: QuantizeRequest, tenant: str) -> Plan:
        config = self._admission.resolve(request)
        with (
            storage_faults("reading the model"),
            self._folders.scratch() as inputs,
            self._sources.opened(request, tenant, inputs) as opened,
        ):
            reader = opened.models[0]
            plan = make_plan(reader, output_specs(request, config), opened.calibration)
            try:
                return within_budgets(
                    plan,
                    reader,
                    backend=self._backends.get(config.backend or "auto"),
                    memo=None,
                    report=lambda _: None,  # nobody follows it
                    cancelled=self._is_draining,
                )
            except Cancelled as error:
                raise Draining("the server is shutting down: try again when it is back") from error


def _one_is_measured() -> QueueFull:
    return QueueFull("the weights of another plan with `bit_width` auto are being measured: try again in a moment")
