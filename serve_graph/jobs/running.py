"""The jobs that this process has in hand: in line, under way, and on their way into the index. Knows no requests.

It begins jobs when their turn comes, records their ends, renews their leases, and at a stop hands back what it can't
end.
"""

import asyncio
import contextvars
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

from schemas.errors import (
    DeadlineExceeded,
    InternalError,
    JobCancelled,
    JobNotFound,
    Problem,
    ShuttingDown,
    WanError,
)
from schemas.health import LastError, QueueHealth
from schemas.jobs import (
    JobRecord,
    JobState,
    Progress,
    RenderedClip,
)
from schemas.webhooks import WebhookDelivery
from serve_graph.jobs.attempts import Attempts
from serve_graph.jobs.batches import Batches
from serve_graph.jobs.calling import Caller
from serve_graph.jobs.census import Census
from serve_graph.jobs.janitor import Janitor
from serve_graph.jobs.limits import Patiences, QueueLimits
from serve_graph.jobs.line import Line, Scheduling
from serve_graph.jobs.live import LiveJob
from serve_graph.jobs.outbox import Outbox
from serve_graph.jobs.platform import Platform
from serve_graph.jobs.recording import Lost, Recorder
from serve_graph.jobs.takeover import Sweeper
from serve_graph.jobs.turns import Turns
from serve_graph.jobs.worker import Worker
from serve_graph.logs import log_event, log_failure, log_job
from serve_graph.metrics import IngressMetrics

STOPPED = "the service is stopping; the job goes on at its next start: ask for it by its id"

LAST_WORDS_S = 15.0
"""At a stop, for indexes and webhooks of jobs that have ended; an attempt at a webhook takes 10 s at most."""

LINE_LOOKS = 64
"""Jobs in line that are looked at per renewal, in turn: another process may have taken them up."""


