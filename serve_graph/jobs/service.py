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
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
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
    FieldError,
    IdempotencyMismatch,
    InvalidRequest,
    JobGone,
    JobNotEnded,
    JobNotFound,
    RecordedFailure,
    ShuttingDown,
    StoreUnavailable,
    WanError,
)
from schemas.estimates import Estimate
from schemas.health import LastError, QueueHealth
from schemas.jobs import (
    Job,
    JobPage,
    JobRecord,
    JobState,
    is_batch_id,
    job_id_from,
    job_id_of,
    new_job_id,
)
from schemas.model_profile import ModelProfile
from schemas.requests import GenerateRequest, GenerationParameters
from serve_graph.api_keys import NOBODY, Principal
from serve_graph.jobs.admission import Admission
from serve_graph.jobs.batch_intake import Sent
from serve_graph.jobs.batches import Batches
from serve_graph.jobs.limits import Patiences, QueueLimits
from serve_graph.jobs.live import LiveJob
from serve_graph.jobs.outbox import Outbox
from serve_graph.jobs.platform import Platform
from serve_graph.jobs.reading import Reading
from serve_graph.jobs.recording import Recorder
from serve_graph.jobs.running import STOPPED, Running
from serve_graph.jobs.views import Views, owned
from serve_graph.jobs.worker import Worker
from serve_graph.logs import log_event, log_failure
from serve_graph.metrics import IngressMetrics
from serve_graph.prompts import prompt_hash
from serve_graph.service_plan import ServicePlan
from serve_graph.thumbnails import ensure_thumbnail
from serve_graph.webhooks.policy import WebhookPolicy, check_webhook_url
from serve_graph.webhooks.sender import WebhookSender
from storage.job_records import Deleted, JobRecords, entry_of, request_digest
from storage.keys import entry_id, thumbnail_key
from storage.store import InvalidKey, PreconditionFailed, PresignedUrl, Presigner

T = TypeVar("T")

MAX_PAGE = 100
"""Jobs on one page of a list: each is a read."""


