"""The job service: admission, the record's life, progress, cancellation. Knows nothing of Ray, HTTP or models.

Every generation is a job. `submit` checks and records it; from then on it runs as a task of its own, which
outlives the request that asked for it. All durable truth is in the record (`storage.job_records`); what is kept
here, progress above all, dies with the process. The rest of the graph is behind the `Worker` protocol.
"""

import asyncio
import contextvars
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any, Protocol, TypeVar

from schemas.clips import Clip
from schemas.errors import (
    ClipNotFound,
    FieldError,
    InternalError,
    InvalidRequest,
    JobCancelled,
    JobNotFound,
    ModelNotReady,
    Problem,
    QueueFull,
    QuotaExceeded,
    RecordedFailure,
    ShuttingDown,
    StoreUnavailable,
    WanError,
    WorkerLost,
)
from schemas.handoff import PreparedPrompt, RenderEvent, RenderTask, Started
from schemas.health import GeneratorHealth, LastError, QueueHealth
from schemas.jobs import Job, JobRecord, JobState, Progress, RenderedClip, job_id_of, new_job_id
from schemas.model_profile import ModelProfile
from schemas.requests import GenerateRequest, GenerationParameters, url_ttl
from serve_graph.api_keys import NOBODY, Principal
from serve_graph.logs import log_event, log_failure, log_job
from serve_graph.metrics import IngressMetrics
from serve_graph.patience import Patience
from serve_graph.prompts import clean_prompt, prompt_hash, surely_fits
from storage.job_records import JobRecords
from storage.keys import clip_key
from storage.store import PreconditionFailed, PresignedUrl, Presigner

T = TypeVar("T")

WATCH_INTERVAL_S = 10.0
"""Between two looks at the worker while a job runs."""

_STOPPED = "the service was stopped before the job was done; send the request again elsewhere or later"

MAX_RETRY_AFTER_S = 600

MAX_ATTEMPTS = 3
"""Attempts at one job whose worker may be lost: the job itself may be what ends the process."""


class Worker(Protocol):
    """The preprocessor and the generator, as the job service sees them."""

    async def check(self, parameters: GenerationParameters) -> None:
        """Raises PromptTooLong, for either text."""

    async def prepare(self, parameters: GenerationParameters) -> PreparedPrompt:
        """Encode both texts."""

    def render(self, task: RenderTask, prompt: PreparedPrompt) -> AsyncGenerator[RenderEvent, None]:
        """Render one clip; ends with the `RenderedClip`. Closing the iterator cancels the work."""

    async def health(self) -> GeneratorHealth:
        """Raises WanError when one of the two does not answer in time."""


@dataclass(frozen=True)
class QueueLimits:
    """max_waiting_jobs: beyond it, QueueFull. max_dispatched_jobs: handed to the worker at once.

    max_clip_pixels: width x height x frames of one clip that fit into the device's memory; None: all that is legal.
    """

    max_waiting_jobs: int
    max_dispatched_jobs: int
    max_clip_pixels: int | None = None


@dataclass(frozen=True)
class Patiences:
    """How long a job waits for a lost worker to be replaced, and for a store that is away, in seconds."""

    worker_s: float
    store_s: float


