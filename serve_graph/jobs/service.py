"""The job service: what may be asked of it. Knows nothing of Ray, HTTP or models.

Every generation is a job. `submit` checks and records it; from then on it belongs to the process that runs it and
outlives the request that asked for it. All durable truth is in the record (`storage.job_records`); progress lives
here and rides on the renewals of the lease. What this process can't end it hands back, and what another process
lost it takes over (`takeover.py`).
"""

import asyncio
import contextvars
import hashlib
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any, TypeVar

from schemas.batches import Batch
from schemas.clips import Clip
from schemas.errors import (
    ClipGone,
    ClipNotFound,
    DeadlineExceeded,
    FieldError,
    IdempotencyMismatch,
    InternalError,
    InvalidRequest,
    JobCancelled,
    JobGone,
    JobNotEnded,
    JobNotFound,
    Problem,
    QueueFull,
    QuotaExceeded,
    RecordedFailure,
    ShuttingDown,
    StoreUnavailable,
    WanError,
)
from schemas.health import LastError, QueueHealth
from schemas.jobs import (
    Job,
    JobPage,
    JobRecord,
    JobState,
    RenderedClip,
    Tombstone,
    item_of,
    job_id_from,
    job_id_of,
    new_job_id,
)
from schemas.model_profile import ModelProfile
from schemas.requests import GenerateRequest, GenerationParameters, url_ttl
from schemas.webhooks import WebhookDelivery
from serve_graph.api_keys import NOBODY, Principal
from serve_graph.jobs.attempts import Attempts
from serve_graph.jobs.batch_intake import Sent
from serve_graph.jobs.batches import Batches
from serve_graph.jobs.census import Census
from serve_graph.jobs.following import LOOK_INTERVAL_S, Followers
from serve_graph.jobs.limits import Patiences, QueueLimits
from serve_graph.jobs.line import Line, Scheduling
from serve_graph.jobs.live import LiveJob
from serve_graph.jobs.outbox import Outbox
from serve_graph.jobs.recording import Lost, Recorder
from serve_graph.jobs.takeover import Sweeper
from serve_graph.jobs.views import Views, owned, owned_tombstone
from serve_graph.jobs.worker import Worker
from serve_graph.logs import log_event, log_failure, log_job
from serve_graph.metrics import IngressMetrics
from serve_graph.prompts import clean_prompt, prompt_hash, surely_fits
from serve_graph.thumbnails import ensure_thumbnail
from serve_graph.webhooks.policy import WebhookPolicy, check_webhook_url
from serve_graph.webhooks.sender import WebhookSender
from storage.job_records import Deleted, JobRecords, entry_of, request_digest
from storage.keys import entry_id, thumbnail_key
from storage.store import InvalidKey, PreconditionFailed, PresignedUrl, Presigner

T = TypeVar("T")

_STOPPED = "the service is stopping; the job goes on at its next start: ask for it by its id"

MAX_RETRY_AFTER_S = 600

LAST_WORDS_S = 15.0
"""At a stop, for indexes and webhooks of jobs that have ended; an attempt at a webhook takes 10 s at most."""

LINE_LOOKS = 64
"""Jobs in line that are looked at per renewal, in turn: another process may have taken them up."""

