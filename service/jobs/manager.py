"""All that can be done with jobs: submit, cancel, purge; and what start and end of a server mean.

Everything here runs on one event loop and never blocks it: the store has a thread of its own,
each running job has one, and files are looked at in others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, TypeVar

from service.engine.backends.registry import choose_backend
from service.engine.config import QuantizationConfig
from service.engine.formats.registry import formats
from service.errors import ArrowQuantError, Draining, NotReady, NotTerminal, StorageFailure
from service.jobs import key_table
from service.jobs.admission import Admission, device_of, job_config
from service.jobs.backend_pool import BackendPool, lanes_of
from service.jobs.batch import Batch
from service.jobs.batches import Batches
from service.jobs.blobs import BlobLimits, Blobs
from service.jobs.blobs import Key as BlobKey
from service.jobs.collector import Collector
from service.jobs.contents import Contents
from service.jobs.database import Database
from service.jobs.events import (
    READER_LIMIT,
    SERVER_DRAINING,
    Event,
    LiveLog,
    next_epoch,
)
from service.jobs.execution import UNKNOWN_BLOCKS, Execution
from service.jobs.expiry import expire
from service.jobs.figures import Figures, Stored, read_disk, read_stored
from service.jobs.folders import Folders
from service.jobs.idempotency import Keys, Once
from service.jobs.inquiry import Inquiry
from service.jobs.intake import Intake
from service.jobs.job import Job, Status
from service.jobs.journal import Journal
from service.jobs.leases import Leases
from service.jobs.live import LiveJob
from service.jobs.log_completion import complete_log
from service.jobs.machine_memory import default_limit_bytes
from service.jobs.memory import set_aside
from service.jobs.memory_ledger import MemoryLedger
from service.jobs.orphans import tidy
from service.jobs.overview import look_over
from service.jobs.planner import Planner
from service.jobs.publisher import Publisher
from service.jobs.quotas import NO_LIMITS, Limits
from service.jobs.recovery import Leftover, OpenBatch, open_batches, recover
from service.jobs.removal import Removals
from service.jobs.request import BatchRequest, JobRequest
from service.jobs.retention import KEEP_ALL, Rules
from service.jobs.runner import Runner
from service.jobs.source_jobs import SourceJobs
from service.jobs.sources import Sources, blobs_used, jobs_used
from service.jobs.standing import StandingTask
from service.jobs.store import Store
from service.jobs.store_threads import store_threads
from service.jobs.submission import Submission
from service.jobs.tenant import DEFAULT_TENANT
from service.jobs.threads import run_in_thread
from service.jobs.watch import Watch
from service.jobs.webhooks.webhooks import GRACE_S, WebhookOptions, Webhooks
from service.storage.store_options import StoreOptions
from service.storage.stores import Stores

logger = logging.getLogger(__name__)
T = TypeVar("T")
#: Submissions and plans that may wait for stores at once.
STORE_CALLS = 32


class JobManager:
    """The jobs of one data folder."""

    def __init__(
        self,
        *,
        data_dir: Path,
        model_roots: Sequence[Path] = (),
        stores: Stores | None = None,
        block_bytes: int = 64 << 20,
        threads: int = 1,
        max_running_jobs: int = 2,
        device_lanes: Mapping[str, int] | None = None,
        device_memory_bytes: int | None = None,
        max_queued_jobs: int = 1000,
        kept_places: int = 0,
        memory_limit_bytes: int | None = None,
        config_defaults: QuantizationConfig | None = None,
        blob_limits: BlobLimits | None = None,
        tenant_limits: Limits = NO_LIMITS,
        retention: Rules = KEEP_ALL,
        webhooks: WebhookOptions | None = None,
        silence_s: float = 15.0,
        reader_limit: int = READER_LIMIT,
        watch: Watch | None = None,
    ) -> None:
        """`config_defaults` come between a profile and a request; `reader_limit` is in events.

        `max_running_jobs` are the lanes of the CPU, `device_lanes` those of other devices, one each by default.
        `memory_limit_bytes` is for all running jobs together; by default what this machine lets a service have.
        `device_memory_bytes` is for each device other than the CPU; by default all that it has.
        `kept_places` of the queue are for tenants that have no job waiting.
        Without `stores` no address in one may be named.
        `tenant_limits` hold for a tenant that has none of its own in the store; `retention` is what sweeps go by.
        """
        #: Counts what becomes of jobs.
        self.watch = watch or Watch()
        self._data_dir = data_dir.absolute()
        self._roots = tuple(model_roots)
        stores = stores or Stores(StoreOptions())
        self._reader_limit = reader_limit
        self._folders = Folders(self._data_dir)
        #: Files that clients have sent.
        self.blobs = Blobs(self._data_dir / "blobs", lambda: self._opened_store, blob_limits or BlobLimits())
        self._source_jobs = SourceJobs()
        self._sources = Sources(self._roots, stores, self._folders, self._find_source, self.blobs)
        memory = MemoryLedger(memory_limit_bytes or default_limit_bytes())
        self._admission = Admission(
            self._roots,
            stores,
            config_defaults,
            self._sources,
            block_bytes=block_bytes,
            memory_limit_bytes=memory.limit_bytes,
        )
        self._publisher = Publisher(self._folders, self._roots, stores)
        #: What jobs wrote, for downloads.
        self.contents = Contents(stores)
        self._backends = BackendPool(threads, device_memory_bytes)
        self._default_backend = (config_defaults and config_defaults.backend) or "auto"
        self._runner = Runner(self._folders, self._sources, self._publisher, self._backends, block_bytes, memory)
        self._store: Store | None = None
        self._store_thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._live: dict[str, LiveJob] = {}
        self._database = database = Database(lambda: self._opened_store, self._store_thread)
        #: Who reads what of the data folder now.
        self.leases = Leases()
        #: What clients ask of jobs.
        self.jobs = Inquiry(self._live, database, self._folders, self.leases, silence_s=silence_s)
        self._removals = Removals(database, self._folders, self.leases, self._spawn)
        self._retention = retention
        #: Removes what is kept no longer.
        self.collector = Collector(database, self.leases, self._removals, self.blobs, self._blobs_in_use)
        lanes = lanes_of(max_running_jobs, device_lanes or {})
        self._execution = Execution(
            self._runner,
            self._live,
            self._spawn,
            lambda live: complete_log(live, self._journal, database, self._folders),
            lanes,
            lambda: self._backends.lanes_left(lanes),
            memory,
            UNKNOWN_BLOCKS * block_bytes,
        )
        #: What clients do with batches.
        self.batches = Batches(database, self._cancel_all, self._erase, silence_s=silence_s, reader_limit=reader_limit)
        #: What clients use to send a call again.
        self.keys = Keys(
            lambda key: database.read(lambda db: key_table.find(db, key)),
            lambda key, answer: database.change(lambda db: key_table.replace(db, key, answer)),
        )
        #: Whom jobs' users have told.
        self.webhooks = Webhooks(database, webhooks or WebhookOptions(), self.watch.metrics.registry)
        waiting = store_threads(STORE_CALLS)
        #: What clients may know beforehand.
        self.plans = Planner(
            self._admission,
            self._sources,
            self._folders,
            self._backends,
            self.leases,
            waiting,
            block_bytes,
            lambda: self._draining,
        )
        self._intake = Intake(
            database,
            self._admission,
            self.webhooks,
            self._execution,
            self.batches,
            waiting,
            self._live,
            self._adopt,
            self._forget,
            max_queued_jobs=max_queued_jobs,
            kept_places=kept_places,
            tenant_limits=tenant_limits,
            reader_limit=reader_limit,
        )
        self._draining = False
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- the life of the server ---

    async def start(self) -> None:
        """Open the data folder and go on with what an earlier server left.

        Queued jobs wait again, running ones go on from their checkpoint, cancelled ones are cleared
        away. Raises StorageFailure when another server holds the folder.
        """
        self._store, leftovers, batches = await self._in_store_thread(self._open)
        await asyncio.to_thread(self.blobs.create)
        await self._removals.clear_all()
        self._journal = Journal(self._write)
        for batch in batches:
            self.batches.reopen(batch.id, batch.jobs, batch.last_event_id)
        for leftover in leftovers:
            self._readopt(leftover)
        self.webhooks.deliverer.start()
        self._execution.open()
        self._warming = asyncio.create_task(self._warm_up())
        self._warming.add_done_callback(_log_fault)
        self._expiring = StandingTask("expiry", lambda: expire(self.collector, self._retention))
        self._tidying = asyncio.create_task(tidy(self._database, self._folders, self.leases, self.blobs))

    async def drain(self, timeout_s: float) -> None:
        """Take no more jobs, stop the running ones at their next block, and close the data folder.

        A stopped job keeps its checkpoint and its status, and goes on at the next start. Returns
        after `timeout_s` at the latest, then with threads still busy.
        """
        self._draining = True
        self._execution.close()
        for live in self._live.values():
            live.log.close(SERVER_DRAINING)
        self.batches.close(SERVER_DRAINING)
        if self._store is None:
            return
        self._warming.cancel()
        await self._expiring.stop()
        self._tidying.cancel()
        delivering = asyncio.create_task(self.webhooks.deliverer.stop(min(GRACE_S, timeout_s)))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in tuple(self._tasks):
            task.cancel()
        try:
            await asyncio.wait_for(self._journal.settled(), max(1.0, timeout_s / 10))
        except TimeoutError:
            logger.error("not everything could be written to the job database")
        await self._journal.stop()
        await delivering
        await self._in_store_thread(self._opened_store.close)
        self._store = None

    # --- jobs ---

    async def submit(self, request: JobRequest, tenant: str = DEFAULT_TENANT, once: Once[Job] | None = None) -> Job:
        """Accept a tenant's job, durably; it then runs when a lane is free. `once` is stored with it.

        Raises Draining, QueueFull, TooManyOpenJobs, StorageQuotaExceeded, or why the request cannot be carried out
        (see `Admission`).
        """
        jobs, _ = await self._take(Submission([request], tenant, once_job=once))
        return jobs[0]

    async def submit_batch(
        self, request: BatchRequest, tenant: str = DEFAULT_TENANT, once: Once[Batch] | None = None
    ) -> Batch:
        """Accept several jobs or none of them; raises what `submit` raises, which points to the item."""
        _, batch = await self._take(Submission(request.items, tenant, request.labels, once_batch=once))
        assert batch is not None, "labels make it one"
        return batch

    async def cancel(self, job_id: str, tenant: str | None = None) -> Job:
        """End a job that has not ended: at once when it waits, at its next block when it runs; raises NotFound."""
        live = self.jobs.live(job_id, tenant)
        if live is None:
            return await self.jobs.get(job_id, tenant)
        await self._cancel_all([job_id])
        return live.job

    async def purge(self, job_id: str, tenant: str | None = None) -> None:
        """Delete an ended job with its events, report and artifacts; raises NotFound, NotTerminal or JobInUse.

        Its files go when nobody reads them any more. Outputs that were written to an address of their own stay: they
        are the user's.
        """
        if self.jobs.live(job_id, tenant):
            raise NotTerminal(f"job {job_id} has not ended: cancel it first")
        await self.jobs.get(job_id, tenant)
        await self._erase([job_id])

    # --- how the service is ---

    @property
    def queue_depth(self) -> int:
        """How many jobs wait for a turn."""
        return self._execution.depth

    @property
    def running(self) -> int:
        """How many jobs have their turn."""
        return self._execution.running

    @property
    def live_jobs(self) -> int:
        """How many jobs are held in memory: those that have not ended."""
        return len(self._live)

    @property
    def readers(self) -> int:
        """How many streams of events are open on jobs and batches that have not ended."""
        return sum(live.log.readers for live in self._live.values()) + self.batches.readers

    @property
    def is_draining(self) -> bool:
        """Whether no more jobs are taken."""
        return self._draining

    @property
    def is_stuck(self) -> bool:
        """Whether a fault keeps what happens to jobs from being stored and shown."""
        return self._store is not None and self._journal.is_down

    @property
    def is_warm(self) -> bool:
        """Whether the backend has done what it does once, such as compiling, or could not."""
        return self._store is not None and self._warming.done()

    @property
    def warm_up_fault(self) -> str | None:
        """Why the backend could not do it."""
        fault = self._warming.exception() if self.is_warm and not self._warming.cancelled() else None
        if isinstance(fault, ArrowQuantError):
            return fault.detail
        return None if fault is None else "a fault keeps the kernels from being compiled: the server's log tells more"

    @property
    def backend(self) -> str:
        """The id of the backend that a job gets which does not name one."""
        return choose_backend(self._default_backend)

    @property
    def backends(self) -> BackendPool:
        """The instances that jobs compute with, for others to share."""
        return self._backends

    async def figures(self) -> Figures:
        """How many and how much there is now; what the database counts is left out while it is not open."""
        stored = await self._in_store_thread(self._read_stored)
        disk = await asyncio.to_thread(read_disk, self._data_dir)
        jobs = await look_over(self._live)
        seconds, nbytes = self.watch.metrics.stages(jobs.clocks)
        return Figures(
            open_jobs=jobs.open_jobs,
            queue_depth=self.queue_depth,
            running=self.running,
            readers=jobs.readers + self.batches.readers,
            stage_seconds=seconds,
            stage_bytes=nbytes,
            stored=stored,
            disk=disk,
        )

    # --- inside ---

    def _read_stored(self) -> Stored | None:
        try:
            with self._opened_store.reading() as db:
                return read_stored(db)
        except (NotReady, StorageFailure):
            return None

    def _open(self) -> tuple[Store, list[Leftover], list[OpenBatch]]:
        store = Store(self._data_dir)
        try:
            leftovers = recover(store, self._folders, self._publisher)
            with store.transaction() as db:
                key_table.remove_expired(db)
            return store, leftovers, open_batches(store, leftovers)
        except BaseException:
            store.close()
            raise

    async def _take(self, submission: Submission) -> tuple[list[Job], Batch | None]:
        self._check_open()
        # A client that hangs up in the middle leaves no half-accepted job.
        return await asyncio.shield(self._spawn(self._take_in(submission)))

    async def _take_in(self, submission: Submission) -> tuple[list[Job], Batch | None]:
        # Held until the new jobs do so themselves: between the look at a source and the claim nothing of it expires.
        used = [job_id for request in submission.requests for job_id in jobs_used(request)]
        with self.leases.held(*used), self._source_jobs.leases.held(*used):
            return await self._intake.take(submission, self._check_open)

    async def _erase(self, job_ids: Sequence[str]) -> None:
        """Delete ended jobs; raises JobInUse when one is the source of another, and then deletes none."""
        with self._source_jobs.purging(job_ids):
            await self.collector.erase(job_ids)

    def _find_source(self, job_id: str, tenant: str) -> Job | None:
        return None if self._source_jobs.is_going(job_id) else self._opened_store.get(job_id, tenant)

    async def _cancel_all(self, job_ids: Sequence[str]) -> None:
        """End those that have not ended. All waiting ones are out of the queue before a lane is freed."""
        for live in filter(None, map(self._live.get, job_ids)):
            self._execution.cancel(live)
        await self._journal.settled()

    def _adopt(self, job: Job, log: LiveLog, targets: tuple[PurePath, ...]) -> LiveJob:
        place = self.batches.place(job.batch_id, job.batch_index or 0) if job.batch_id else None
        live = LiveJob(job, log, self._journal, self._forget, self.watch, targets, place)
        self._live[job.id] = live
        self.leases.take(job.id, *jobs_used(job.request))
        self._source_jobs.leases.take(*jobs_used(job.request))
        return live

    def _forget(self, job: Job) -> None:
        del self._live[job.id]
        self.leases.give_back(job.id, *jobs_used(job.request))
        self._source_jobs.leases.give_back(*jobs_used(job.request))

    def _readopt(self, leftover: Leftover) -> None:
        job = leftover.job
        first = next_epoch(leftover.last_event_id)
        log = LiveLog(job.id, next_id=first, last_stored_id=leftover.last_event_id, reader_limit=self._reader_limit)
        live = self._adopt(job, log, leftover.targets)
        if job.status is Status.CANCELLING:
            self._execution.clear_away(live)  # which may have to wait for a store
            return
        self._execution.enqueue(live, device_of(job_config(job)), None, leftover.seconds_run)

    async def _warm_up(self) -> None:
        # A thread that no exit waits for: compiling may take long, and loading the compiler does already.
        await run_in_thread(self._load_all, name="warm-up")

    def _load_all(self) -> None:
        self._backends.get(self._default_backend).warm_up()
        formats()
        set_aside()

    def _blobs_in_use(self) -> set[BlobKey]:
        return {key for live in self._live.values() for key in blobs_used(live.job)}

    async def _write(self, jobs: Sequence[Job], events: Sequence[Event]) -> None:
        if await self._in_store_thread(lambda: self._opened_store.write(jobs, events)):
            self.webhooks.deliverer.wake()

    async def _in_store_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._store_thread, work)

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_fault)
        return task

    def _check_open(self) -> None:
        if self._draining:
            raise Draining("the server is shutting down and takes no new jobs: try again when it is back")
        self._check_started()

    def _check_started(self) -> None:
        if self._store is None:
            raise NotReady("the server is starting: try again in a moment")

    @property
    def _opened_store(self) -> Store:
        if self._store is None:
            raise NotReady("the server is starting: try again in a moment")
        return self._store


def _log_fault(task: asyncio.Task[Any]) -> None:
    """Tell of what nobody may be waiting for. What is wrong with a request is its sender's to hear."""
    fault = None if task.cancelled() else task.exception()
    if fault is not None and not isinstance(fault, ArrowQuantError):
        logger.error("a fault in a task of the server", exc_info=fault)