@dataclass
class _LiveJob:
    """A job that this process runs."""

    record: JobRecord
    etag: str
    began: float
    progress: Progress | None = None
    started: bool = False
    ending: bool = False
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class JobService:
    """Runs jobs for one ingress replica. All methods belong to one event loop."""

    def __init__(
        self,
        *,
        profile: ModelProfile,
        worker: Worker,
        records: JobRecords,
        presigner: Presigner,
        limits: QueueLimits,
        patiences: Patiences,
        default_url_ttl: timedelta,
        hash_secret: bytes,
        metrics: IngressMetrics,
        executor: Executor,
        clip_retention: timedelta | None = None,
    ) -> None:
        self._profile = profile
        self._worker = worker
        self._records = records
        self._presigner = presigner
        self._limits = limits
        self._patiences = patiences
        self._default_url_ttl = default_url_ttl
        self._clip_retention = clip_retention
        self._hash_secret = hash_secret
        self._metrics = metrics
        self._executor = executor
        self._live: dict[str, _LiveJob] = {}
        self._submitting: Counter[str] = Counter()
        self._creating: dict[str, asyncio.Task[None]] = {}
        self._draining = False
        self._hurrying = False
        self._slots = asyncio.Semaphore(limits.max_dispatched_jobs)
        self._mean_job_s: float | None = None
        self.last_error: LastError | None = None
        self._tell_metrics()

    async def submit(self, request: GenerateRequest, request_id: str, principal: Principal = NOBODY) -> JobRecord:
        """Check a request, record its job and start it. Returns the record as it was created.

        Raises InvalidRequest, PromptTooLong, QueueFull, QuotaExceeded, ShuttingDown, StoreFull, StoreUnavailable;
        no job exists then.
        """
        self._refuse_if_draining()
        parameters = self._profile.resolve(request)
        self._refuse_url_beyond_clip(request)
        self._refuse_beyond_memory(parameters)
        cleaned = clean_prompt(parameters.prompt)
        if not cleaned:
            raise InvalidRequest([FieldError(field="prompt", message="is blank once it is cleaned as Wan does")])
        self._admit(principal)
        self._submitting[principal.name] += 1  # until `_create` has made it a live job
        try:
            if not self._surely_fits(cleaned, parameters):
                await self._worker.check(parameters)
                self._refuse_if_draining()
        except BaseException:
            self._submitting[principal.name] -= 1
            raise
        record = JobRecord(
            job_id=new_job_id(),
            request_id=request_id,
            principal=principal.name,
            state=JobState.QUEUED,
            at={JobState.QUEUED: datetime.now(UTC)},
            attempt_token=token_hex(8),
            request=request,
            parameters=parameters,
            model=self._profile.name,
            prompt_hash=prompt_hash(self._hash_secret, parameters.prompt),
        )
        # An empty context: Serve cancels what runs in a request's context when its client goes away.
        creating = asyncio.create_task(self._create(record), context=contextvars.Context())
        self._creating[record.job_id] = creating
        try:
            await asyncio.shield(creating)
        except asyncio.CancelledError:
            # Nobody will learn this job's id: the write can't be stopped, so what it begins is.
            creating.add_done_callback(lambda _: self.cancel(record.job_id))
            raise
        return record

    async def wait(self, job_id: str) -> Clip:
        """Wait for a job of this process to end. Raises the problem it ended with."""
        live = self._live.get(job_id)
        if live is not None:
            await live.ended.wait()
            return self._clip(live.record)
        return self._clip(await self._record(job_id))

    async def job(self, job_id: str, principal: Principal = NOBODY) -> Job:
        """The job as its owner sees it, with progress when this process runs it. Raises JobNotFound."""
        live = self._live.get(job_id)
        record = _owned(live.record if live is not None else await self._record(job_id), principal)
        return Job(
            job_id=record.job_id,
            state=record.state,
            created_at=record.at[JobState.QUEUED],
            request_id=record.request_id,
            progress=live.progress if live is not None else None,
            clip=self._clip(record) if record.state is JobState.SUCCEEDED else None,
            error=record.error,
        )

    async def clip_url(self, clip_id: str, principal: Principal = NOBODY) -> PresignedUrl:
        """A freshly signed URL for a finished clip of this owner. Raises ClipNotFound."""
        try:
            record = _owned(await self._record(job_id_of(clip_id)), principal)
        except JobNotFound as error:
            raise ClipNotFound from error
        if record.result is None or record.clip_id != clip_id:
            raise ClipNotFound
        return self._presign(record, record.result)

    def cancel(self, job_id: str) -> None:
        """Cancel a job of this process, unless it has ended or its end is being recorded."""
        live = self._live.get(job_id)
        if live is not None:
            # Behind its first step: a task that is cancelled before that never enters its `try`.
            asyncio.get_running_loop().call_soon(self._cancel_now, live)

    def queue(self) -> QueueHealth:
        """How full the service is."""
        running = sum(live.started for live in self._live.values())
        return QueueHealth(
            waiting=len(self._live) - running + self._submitting.total(),
            running=running,
            capacity=self._limits.max_waiting_jobs,
        )

    async def drain(self, timeout_s: float) -> None:
        """Refuse new jobs, let those of this process end, and cancel what has not after `timeout_s`."""
        self._draining = True
        if self._creating:
            await asyncio.wait(self._creating.values())
        tasks = {job_id: live.task for job_id, live in self._live.items() if live.task is not None}
        if not tasks:
            return
        _, late = await asyncio.wait(tasks.values(), timeout=timeout_s)
        if late:
            self._hurrying = True
            for job_id in list(self._live):
                self.cancel(job_id)
            await asyncio.wait(late)

    def _refuse_if_draining(self) -> None:
        if self._draining:
            raise ShuttingDown("the service is shutting down; send the request again elsewhere or later")

    def _refuse_beyond_memory(self, parameters: GenerationParameters) -> None:
        fitting, frame = self._limits.max_clip_pixels, parameters.width * parameters.height
        if fitting is None or frame * parameters.num_frames <= fitting:
            return
        legal = f"at most {fitting // frame} frames of {parameters.width}x{parameters.height} fit into this device"
        raise InvalidRequest([FieldError(field="num_frames", message=f"too many; {legal}", legal=legal)])

    def _refuse_url_beyond_clip(self, request: GenerateRequest) -> None:
        kept = self._clip_retention
        if kept is not None and url_ttl(request, self._default_url_ttl) > kept:
            legal = f"up to {int(kept.total_seconds())}"
            mistake = FieldError(field="url_ttl_s", message=f"clips are deleted sooner; legal: {legal}", legal=legal)
            raise InvalidRequest([mistake])

    def _admit(self, principal: Principal) -> None:
        waiting, allowed = self.queue().waiting, self._limits.max_waiting_jobs
        if waiting >= allowed:
            raise QueueFull(allowed, self._seconds_for(waiting))
        allowed = principal.max_waiting_jobs or allowed
        mine = self._submitting[principal.name] + sum(
            live.record.principal == principal.name and not live.started for live in self._live.values()
        )
        if mine >= allowed:
            raise QuotaExceeded(allowed, self._seconds_for(mine))

    def _seconds_for(self, num_jobs: int) -> int:
        seconds = (self._mean_job_s or 1.0) * num_jobs / self._limits.max_dispatched_jobs
        return min(MAX_RETRY_AFTER_S, max(1, round(seconds)))

    def _surely_fits(self, cleaned: str, parameters: GenerationParameters) -> bool:
        """Whether no text can be too long, so that the preprocessor need not be asked first."""
        limit = self._profile.max_sequence_length
        negative = parameters.negative_prompt
        return surely_fits(cleaned, limit) and (
            not parameters.does_guidance
            or negative == self._profile.defaults.negative_prompt
            or surely_fits(clean_prompt(negative), limit)
        )

    async def _create(self, record: JobRecord) -> None:
        """Write a new record and start its job."""
        try:
            etag = await self._io(self._records.create, record)
        finally:
            del self._creating[record.job_id]
            self._submitting[record.principal] -= 1
        live = _LiveJob(record, etag, began=time.monotonic())
        self._live[record.job_id] = live
        live.task = asyncio.create_task(self._run(live))
        self._tell_metrics()

    @staticmethod
    def _cancel_now(live: _LiveJob) -> None:
        if live.task is not None and not live.ending:
            live.task.cancel()

    async def _run(self, live: _LiveJob) -> None:
        """A job from its slot to its end. The boundary where every failure becomes the job's."""
        state, clip, error = JobState.FAILED, None, None
        try:
            async with self._slots:
                clip = await self._watched(self._attempts(live))
            state = JobState.SUCCEEDED
        except asyncio.CancelledError:
            why = ShuttingDown(_STOPPED) if self._hurrying else JobCancelled()
            state, error = JobState.CANCELLED, why.problem(job_id=live.record.job_id)
        except Exception as failure:  # whatever it is, the job has to end
            known = failure if isinstance(failure, WanError) else InternalError()
            if known.status >= 500:
                log_failure("job_failed", failure, job_id=live.record.job_id, request_id=live.record.request_id)
            error = known.problem(job_id=live.record.job_id)
        live.ending = True
        try:
            await self._end(live, state, clip, error)
        finally:
            self._live.pop(live.record.job_id, None)
            live.ended.set()
            self._tell_metrics()

    async def _watched(self, attempts: Coroutine[Any, Any, RenderedClip]) -> RenderedClip:
        """What the attempts come to. Raises WorkerLost when the worker stays away: a call to it may wait for ever."""
        working, watching = asyncio.create_task(attempts), asyncio.create_task(self._worker_stays_away())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            watching.result()
            raise WorkerLost("the model has been away for too long; send the request again later", 60)
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _worker_stays_away(self) -> None:
        """Returns once the worker has been away for as long as a job waits for it."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            patience = Patience(self._patiences.worker_s)
            if not await self._worker_answers() and not await self._worker_is_back(patience):
                return

    async def _attempts(self, live: _LiveJob) -> RenderedClip:
        """One attempt after another, until one ends by itself: a worker that is lost is not the job's fault."""
        lost, patience = 0, None
        while True:
            try:
                return await self._render(live)
            except (WorkerLost, ModelNotReady, ShuttingDown) as failure:
                if not isinstance(failure, ModelNotReady):
                    lost += 1
                if patience is None or live.started:
                    patience = Patience(self._patiences.worker_s)
                if lost == MAX_ATTEMPTS or not await self._worker_is_back(patience):
                    raise
                await self._forget_attempt(live, failure)

    async def _worker_is_back(self, patience: Patience) -> bool:
        while await patience.pause():
            if await self._worker_answers():
                return True
        return False

    async def _worker_answers(self) -> bool:
        try:
            await self._worker.health()
        except WanError:
            return False
        return True

    async def _forget_attempt(self, live: _LiveJob, failure: WanError) -> None:
        """Make way for the next attempt: nothing of the lost one shows, or is left where it can be found."""
        record = live.record
        log_event(
            "job_retried",
            level=logging.WARNING,
            job_id=record.job_id,
            request_id=record.request_id,
            error=failure.name,
        )
        self._metrics.job_retried(failure.name)
        self.last_error = LastError(error=failure.name, job_id=record.job_id, at=datetime.now(UTC))
        if live.started:
            await self._discard_clip(record)
        live.started, live.progress = False, None
        self._tell_metrics()

    async def _render(self, live: _LiveJob) -> RenderedClip:
        """One attempt. Its token is new unless it is the job's first."""
        taken = time.monotonic()
        parameters = live.record.parameters
        token = {} if live.record.state is JobState.QUEUED else {"attempt_token": token_hex(8)}
        _, prompt = await asyncio.gather(
            self._transition(live, JobState.PREPARING, **token), self._worker.prepare(parameters)
        )
        prepared = time.monotonic()
        task = RenderTask(
            job_id=live.record.job_id,
            request_id=live.record.request_id,
            clip_key=clip_key(live.record.clip_id, live.record.attempt_token),
            parameters=parameters,
        )
        started = prepared
        async with aclosing(self._worker.render(task, prompt)) as events:
            async for event in events:
                if isinstance(event, Started):
                    started = time.monotonic()
                    live.started = True
                    self._tell_metrics()
                    await self._transition(live, JobState.RUNNING)
                elif isinstance(event, Progress):
                    live.progress = event
                else:
                    self._learn(time.monotonic() - started)
                    queued_s = taken - live.began + started - prepared
                    return _with_service_timings(event, queued_s, prepared - taken, time.monotonic() - live.began)
        raise InternalError("the generator ended without a clip")

    async def _end(self, live: _LiveJob, state: JobState, result: RenderedClip | None, error: Problem | None) -> None:
        """Record the end and tell the log and the metrics."""
        unwanted = state is not JobState.SUCCEEDED
        try:
            await self._transition(live, state, result=result, error=error)
        except Exception as failure:  # whatever it is, the waiter has to hear of it
            # The waiter learns why; the record keeps the last state that could be written.
            log_failure("record_failed", failure, job_id=live.record.job_id)
            known = failure if isinstance(failure, WanError) else InternalError()
            unwanted = isinstance(failure, PreconditionFailed)  # otherwise nobody can say what was written
            state, result, error = JobState.FAILED, None, known.problem(job_id=live.record.job_id)
            live.record = live.record.model_copy(update={"state": state, "error": error})
        seconds = time.monotonic() - live.began
        timings = result.timings if result is not None else None
        name = error.name if error is not None else ""
        if error is not None and error.status >= 500:
            self.last_error = LastError(error=name, job_id=live.record.job_id, at=datetime.now(UTC))
        if unwanted and live.started:
            await self._discard_clip(live.record)
        self._metrics.job_ended(state, seconds, error=name, timings=timings)
        log_job(
            request_id=live.record.request_id,
            job_id=live.record.job_id,
            state=state,
            duration_s=seconds,
            prompt_hash=live.record.prompt_hash,
            parameters=live.record.parameters,
            error=name or None,
            timings=timings,
        )

    async def _discard_clip(self, record: JobRecord) -> None:
        """An upload may have ended just before the job did; its clip belongs to no one."""
        try:
            await self._io(self._records.discard_clip, record)
        except WanError as failure:  # the store is away; what is left behind is garbage, not a clip
            log_failure("discard_failed", failure, job_id=record.job_id)

    async def _transition(self, live: _LiveJob, state: JobState, **changes: Any) -> None:
        """Compare-and-swap the record. A caller that is cancelled meanwhile leaves the write to finish."""

        async def write() -> None:
            async with live.writing:
                moved = self._records.moved(live.record, state, **changes)
                live.etag = await self._write(moved, live.etag)
                live.record = moved

        await asyncio.shield(write())

    async def _write(self, moved: JobRecord, etag: str) -> str:
        """Put a record in the place of its last version, again and again while the store is away."""
        patience, again = Patience(self._patiences.store_s), False
        while True:
            try:
                return await self._io(lambda again=again: self._records.write(moved, etag, again=again))
            except StoreUnavailable:
                if self._hurrying or not await patience.pause():
                    raise
                again = True

    async def _record(self, job_id: str) -> JobRecord:
        record, _ = await self._io(self._records.get, job_id)
        return record

    def _clip(self, record: JobRecord) -> Clip:
        if record.error is not None:
            raise RecordedFailure(record.error)
        if record.result is None:
            raise WorkerLost("the process that ran this job is gone")
        signed = self._presign(record, record.result)
        parameters = record.parameters
        return Clip(
            clip_id=record.clip_id,
            job_id=record.job_id,
            request_id=record.request_id,
            output_url=signed.url,
            expires_at=signed.expires_at,
            model=record.model,
            duration=parameters.duration,
            size_bytes=record.result.size_bytes,
            sha256=record.result.sha256,
            timings=record.result.timings,
            **parameters.model_dump(),
        )

    def _presign(self, record: JobRecord, result: RenderedClip) -> PresignedUrl:
        expires_in = url_ttl(record.request, self._default_url_ttl)
        if self._clip_retention is not None:
            left = record.at[JobState.SUCCEEDED] + self._clip_retention - datetime.now(UTC)
            if left < timedelta(seconds=1):
                raise ClipNotFound("this clip's time is over; the bucket deletes it")
            expires_in = min(expires_in, left)
        return self._presigner.presign(
            result.key,
            expires_in=expires_in,
            response_content_disposition=f'inline; filename="{record.clip_id}.mp4"',
        )

    def _learn(self, seconds: float) -> None:
        self._mean_job_s = seconds if self._mean_job_s is None else 0.8 * self._mean_job_s + 0.2 * seconds

    def _tell_metrics(self) -> None:
        queue = self.queue()
        self._metrics.set_queue(queue.waiting, queue.running, queue.capacity)

    async def _io(self, call: Callable[..., T], *args: Any) -> T:
        """Run a blocking store call on the bounded pool."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)


def _owned(record: JobRecord, principal: Principal) -> JobRecord:
    """Another's job looks like none."""
    if record.principal != principal.name:
        raise JobNotFound
    return record


def _with_service_timings(clip: RenderedClip, queued_s: float, preprocess_s: float, total_s: float) -> RenderedClip:
    timings = clip.timings.model_copy(update={"queued": queued_s, "preprocess": preprocess_s, "total": total_s})
    return clip.model_copy(update={"timings": timings})