class Running:
    """All of it belongs to one event loop.

    make_batches: makes the batches of this process, which need this object. platform: runs all jobs; this process
    begins none then.
    """

    def __init__(
        self,
        recorder: Recorder,
        worker: Worker,
        outbox: Outbox,
        metrics: IngressMetrics,
        limits: QueueLimits,
        patiences: Patiences,
        *,
        model: str,
        make_batches: Callable[["Running"], Batches],
        platform: Platform | None = None,
    ) -> None:
        self._recorder = recorder
        self._records = recorder.records
        self._outbox = outbox
        self._metrics = metrics
        self._limits = limits
        self._patiences = patiences
        self._attempts = Attempts(worker, recorder, patiences, on_start=self._note_start, on_retry=self._note_retry)
        self._live: dict[str, LiveJob] = {}
        self.line = Line(Scheduling(limits.max_dispatched_jobs, limits.policy, limits.max_stretch))
        self.census = Census()
        self.caller = None if platform is None else Caller(platform, recorder, self.census)
        self.turns = Turns(lambda: self.line.num_under_way, self.dispatch) if limits.by_call else None
        self.creating: set[asyncio.Task[None]] = set()
        self._filing: set[asyncio.Task[None]] = set()
        self._tending: list[asyncio.Task[None]] = []
        self._looked_at = 0
        self.draining = False
        self.drained = asyncio.Event()
        self.last_error: LastError | None = None
        self.batches = make_batches(self)
        self._sweeper = Sweeper(recorder, patiences, model=model, jobs=self, batches=self.batches)
        self._janitor = Janitor(recorder, patiences)
        self._tell_metrics()

    def start(self) -> None:
        """Renew the leases of this process's jobs, and see to those that nobody works on, until `drain`."""
        for tending in (self._renewing(), self._looking_at_line(), self._sweeper.run(), self._janitor.run()):
            self._tending.append(asyncio.create_task(tending, context=contextvars.Context()))

    async def tidy(self) -> None:
        """One round of the janitor's. Raises StoreUnavailable."""
        await self._janitor.tidy()

    def queue(self) -> QueueHealth:
        """How full the service is."""
        census = self.census
        return QueueHealth(waiting=census.waiting, running=census.running, capacity=self._limits.max_waiting_jobs)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new jobs, let those under way end, and hand back to the store what has not after `timeout_s`."""
        self.draining = True
        while self.creating:
            await asyncio.wait(list(self.creating))
        await self.batches.committed()
        for live in [live for live in self.line if live.waiters == 0]:
            self._leave(live)
        tasks = self._tasks()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        self._recorder.hurrying = True
        for live in self.line:
            self._leave(live)
        for live in list(self._live.values()):
            live.handed_back = not live.ending
            live.stop(ShuttingDown(STOPPED))
        while tasks := self._tasks():
            await asyncio.wait(tasks)
        self.drained.set()
        for task in self._tending:
            task.cancel()
        if self._filing:  # a webhook that takes longer is tried again by the next process
            _, late = await asyncio.wait(list(self._filing), timeout=LAST_WORDS_S)
            for task in late:
                task.cancel()
        await asyncio.gather(*self._tending, *self._filing, return_exceptions=True)

    async def looked(self) -> None:
        """Wait until this process knows what waits in the store. It has been started."""
        await self._sweeper.looked.wait()

    def is_live(self, job_id: str) -> bool:
        """Whether this process has the job in hand."""
        return job_id in self._live

    def room(self) -> int:
        """How many more jobs this process would take in line."""
        return 0 if self.draining else max(0, self._limits.max_waiting_jobs - self.queue().waiting)

    def adopt(self, record: JobRecord, etag: str) -> None:
        """Put a queued job in line that another process, or an earlier one, has recorded."""
        if self.caller is not None:
            self.spawn(self.caller.see(record, etag))
        elif not self.draining and record.job_id not in self._live:
            live = LiveJob(record, etag, began=time.monotonic())
            self._enqueue(live)
            if self.batches.took(record):  # and it was cancelled
                self.cancel_live(live)

    def live(self, job_id: str) -> LiveJob | None:
        """The job, where this process has it in hand."""
        return self._live.get(job_id)

    def in_hand(self, job_id: str) -> LiveJob | None:
        """As `live`, but for a job that only waits here: another process may have taken it up, and ended it."""
        return None if job_id in self.line else self._live.get(job_id)

    def cancel_live(self, live: LiveJob) -> None:
        """Cancel a job of this process without waiting for its end."""
        self.spawn(self.cancel_here(live))

    def webhook_due_in_s(self, record: JobRecord) -> float | None:
        """Seconds until an ended job's webhook may be tried; None where there is none to deliver."""
        return self._outbox.due_in_s(record.webhook)

    async def file(self, record: JobRecord, etag: str) -> None:
        """Give an ended job its place in the index, collect what its lost attempts left, and try its webhook."""
        try:
            if record.attempts > 1:
                await self._recorder.io(self._records.discard_lost_clips, record)
            await self._recorder.io(self._records.file_as_done, record)
            self.batches.filed(record.job_id, record.state)
            if record.awaits_webhook:
                told = await self._outbox.deliver(record, etag)
                if not told.awaits_webhook:
                    await self._recorder.io(self._records.file_as_done, told)
        except WanError as failure:  # the entry stays active, so a sweep does it again
            log_failure("filing_failed", failure, job_id=record.job_id)

    async def create(self, record: JobRecord) -> None:
        """Write a new record and put its job in line, here or by a call."""
        try:
            etag = await self._recorder.io(self._records.create, record)
        finally:
            self.census.submitting[record.principal] -= 1
        if self.caller is not None:
            self.census.elsewhere[record.principal] += 1
            await self.caller.begin(record, etag)
        elif record.job_id not in self._live:  # a sweep may have found it first
            self._enqueue(LiveJob(record, etag, began=time.monotonic()))

    def _enqueue(self, live: LiveJob) -> None:
        self._live[live.job_id] = live
        self.census.came(live)
        self._join(live)
        self.dispatch()
        self._tell_metrics()

    def dispatch(self) -> None:
        """Let the next jobs go, as many as may be under way at once."""
        while self.caller is None and (self.turns is None or self.turns.free):
            for head in [] if self.draining else self.batches.heads(self.line):
                self._live[head.job_id] = head
                self.census.came(head)
                self._join(head)
            live = self.line.next()
            if live is None:
                return
            live.task = asyncio.create_task(self._run(live), context=contextvars.Context())

    def _join(self, live: LiveJob) -> None:
        """Put a job in line, with its deadline."""
        left_s = self._deadline_left_s(live.record)
        self.line.join(live, left_s)
        if left_s is not None:
            live.expiry = asyncio.get_running_loop().call_later(left_s, self._expire, live)

    @staticmethod
    def _deadline_left_s(record: JobRecord) -> float | None:
        """Seconds until the request's deadline. After a restart the wall clock has to say how much has passed."""
        deadline_s = record.request.deadline_s
        if deadline_s is None:
            return None
        passed_s = (datetime.now(UTC) - record.created_at).total_seconds()
        return max(0.0, deadline_s - max(0.0, passed_s))

    async def _run(self, live: LiveJob) -> None:
        """A job from its turn to its end. The boundary where every failure becomes the job's."""
        state, clip, error = JobState.FAILED, None, None
        try:
            clip = await self._attempts.clip(live)
            state = JobState.SUCCEEDED
        except Lost:
            live.lost = True
        except (asyncio.CancelledError, JobCancelled) as cancelled:
            if isinstance(cancelled, asyncio.CancelledError) and not live.stopping:
                raise  # the event loop ends under the job, as if the process were killed: its lease will run out
            why = live.stopped_by or JobCancelled()
            state = JobState.CANCELLED if isinstance(why, JobCancelled) else JobState.FAILED
            error = why.problem(job_id=live.job_id)
        except Exception as failure:  # whatever it is, the job has to end
            known = failure if isinstance(failure, WanError) else InternalError()
            if known.status >= 500:
                log_failure("job_failed", failure, job_id=live.job_id, request_id=live.record.request_id)
            error = known.problem(job_id=live.job_id)
        live.ending = True
        try:
            if live.handed_back and clip is None and isinstance(live.stopped_by, ShuttingDown):
                await self._hand_back(live)
            elif not live.lost:
                live.handed_back = False
                await self._end(live, state, clip, error)
            if live.lost and live.started:
                await self._attempts.discard_clip(live)
        finally:
            self._let_go(live)
            self.dispatch()

    def _let_go(self, live: LiveJob) -> None:
        """This process has the job no longer in hand."""
        del self._live[live.job_id]
        self.line.leave(live)
        if self.turns is not None:
            self.turns.job_went()
        self.census.went(live)
        self.batches.went(live)
        if live.expiry is not None:
            live.expiry.cancel()
        live.ended.set()
        live.tell()
        if live.record.state.is_terminal and live.etag is not None and not (live.lost or live.unrecorded):
            self.spawn(self.file(live.record, live.etag))
        self._tell_metrics()

    def _leave(self, live: LiveJob) -> None:
        """Leave a waiting job to the next process: its record says already that nobody has it."""
        live.handed_back = True
        self._let_go(live)

    async def _hand_back(self, live: LiveJob) -> None:
        try:
            async with live.writing:  # a claim may be on its way to the store
                owned_here = live.record.state.is_owned
            if owned_here:
                await self._recorder.move(live, JobState.QUEUED, lease=None)
            log_event("job_handed_back", job_id=live.job_id, request_id=live.record.request_id)
        except (Lost, WanError) as failure:  # whoever finds the lease run out takes the job over
            log_failure("hand_back_failed", failure, job_id=live.job_id)
        if live.started:
            await self._attempts.discard_clip(live)

    async def _end(self, live: LiveJob, state: JobState, result: RenderedClip | None, error: Problem | None) -> None:
        """Record the end and tell the log and the metrics."""
        unwanted = state is not JobState.SUCCEEDED
        try:
            url = live.record.request.webhook_url
            webhook = None if url is None else WebhookDelivery(url=url)
            await self._recorder.move(live, state, result=result, error=error, lease=None, webhook=webhook)
        except Lost:
            live.lost = True
            return
        except Exception as failure:  # whatever it is, the waiter has to hear of it
            # The waiter learns why; the record keeps the last state that could be written.
            log_failure("record_failed", failure, job_id=live.job_id)
            known = failure if isinstance(failure, WanError) else InternalError()
            unwanted = False  # nobody can say what was written
            state, result, error = JobState.FAILED, None, known.problem(job_id=live.job_id)
            live.record = live.record.model_copy(update={"state": state, "error": error})
            live.unrecorded = True
        seconds = time.monotonic() - live.began
        timings = result.timings if result is not None else None
        name = error.name if error is not None else ""
        if error is not None and error.status >= 500:
            self.last_error = LastError(error=name, job_id=live.job_id, at=datetime.now(UTC))
        if unwanted and live.started:
            await self._attempts.discard_clip(live)
        if result is not None:
            self.line.learn(live, result)
        self._metrics.job_ended(state, seconds, error=name, timings=timings)
        log_job(
            request_id=live.record.request_id,
            job_id=live.job_id,
            state=state,
            duration_s=seconds,
            prompt_hash=live.record.prompt_hash,
            parameters=live.record.parameters,
            error=name or None,
            timings=timings,
        )

    async def cancel_here(self, live: LiveJob) -> None:
        """Cancel a job of this process and wait for its end."""
        self._stop(live, JobCancelled())
        await live.ended.wait()

    def _expire(self, live: LiveJob) -> None:
        """The job's deadline is over."""
        self._stop(live, DeadlineExceeded(live.record.request.deadline_s or 0.0))

    def _stop(self, live: LiveJob, reason: WanError) -> None:
        """End a job of this process early, whether it waits or runs."""
        if self.line.leave(live):
            live.task = asyncio.create_task(self._end_unbegun(live, reason), context=contextvars.Context())
        else:
            live.stop(reason)

    async def _end_unbegun(self, live: LiveJob, reason: WanError) -> None:
        live.ending = True
        state = JobState.CANCELLED if isinstance(reason, JobCancelled) else JobState.FAILED
        try:
            await self._end(live, state, None, reason.problem(job_id=live.job_id))
        finally:
            self._let_go(live)
            self.dispatch()

    async def _renewing(self) -> None:
        """Renew the leases of this process's jobs while the worker advances."""
        while True:
            await asyncio.sleep(self._patiences.renewal_s)
            running = [live for live in self._live.values() if live.record.state.is_owned]
            if running and time.monotonic() - self._attempts.last_advance < self._patiences.stall_s:
                await asyncio.gather(*map(self._renew, running))

    def _told_elsewhere(self, live: LiveJob) -> Progress | None:
        """A job's progress with the seconds until it is done, not only those of the device that are its own."""
        place = self.line.outlook(live) if self.line.is_calibrated else None
        if live.progress is None or place is None:
            return live.progress
        return live.progress.model_copy(update={"seconds_left": place.seconds_left})

    async def _renew(self, live: LiveJob) -> None:
        try:
            await self._recorder.renew(live, self._told_elsewhere(live))
        except Lost:
            live.lost = True
            live.stop()
        except Exception as failure:  # the store is away, for others too; the record's ETag guards what follows
            log_failure("renewal_failed", failure, job_id=live.job_id)
        else:
            if live.record.cancel_requested:
                live.stop(JobCancelled())

    async def _looking_at_line(self) -> None:
        while True:
            await asyncio.sleep(self._patiences.renewal_s)
            await self._look_at_line()

    async def _look_at_line(self) -> None:
        """Let go of jobs in line that another process has taken up, ended or deleted meanwhile; some at a time."""
        waiting = [live for live in self.line if live.etag is not None]
        if not waiting:
            return
        self._looked_at = self._looked_at % len(waiting)
        some = waiting[self._looked_at : self._looked_at + LINE_LOOKS]
        self._looked_at += LINE_LOOKS
        for live in some:
            try:
                if await self._recorder.io(self._records.etag, live.job_id) == live.etag:
                    continue
            except JobNotFound:
                pass
            except Exception as failure:  # the boundary, as for renewals
                log_failure("look_failed", failure, job_id=live.job_id)
                return
            if live.job_id in self.line:
                live.lost = True
                self._let_go(live)

    def _note_start(self, live: LiveJob) -> None:
        self.census.moved(live)
        self._tell_metrics()

    def _note_retry(self, live: LiveJob, failure: WanError) -> None:
        self._metrics.job_retried(failure.name)
        self.last_error = LastError(error=failure.name, job_id=live.job_id, at=datetime.now(UTC))

    def _tell_metrics(self) -> None:
        queue = self.queue()
        self._metrics.set_queue(queue.waiting, queue.running, queue.capacity)

    def _tasks(self) -> Sequence[asyncio.Task[None]]:
        return [live.task for live in self._live.values() if live.task is not None]

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that nobody waits for but `drain`."""
        task = asyncio.create_task(work, context=contextvars.Context())
        self._filing.add(task)
        task.add_done_callback(self._filing.discard)