class JobService:
    """Serves one ingress replica. All methods belong to one event loop.

    platform: runs the jobs, each in a process whose `work_on` it calls; this one records and reads them only.
    plan: says which clips fit into the GPU's memory, and what they take there; by default nothing of any GPU.
    """

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
        platform: Platform | None = None,
        plan: ServicePlan | None = None,
    ) -> None:
        self._plan = plan or ServicePlan(None, lambda: None)
        self._profile = profile
        self._worker = worker
        self._records = records
        self._patiences = patiences
        self._hash_secret = hash_secret
        self._recorder = Recorder(records, executor, owner=token_hex(8), patience_s=patiences.store_s)
        self._views = Views(presigner, default_url_ttl, clip_retention)
        policy = webhook_policy or WebhookPolicy(can_sign=webhook_sender is not None)
        outbox = Outbox(self._recorder, webhook_sender)

        def make_batches(running: Running) -> Batches:
            return Batches(
                running,
                self._recorder,
                worker,
                self._views,
                metrics,
                patiences,
                check=lambda request: self._admission.check(request),
                model=profile.name,
                hash_secret=hash_secret,
                max_batches=limits.max_batches,
                outbox=outbox,
                check_url=lambda url: check_webhook_url(url, policy),
            )

        self._running = Running(
            self._recorder,
            worker,
            outbox,
            metrics,
            limits,
            patiences,
            model=profile.name,
            make_batches=make_batches,
            platform=platform,
        )
        self.batches = self._running.batches
        self._reading = Reading(self._running, self._recorder)
        self._admission = Admission(
            self._running,
            profile,
            limits,
            policy,
            default_url_ttl=default_url_ttl,
            clip_retention=clip_retention,
            plan=self._plan,
        )

    def start(self) -> None:
        """Renew the leases of this process's jobs, and see to those that nobody works on, until `drain`."""
        self._running.start()

    async def tidy(self) -> None:
        """Delete what has expired and some of what is garbage, once. Raises StoreUnavailable."""
        await self._running.tidy()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new jobs, let those under way end, and hand back to the store what has not after `timeout_s`."""
        await self._running.drain(timeout_s)

    def queue(self) -> QueueHealth:
        """How full the service is."""
        return self._running.queue()

    @property
    def last_error(self) -> LastError | None:
        """The last failure that was not the request's."""
        return self._running.last_error

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
        parameters, fits = await self._admitted(request, principal)
        self._running.census.submitting[principal.name] += 1  # until `Running.create` has it in line
        try:
            if not fits:
                await self._worker.check(parameters)
                self._refuse_if_draining()
        except BaseException:
            self._running.census.submitting[principal.name] -= 1
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
        creating = asyncio.create_task(self._running.create(record), context=contextvars.Context())
        self._running.creating.add(creating)
        creating.add_done_callback(self._running.creating.discard)
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

    async def estimate(self, request: GenerateRequest, request_id: str, principal: Principal = NOBODY) -> Estimate:
        """What a request would take, were it submitted now. Records nothing and holds no place.

        Raises what `submit` raises without an idempotency key, but for the store's problems.
        """
        self._refuse_if_draining()
        parameters, fits = await self._admitted(request, principal)
        if not fits:
            await self._worker.check(parameters)
        line = self._running.line
        place = line.prospect(request, parameters) if self._running.caller is None else None
        return Estimate(
            request_id=request_id,
            model=self._profile.name,
            parameters=parameters,
            work=self._plan.work(parameters),
            seconds=line.own_seconds(parameters) if line.is_calibrated else None,
            position=None if place is None else place.position - 1,
            seconds_until_done=place.seconds_left if place is not None and line.is_calibrated else None,
            device=self._plan.device(parameters),
        )

    async def _admitted(self, request: GenerateRequest, principal: Principal) -> tuple[GenerationParameters, bool]:
        """See `Admission.check`; as far as can be told now there is room for it. Raises QueueFull, QuotaExceeded."""
        parameters, fits = self._admission.check(request)
        if self._running.caller is not None:
            await self._running.caller.count()
        self._admission.admit(principal)
        return parameters, fits

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
        if self._running.turns is None:
            return await self._wait(job_id, principal)
        async with self._running.turns.taken():  # the request is open as long as that, as a call is
            return await self._wait(job_id, principal)

    async def _wait(self, job_id: str, principal: Principal) -> Clip:
        live = self._running.live(job_id)
        if live is not None:
            owned(live.record, principal)
            live.waiters += 1
            try:
                await live.ended.wait()
            finally:
                live.waiters -= 1
            if live.handed_back:
                raise ShuttingDown(STOPPED)
            if not live.lost:
                return self._views.clip(live.record)
        last = await _last(self._reading.changes(job_id, principal))
        if last is None or not last[0].state.is_terminal:
            raise ShuttingDown(STOPPED)
        return self._views.clip(last[0])

    async def job(self, job_id: str, principal: Principal = NOBODY) -> Job:
        """The job as its owner sees it. Raises JobNotFound, JobGone; StoreUnavailable for one of another process."""
        live = self._running.in_hand(job_id)
        if live is not None:
            return self._view(owned(live.record, principal))
        try:
            return self._view(await self._reading.record(job_id, principal))
        except StoreUnavailable:
            waiting = self._running.live(job_id)
            if waiting is None:
                raise
            return self._view(owned(waiting.record, principal))

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
            after = entry_of(await self._reading.record_or_tombstone(after_job, principal))
        states = tuple(JobState) if state is None else (state,)
        if batch_id is not None:
            items, cursor = await self.batches.reading.page(
                batch_id, principal, states=states, limit=limit, after=after
            )
            return JobPage(jobs=tuple(map(self._view, items)), next_cursor=cursor)
        _check_cursor(after)
        found: list[JobRecord] = []
        more = True
        while more and len(found) < limit:
            entries, more = await self._recorder.io(
                lambda after=after: self._records.entries(principal.name, states, after=after, limit=limit)
            )
            read = await asyncio.gather(*map(self._reading.listed, entries))
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
        async with aclosing(self._reading.changes(job_id, principal)) as changes:
            async for record, live in changes:
                yield self._view(record, live)

    async def cancel(self, job_id: str, principal: Principal = NOBODY) -> Job:
        """Cancel a job, whoever runs it. Returns it as it ended, by the cancel or just before.

        Where another process runs it and does not answer within two renewals, the job is returned as it is then,
        with `cancel_requested`. Raises JobNotFound, JobGone, StoreUnavailable; RecordedFailure where the
        store could not be told in time.
        """
        live = self._running.live(job_id)
        if live is not None:
            owned(live.record, principal)
            await self._running.cancel_here(live)
            if live.unrecorded and live.record.error is not None:
                raise RecordedFailure(live.record.error)
            if not live.lost and live.record.state.is_terminal:
                return self._view(live.record)
        record = await self._cancel_elsewhere(job_id, principal)
        return self._view(record)

    async def delete(self, job_id: str, principal: Principal = NOBODY) -> None:
        """Delete an ended job and its clip. Raises JobNotEnded, JobNotFound, JobGone, StoreUnavailable."""
        live = self._running.in_hand(job_id)
        if live is not None:
            owned(live.record, principal)
            if not live.record.state.is_terminal:
                raise JobNotEnded
            await live.ended.wait()  # its end is on record, and this process lets go of it just now
        while True:
            try:
                record, etag = await self._reading.read(job_id, principal)
            except JobGone:
                await self._reading.bury_again(job_id)  # the delete before may have been cut short
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
            record = await self._reading.record(job_id_of(clip_id), principal)
        except JobNotFound as error:
            raise ClipNotFound from error
        except JobGone as error:
            raise ClipGone from error
        return self._views.clip_url(record, clip_id)

    async def thumbnail_url(self, job_id: str, principal: Principal = NOBODY) -> PresignedUrl:
        """A freshly signed URL for the first frame of a job's clip, which is made when it is first asked for.

        Raises JobNotFound, JobGone, ClipNotFound, ClipGone, RenderFailed, StoreUnavailable, StoreFull.
        """
        record = await self._reading.record(job_id, principal)
        if record.result is None:
            raise ClipNotFound
        key = thumbnail_key(record.result.key)
        signed = self._views.signed(record, record.result, key)
        if await self._recorder.io(ensure_thumbnail, self._records.store, record.result.key, key):
            try:
                await self._reading.record(job_id, principal)
            except JobGone:  # deleted meanwhile, and what it had before the thumbnail was there
                await self._recorder.io(self._records.store.delete, key)
                raise
        return signed

    async def work_on(self, work_id: str) -> None:
        """A platform's call: work on whatever is next in line, until this job or batch has ended, here or elsewhere.

        Raises StoreUnavailable; ShuttingDown at a stop, and the work is there for another call then.
        """
        if self._running.turns is None:
            raise RuntimeError("this service begins jobs by itself")
        await _unless(self._running.drained, self._running.looked())
        async with self._running.turns.taken():
            if is_batch_id(work_id):
                await _unless(self._running.drained, self.batches.work_on(work_id))
            else:
                await self._work_on_job(work_id)
        if self._running.draining:
            raise ShuttingDown(STOPPED)

    async def _work_on_job(self, job_id: str) -> None:
        try:
            record, etag = await self._recorder.io(self._records.get, job_id)
            if record.state is JobState.QUEUED:
                self._running.adopt(record, etag)
            await _last(self._reading.changes(job_id, Principal(record.principal)))
        except (JobNotFound, Deleted, JobGone):
            return

    def abandon(self, job_id: str) -> None:
        """Cancel a job whose client has gone, unless somebody else waits here or may come back."""
        live = self._running.live(job_id)
        if live is not None and not live.record.idempotent and live.waiters == 0:
            self._running.spawn(self._running.cancel_here(live))
        elif live is None and self._running.caller is not None:
            self._running.spawn(self._abandon_elsewhere(job_id))

    async def _abandon_elsewhere(self, job_id: str) -> None:
        try:
            record, _ = await self._recorder.io(self._records.get, job_id)
            if not record.idempotent:
                await self._cancel_elsewhere(job_id, Principal(record.principal))
        except (WanError, Deleted) as failure:  # it runs to its end
            log_failure("abandon_failed", failure, job_id=job_id)

    def _id_for(self, principal: Principal, idempotency_key: str) -> str:
        named = f"job\0{principal.name}\0{idempotency_key}".encode()
        return job_id_from(hmac.new(self._hash_secret, named, hashlib.sha256).hexdigest())

    async def _known(self, job_id: str, request: GenerateRequest) -> JobRecord | None:
        """The job that has this id already. Raises IdempotencyMismatch, JobGone."""
        live = self._running.live(job_id)
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

    def _refuse_if_draining(self) -> None:
        if self._running.draining:
            raise ShuttingDown("the service is shutting down; send the request again elsewhere or later")

    async def _cancel_elsewhere(self, job_id: str, principal: Principal) -> JobRecord:
        """Cancel a job that this process has not in hand: by itself while it waits, else through its owner."""
        while True:
            record, etag = await self._reading.read(job_id, principal)
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
                self._running.spawn(self._running.file(record, etag))
            break
        if record.state.is_terminal:
            return record
        try:
            async with asyncio.timeout(2 * self._patiences.renewal_s):
                last = await _last(self._reading.changes_elsewhere(job_id, principal))
                return last or await self._reading.record(job_id, principal)
        except TimeoutError:
            return await self._reading.record(job_id, principal)

    def _view(self, record: JobRecord, live: LiveJob | None = None) -> Job:
        live = live or self._running.live(record.job_id)
        taken_up_elsewhere = record.state is not JobState.QUEUED and record.job_id in self._running.line
        if live is None or taken_up_elsewhere:
            return self._views.job(record)
        place = self._running.line.outlook(live)
        position = place.position - 1 if place is not None and live.job_id in self._running.line else None
        seconds_left = place.seconds_left if place is not None and self._running.line.is_calibrated else None
        return self._views.job(record, progress=live.progress, position=position, seconds_left=seconds_left)


async def _unless(stopped: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do some work, unless this process stops first."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


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
