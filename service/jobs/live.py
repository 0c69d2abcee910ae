"""A job that has not ended: its state, its events, and who waits for it. Nothing is kept of it afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from service.engine.clock import Clock
from service.engine.progress import Happening, Progress, TensorCompleted
from service.jobs.batch import Place
from service.jobs.events import EVENT_OF_STATUS, RESUMED, Event, LiveLog, describe
from service.jobs.job import Job, Status
from service.jobs.journal import Entry, Journal
from service.jobs.stop import StopSignal
from service.jobs.watch import Watch

#: Between two progress events.
PROGRESS_INTERVAL_S = 0.1


class LiveJob:
    """One job from its acceptance to its end; everything on the event loop."""

    def __init__(
        self,
        job: Job,
        log: LiveLog,
        journal: Journal,
        on_end: Callable[[Job], None],
        watch: Watch,
        targets: tuple[PurePath, ...] = (),
        place: Place | None = None,
    ) -> None:
        """`on_end` is called when the job's last state is stored and has been shown; `place` is that in its batch."""
        self.log = log
        self.place = place
        self.stop = StopSignal()
        #: Where its time goes; told by the thread that runs it.
        self.clock = Clock()
        self.targets = targets
        self.ended = asyncio.Event()
        #: Whether an earlier server began it, and whether it was taken up since.
        self.is_left_over = job.status is Status.RUNNING
        self.is_resumed = False
        self._job = job
        self._shown = job
        self._journal = journal
        self._on_end = on_end
        self._watch = watch
        self._progress: Progress | None = job.progress
        self._times = job.times
        self._progress_timer: asyncio.TimerHandle | None = None
        self._next_progress_at = 0.0

    @property
    def tenant(self) -> str:
        """Whose the job is."""
        return self._job.tenant

    @property
    def status(self) -> Status:
        """Where the job stands, stored or not."""
        return self._job.status

    @property
    def job(self) -> Job:
        """The job as it is stored, with its newest progress and the times of that moment."""
        if self._shown.status.is_terminal:
            return self._shown
        return replace(self._shown, progress=self._progress, times=self._times)

    def to(self, status: Status, **changes: Any) -> None:
        """Take the job to its next state and emit the event; raises IllegalTransition."""
        job = self._job.to(status, **changes)
        if status.is_terminal:
            self._emit_held_progress()
            times = self.clock.times.seconds
            job = replace(job, progress=_last_progress(self._progress, status), times=times)
        self._job = job
        self._watch.moved(job)
        type_ = EVENT_OF_STATUS.get(status)
        self._put(type_, {"status": status.value}, job)

    def event(self, type_: str, data: dict[str, Any], whole: Job | None = None) -> Event:
        """A new event, with its place in the stream of the batch; nobody sees it before `publish`."""
        event = self.log.event(type_, data, whole)
        return self.place.merge(event) if self.place is not None else event

    def accepted(self, event: Event) -> None:
        """Show the first event of a new job, which is stored."""
        self._watch.created(self._job)
        self.publish(event)

    def publish(self, event: Event) -> None:
        """Show an event, which is stored if it is to be, to the readers of the job and of its batch."""
        self.log.publish(event)
        if self.place is not None:
            self.place.batch.publish(event)

    def resume(self) -> None:
        """Emit that a running job goes on in this process."""
        self.is_resumed = True
        self._put(RESUMED, {"status": self._job.status.value}, None)

    def happened(self, happening: Happening) -> None:
        """Take in what the engine reports: each tensor and notice, of progress the newest ten times a second."""
        if isinstance(happening, TensorCompleted):
            self._watch.tensor(self._job, happening)
        if not isinstance(happening, Progress):
            self._put(*describe(happening), None)
            return
        if self._progress is not None and happening.fraction < self._progress.fraction:
            # A tensor that was begun before is done again.
            happening = replace(happening, fraction=self._progress.fraction)
        self._progress = happening
        self._times = self.clock.times.seconds
        if self._progress_timer is None:
            loop = asyncio.get_running_loop()
            at = max(loop.time(), self._next_progress_at)
            self._progress_timer = loop.call_at(at, self._emit_progress)

    def _emit_progress(self) -> None:
        self._progress_timer = None
        self._next_progress_at = asyncio.get_running_loop().time() + PROGRESS_INTERVAL_S
        if self._progress is not None:
            self._put(*describe(self._progress), None)

    def _emit_held_progress(self) -> None:
        if self._progress_timer is not None:
            self._progress_timer.cancel()
            self._emit_progress()

    def _put(self, type_: str | None, data: dict[str, Any], job: Job | None) -> None:
        whole = job if job is not None and job.status.is_terminal else None
        event = self.event(type_, data, whole) if type_ is not None else None

        def show() -> None:
            if job is not None:
                self._shown = job
            if whole is not None:
                # Before the last event is seen: whoever then asks finds the job in the store.
                self._on_end(whole)
                self._watch.ended(whole, self.clock)
                self.ended.set()
            if event is not None:
                self.publish(event)

        self._journal.put(Entry(job, event, show))


def _last_progress(progress: Progress | None, status: Status) -> Progress | None:
    if progress is not None and status is Status.SUCCEEDED:
        return replace(progress, fraction=1.0, eta_s=None)
    return progress