MAX_PAGE = 100
"""Jobs on one page of a list: each is a read."""


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
        webhook_policy: WebhookPolicy | None = None,
        webhook_sender: WebhookSender | None = None,
    ) -> None:
        self._profile = profile
        self._worker = worker
        self._records = records
        self._limits = limits
        self._patiences = patiences
        self._default_url_ttl = default_url_ttl
        self._clip_retention = clip_retention
        self._hash_secret = hash_secret
        self._metrics = metrics
        self._recorder = Recorder(records, executor, owner=token_hex(8), patience_s=patiences.store_s)
        self._views = Views(presigner, default_url_ttl, clip_retention)
        self._followers = Followers(self._recorder)
        self._webhook_policy = webhook_policy or WebhookPolicy(can_sign=webhook_sender is not None)
        self._outbox = Outbox(self._recorder, webhook_sender)
        self._attempts = Attempts(
            worker, self._recorder, patiences, on_start=self._note_start, on_retry=self._note_retry
        )
        self._live: dict[str, LiveJob] = {}
        self._line = Line(Scheduling(limits.max_dispatched_jobs, limits.policy, limits.max_stretch))
        self._census = Census()
        self._creating: set[asyncio.Task[None]] = set()
        self._filing: set[asyncio.Task[None]] = set()
        self._tending: list[asyncio.Task[None]] = []
        self._looked_at = 0
        self._draining = False
        self._drained = asyncio.Event()
        self.last_error: LastError | None = None
        self.batches = Batches(
            self,
            self._recorder,
            worker,
            self._views,
            metrics,
            patiences,
            check=self._checked,
            model=profile.name,
            hash_secret=hash_secret,
            max_batches=limits.max_batches,
            outbox=self._outbox,
            check_url=lambda url: check_webhook_url(url, self._webhook_policy),
        )
        self._sweeper = Sweeper(self._recorder, patiences, model=profile.name, jobs=self, batches=self.batches)
        self._tell_metrics()

    def start(self) -> None:
        """Renew the leases of this process's jobs, and see to those that nobody works on, until `drain`."""
        for tending in (self._renewing(), self._looking_at_line(), self._sweeper.run()):
            self._tending.append(asyncio.create_task(tending, context=contextvars.Context()))

    async def submit(
        self,
        request: GenerateRequest,
        request_id: str,
        principal: Principal = NOBODY,
        *,
        idempotency_key: str | None = None,
    ) -> JobRecord:
        """Check a request, record its job and put it in line. Returns the record as it was created.

        idempotency_key: the same key and request of the same principal give the job that was made first.

        Raises InvalidRequest, PromptTooLong, QueueFull, QuotaExceeded, ShuttingDown, StoreFull, StoreUnavailable;
        no job exists then. With a key IdempotencyMismatch, and JobGone where that job was deleted.
        """
        self._refuse_if_draining()
        job_id = new_job_id()
        if idempotency_key is not None:
            job_id = self._id_for(principal, idempotency_key)
            known = await self._known(job_id, request)
            if known is not None:
                return known
        parameters, fits = self._checked(request)
        self._admit(principal)
        self._census.submitting[principal.name] += 1  # until `_create` has made it a live job
        try:
            if not fits:
                await self._worker.check(parameters)
                self._refuse_if_draining()
        except BaseException:
            self._census.submitting[principal.name] -= 1
            raise
        now = datetime.now(UTC)
        record = JobRecord(
            job_id=job_id,
            request_id=request_id,
            principal=principal.name,
            state=JobState.QUEUED,
            created_at=now,
            at={JobState.QUEUED: now},
            attempt_token=token_hex(8),
            idempotent=idempotency_key is not None,
            request=request,
            parameters=parameters,
            model=self._profile.name,
            prompt_hash=prompt_hash(self._hash_secret, parameters.prompt),
        )
        # An empty context: Serve cancels what runs in a request's context when its client goes away.
        creating = asyncio.create_task(self._create(record), context=contextvars.Context())
        self._creating.add(creating)
        creating.add_done_callback(self._creating.discard)
        try:
            await asyncio.shield(creating)
        except PreconditionFailed:
            known = await self._known(job_id, request)
            if known is None:
                raise
            return known
        except asyncio.CancelledError:
            # Nobody will learn this job's id: the write can't be stopped, so what it begins is.
            creating.add_done_callback(lambda _: self.abandon(record.job_id))
            raise
        return record

    async def submit_batch(
        self,
        requests: AsyncIterator[Sent],
        request_id: str,
        principal: Principal = NOBODY,
        *,
        webhook_url: str | None = None,
        idempotency_key: str | None = None,
    ) -> Batch:
        """Check all requests and commit them as one batch. See `Batches.submit`; ShuttingDown at a stop."""
        self._refuse_if_draining()
        return await self.batches.submit(
            requests, request_id, principal, webhook_url=webhook_url, idempotency_key=idempotency_key
        )

    async def wait(self, job_id: str, principal: Principal = NOBODY) -> Clip:
        """Wait for a job to end, whoever runs it. Raises the problem it ended with; ShuttingDown at a stop."""
        live = self._live.get(job_id)
        if live is not None:
            owned(live.record, principal)
            live.waiters += 1
            try:
                await live.ended.wait()
            finally:
                live.waiters -= 1
            if live.handed_back:
                raise ShuttingDown(_STOPPED)
            if not live.lost:
                return self._views.clip(live.record)
        last = await _last(self._changes(job_id, principal))
        if last is None or not last[0].state.is_terminal:
            raise ShuttingDown(_STOPPED)
        return self._views.clip(last[0])

    async def job(self, job_id: str, principal: Principal = NOBODY) -> Job:
        """The job as its owner sees it. Raises JobNotFound, JobGone."""
        live = self._live.get(job_id)
        return self._view(await self._record(job_id, principal) if live is None else owned(live.record, principal))

    async def jobs(
        self,
        principal: Principal = NOBODY,
        *,
        state: JobState | None = None,
        batch_id: str | None = None,
        limit: int = 20,
        after: str | None = None,
        after_job: str | None = None,
    ) -> JobPage:
        """One page of this principal's jobs, newest first; those of batches are not among them.

        batch_id: instead, those of this batch, in the order of submission. Raises BatchNotFound, BatchGone then.
        after: a page's `next_cursor`. after_job: instead of it, the id of the last job of the page before, which may
        have been deleted meanwhile. Raises InvalidRequest for a cursor that is none, JobNotFound.
        """
        if after_job is not None:
            after = entry_of(await self._record_or_tombstone(after_job, principal))
        states = tuple(JobState) if state is None else (state,)
        if batch_id is not None:
            items, cursor = await self.batches.page(batch_id, principal, states=states, limit=limit, after=after)
            return JobPage(jobs=tuple(map(self._view, items)), next_cursor=cursor)
        _check_cursor(after)
        found: list[JobRecord] = []
        more = True
        while more and len(found) < limit:
            entries, more = await self._recorder.io(
                lambda after=after: self._records.entries(principal.name, states, after=after, limit=limit)
            )
            read = await asyncio.gather(*map(self._listed_record, entries))
            matching = [record for record in read if record is not None and record.state in states]
            more = more or len(found) + len(matching) > limit
            found += matching[: limit - len(found)]
            after = entries[-1] if entries else after
        cursor = entry_of(found[-1]) if found and more else None
        return JobPage(jobs=tuple(map(self._view, found)), next_cursor=cursor)

    async def changes(self, job_id: str, principal: Principal = NOBODY) -> AsyncGenerator[Job, None]:
        """The job at once, then at each change, whoever runs it; ends with the job, or when the service stops.

        Raises JobNotFound, JobGone, StoreUnavailable at the first look only.
        """
        async with aclosing(self._changes(job_id, principal)) as changes:
            async for record, live in changes:
                yield self._view(record, live)

    async def cancel(self, job_id: str, principal: Principal = NOBODY) -> Job:
        """Cancel a job, whoever runs it. Returns it as it ended, by the cancel or just before.

        Where another process runs it and does not answer within two renewals, the job is returned as it is then,
        with `cancel_requested`. Raises JobNotFound, JobGone, StoreUnavailable; RecordedFailure where the
        store could not be told in time.
        """
        live = self._live.get(job_id)
        if live is not None:
            owned(live.record, principal)
            await self._cancel_here(live)
            if live.unrecorded and live.record.error is not None:
                raise RecordedFailure(live.record.error)
            if not live.lost and live.record.state.is_terminal:
                return self._view(live.record)
        record = await self._cancel_elsewhere(job_id, principal)
        return self._view(record)

    async def delete(self, job_id: str, principal: Principal = NOBODY) -> None:
        """Delete an ended job and its clip. Raises JobNotEnded, JobNotFound, JobGone, StoreUnavailable."""
        live = self._live.get(job_id)
        if live is not None:
            owned(live.record, principal)
            if not live.record.state.is_terminal:
                raise JobNotEnded
            await live.ended.wait()  # its end is on record, and this process lets go of it just now
        while True:
            try:
                record, etag = await self._read(job_id, principal)
            except JobGone:
                await self._bury_again(job_id)  # the delete before may have been cut short
                raise
            if not record.state.is_terminal:
                raise JobNotEnded
            try:
                await self._recorder.io(self._records.delete, record, etag)
            except PreconditionFailed:
                continue
            log_event("job_deleted", job_id=job_id)
            return

    async def clip_url(self, clip_id: str, principal: Principal = NOBODY) -> PresignedUrl:
        """A freshly signed URL for a finished clip of this owner. Raises ClipNotFound, ClipGone."""
        try:
            record = await self._record(job_id_of(clip_id), principal)
        except JobNotFound as error:
            raise ClipNotFound from error
        except JobGone as error:
            raise ClipGone from error
        return self._views.clip_url(record, clip_id)

    async def thumbnail_url(self, job_id: str, principal: Principal = NOBODY) -> PresignedUrl:
        """A freshly signed URL for the first frame of a job's clip, which is made when it is first asked for.

        Raises JobNotFound, JobGone, ClipNotFound, ClipGone, RenderFailed, StoreUnavailable, StoreFull.
        """
        record = await self._record(job_id, principal)
        if record.result is None:
            raise ClipNotFound
        key = thumbnail_key(record.result.key)
        signed = self._views.signed(record, record.result, key)
        if await self._recorder.io(ensure_thumbnail, self._records.store, record.result.key, key):
            try:
                await self._record(job_id, principal)
            except JobGone:  # deleted meanwhile, and what it had before the thumbnail was there
                await self._recorder.io(self._records.store.delete, key)
                raise
        return signed

    def abandon(self, job_id: str) -> None:
        """Cancel a job of this process whose client has gone, unless somebody else waits or may come back."""
        live = self._live.get(job_id)
        if live is not None and not live.record.idempotent and live.waiters == 0:
            self.spawn(self._cancel_here(live))

    def queue(self) -> QueueHealth:
        """How full the service is."""
        census = self._census
        return QueueHealth(waiting=census.waiting, running=census.running, capacity=self._limits.max_waiting_jobs)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new jobs, let those under way end, and hand back to the store what has not after `timeout_s`."""
        self._draining = True
        while self._creating:
            await asyncio.wait(list(self._creating))
        await self.batches.committed()
        for live in [live for live in self._line if live.waiters == 0]:
            self._leave(live)
        tasks = self._tasks()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        self._recorder.hurrying = True
        for live in self._line:
            self._leave(live)
        for live in list(self._live.values()):
            live.handed_back = not live.ending
            live.stop(ShuttingDown(_STOPPED))
        while tasks := self._tasks():
            await asyncio.wait(tasks)
        self._drained.set()
        for task in self._tending:
            task.cancel()
        if self._filing:  # a webhook that takes longer is tried again by the next process
            _, late = await asyncio.wait(list(self._filing), timeout=LAST_WORDS_S)
            for task in late:
                task.cancel()
        await asyncio.gather(*self._tending, *self._filing, return_exceptions=True)

    def is_live(self, job_id: str) -> bool:
        """Whether this process has the job in hand."""
        return job_id in self._live

    def room(self) -> int:
        """How many more jobs this process would take in line."""
        return 0 if self._draining else max(0, self._limits.max_waiting_jobs - self.queue().waiting)

    def adopt(self, record: JobRecord, etag: str) -> None:
        """Put a queued job in line that another process, or an earlier one, has recorded."""
        if not self._draining and record.job_id not in self._live:
            live = LiveJob(record, etag, began=time.monotonic())
            self._enqueue(live)
            if self.batches.took(record):  # and it was cancelled
                self.cancel_live(live)

    def live(self, job_id: str) -> LiveJob | None:
        """The job, where this process has it in hand."""
        return self._live.get(job_id)

    def cancel_live(self, live: LiveJob) -> None:
        """Cancel a job of this process without waiting for its end."""
        self.spawn(self._cancel_here(live))

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

    def _id_for(self, principal: Principal, idempotency_key: str) -> str:
        named = f"job\0{principal.name}\0{idempotency_key}".encode()
        return job_id_from(hmac.new(self._hash_secret, named, hashlib.sha256).hexdigest())

    async def _known(self, job_id: str, request: GenerateRequest) -> JobRecord | None:
        """The job that has this id already. Raises IdempotencyMismatch, JobGone."""
        live = self._live.get(job_id)
        try:
            record = live.record if live is not None else (await self._recorder.io(self._records.get, job_id))[0]
        except JobNotFound:
            return None
        except Deleted as deleted:
            if deleted.tombstone.request_digest != request_digest(job_id, request):
                raise IdempotencyMismatch from deleted
            raise JobGone from deleted
        if record.request != request:
            raise IdempotencyMismatch
        return record

    def _checked(self, request: GenerateRequest) -> tuple[GenerationParameters, bool]:
        """Everything the output depends on, and whether no text can be too long. Raises InvalidRequest."""
        parameters = self._profile.resolve(request)
        if request.webhook_url is not None:
            check_webhook_url(request.webhook_url, self._webhook_policy)
        self._refuse_url_beyond_clip(request)
        self._refuse_beyond_memory(parameters)
        cleaned = clean_prompt(parameters.prompt)
        if not cleaned:
            raise InvalidRequest([FieldError(field="prompt", message="is blank once it is cleaned as Wan does")])
        return parameters, self._surely_fits(cleaned, parameters)

    def _refuse_if_draining(self) -> None:
        if self._draining:
            raise ShuttingDown("the service is shutting down; send the request again elsewhere or later")

    @staticmethod
    def _deadline_left_s(record: JobRecord) -> float | None:
        """Seconds until the request's deadline. After a restart the wall clock has to say how much has passed."""
        deadline_s = record.request.deadline_s
        if deadline_s is None:
            return None
        passed_s = (datetime.now(UTC) - record.created_at).total_seconds()
        return max(0.0, deadline_s - max(0.0, passed_s))

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
        mine = self._census.waiting_of(principal.name)
        if mine >= allowed:
            raise QuotaExceeded(allowed, self._seconds_for(mine))

    def _seconds_for(self, num_jobs: int) -> int:
        seconds = self._line.seconds_for(num_jobs) if self._line.is_calibrated else num_jobs
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
        """Write a new record and put its job in line."""
        try:
            etag = await self._recorder.io(self._records.create, record)
        finally:
            self._census.submitting[record.principal] -= 1
        if record.job_id not in self._live:  # a sweep may have found it first
            self._enqueue(LiveJob(record, etag, began=time.monotonic()))

    def _enqueue(self, live: LiveJob) -> None:
        self._live[live.job_id] = live
        self._census.came(live)
        self._join(live)
        self.dispatch()
        self._tell_metrics()

    def dispatch(self) -> None:
        """Let the next jobs go, as many as may be under way at once."""
        while True:
            for head in [] if self._draining else self.batches.heads(self._line):
                self._live[head.job_id] = head
                self._census.came(head)
                self._join(head)
            live = self._line.next()
            if live is None:
                return
            live.task = asyncio.create_task(self._run(live), context=contextvars.Context())

    def _join(self, live: LiveJob) -> None:
        """Put a job in line, with its deadline."""
        left_s = self._deadline_left_s(live.record)
        self._line.join(live, left_s)
        if left_s is not None:
            live.expiry = asyncio.get_running_loop().call_later(left_s, self._expire, live)

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
        self._line.leave(live)
        self._census.went(live)
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
            self._line.learn(live, result)
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

    async def _cancel_here(self, live: LiveJob) -> None:
        """Cancel a job of this process and wait for its end."""
        self._stop(live, JobCancelled())
        await live.ended.wait()

    def _expire(self, live: LiveJob) -> None:
        """The job's deadline is over."""
        self._stop(live, DeadlineExceeded(live.record.request.deadline_s or 0.0))

    def _stop(self, live: LiveJob, reason: WanError) -> None:
        """End a job of this process early, whether it waits or runs."""
        if self._line.leave(live):
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

    async def _cancel_elsewhere(self, job_id: str, principal: Principal) -> JobRecord:
        """Cancel a job that this process has not in hand: by itself while it waits, else through its owner."""
        while True:
            record, etag = await self._read(job_id, principal)
            if record.state.is_terminal or record.cancel_requested:
                break
            if record.state is JobState.QUEUED:
                changed = self._records.cancelled(record)
            else:
                changed = self._records.amended(record, cancel_requested=True)
            try:
                etag = await self._recorder.io(self._records.write, changed, etag)
            except PreconditionFailed:
                continue
            record = changed
            if record.state.is_terminal:
                self.spawn(self.file(record, etag))
            break
        if record.state.is_terminal:
            return record
        try:
            async with asyncio.timeout(2 * self._patiences.renewal_s):
                last = await _last(self._changes_elsewhere(job_id, principal))
                return last or await self._record(job_id, principal)
        except TimeoutError:
            return await self._record(job_id, principal)

    async def _renewing(self) -> None:
        """Renew the leases of this process's jobs while the worker advances."""
        while True:
            await asyncio.sleep(self._patiences.renewal_s)
            running = [live for live in self._live.values() if live.record.state.is_owned]
            if running and time.monotonic() - self._attempts.last_advance < self._patiences.stall_s:
                await asyncio.gather(*map(self._renew, running))

    async def _renew(self, live: LiveJob) -> None:
        try:
            await self._recorder.renew(live)
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
        waiting = [live for live in self._line if live.etag is not None]
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
            if live.job_id in self._line:
                live.lost = True
                self._let_go(live)

    async def _changes(
        self, job_id: str, principal: Principal
    ) -> AsyncGenerator[tuple[JobRecord, LiveJob | None], None]:
        """The record at each change, and the job where it is this process's."""
        while not self._drained.is_set():
            live = self._live.get(job_id)
            if live is not None:
                owned(live.record, principal)
                async with aclosing(self._changes_here(live)) as here:
                    async for record in here:
                        yield record, live
                if not live.lost:
                    return
                continue
            async with aclosing(self._changes_unbegun(job_id, principal)) as unbegun:
                async for record in unbegun:
                    yield record, None
                    if record.state.is_terminal:
                        return
            if job_id in self._live or self._drained.is_set():
                continue
            async with aclosing(self._changes_elsewhere(job_id, principal)) as elsewhere:
                async for record in elsewhere:
                    yield record, None
                    if record.state.is_terminal:
                        return

    async def _changes_unbegun(self, job_id: str, principal: Principal) -> AsyncGenerator[JobRecord, None]:
        """What there is to say of a batch's job before it has a record. Ends once it has one, or at a stop."""
        shown = None
        while item_of(job_id) is not None and job_id not in self._live and not self._drained.is_set():
            try:
                record, etag = await self._read(job_id, principal)
            except StoreUnavailable:
                if shown is None:
                    raise
            else:
                if etag is not None:
                    return
                if record.state is not shown:
                    shown = record.state
                    yield record
            await asyncio.sleep(LOOK_INTERVAL_S)

    @staticmethod
    async def _changes_here(live: LiveJob) -> AsyncGenerator[JobRecord, None]:
        changed = asyncio.Event()
        live.listeners.add(changed)
        try:
            while True:
                changed.clear()
                if not live.lost:
                    yield live.record
                if live.ended.is_set() or live.record.state.is_terminal:
                    return
                await changed.wait()
        finally:
            live.listeners.discard(changed)

    async def _changes_elsewhere(self, job_id: str, principal: Principal) -> AsyncGenerator[JobRecord, None]:
        """Ends when the job does, when this process takes it in hand, or at a stop."""
        try:
            async with aclosing(self._followers.changes(job_id)) as seen:
                following = asyncio.create_task(anext(seen))
                stopped = asyncio.create_task(self._drained.wait())
                try:
                    while True:
                        await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED, timeout=1.0)
                        if following.done():
                            record = following.result()
                            yield owned(record, principal)
                            if record.state.is_terminal:
                                return
                            following = asyncio.create_task(anext(seen))
                        elif stopped.done() or job_id in self._live:
                            return
                finally:
                    following.cancel()
                    stopped.cancel()
                    await asyncio.gather(following, stopped, return_exceptions=True)
        except Deleted as deleted:
            owned_tombstone(deleted.tombstone, principal)
            raise JobGone from deleted

    async def _read(self, job_id: str, principal: Principal) -> tuple[JobRecord, str | None]:
        """A record and its ETag; None for a job of a batch that has no record yet. Raises JobNotFound, JobGone."""
        try:
            record, etag = await self._recorder.io(self._records.get, job_id)
        except JobNotFound:
            return await self.batches.unbegun(job_id, principal), None
        except Deleted as deleted:
            owned_tombstone(deleted.tombstone, principal)
            raise JobGone from deleted
        return owned(record, principal), etag

    async def _record(self, job_id: str, principal: Principal) -> JobRecord:
        return (await self._read(job_id, principal))[0]

    async def _record_or_tombstone(self, job_id: str, principal: Principal) -> JobRecord | Tombstone:
        try:
            return owned((await self._recorder.io(self._records.get, job_id))[0], principal)
        except Deleted as deleted:
            return owned_tombstone(deleted.tombstone, principal)

    async def _listed_record(self, entry: str) -> JobRecord | None:
        """The record behind an entry of an index; None where there is none any more."""
        job_id = entry_id(entry)
        live = self._live.get(job_id)
        try:
            record = live.record if live is not None else (await self._recorder.io(self._records.get, job_id))[0]
        except JobNotFound:
            return None
        except Deleted:
            self.spawn(self._bury_again(job_id))  # it was deleted while its end was filed
            return None
        # A job of a batch has an entry of its own for its webhook; it is listed with its batch.
        return record if entry_of(record) == entry and record.batch_id is None else None

    async def _bury_again(self, job_id: str) -> None:
        try:
            await self._recorder.io(self._records.get, job_id)
        except Deleted as deleted:
            await self._recorder.io(self._records.bury, deleted.tombstone)
        except WanError as failure:  # the next one who looks does it
            log_failure("burial_failed", failure, job_id=job_id)

    def _view(self, record: JobRecord, live: LiveJob | None = None) -> Job:
        live = live or self._live.get(record.job_id)
        if live is None:
            return self._views.job(record)
        place = self._line.outlook(live)
        position = place.position - 1 if place is not None and live.job_id in self._line else None
        seconds_left = place.seconds_left if place is not None and self._line.is_calibrated else None
        return self._views.job(record, progress=live.progress, position=position, seconds_left=seconds_left)

    def _note_start(self, live: LiveJob) -> None:
        self._census.moved(live)
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


async def _last(changes: AsyncGenerator[T, None]) -> T | None:
    """What the last change has brought."""
    last = None
    async with aclosing(changes):
        async for change in changes:
            last = change
    return last


def _check_cursor(cursor: str | None) -> None:
    try:
        if cursor is not None:
            entry_id(cursor)
    except InvalidKey as error:
        raise InvalidRequest([FieldError(field="after", message="is no cursor of this list")]) from error
