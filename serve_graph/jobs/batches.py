"""Batches: many prompts committed by one object, whose jobs begin one by one, wherever there is room.

Of an unfinished batch this process holds some bytes per job; the prompts stay in the manifest, and a job gets a
record when it begins. Any number of processes work on one batch: creating the record is the claim. A job that another
process claimed is looked at until its end is on record, as one of its own is until it is filed. Knows no HTTP.
"""

import asyncio
import contextvars
import hashlib
import hmac
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Container, Coroutine, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Protocol

from schemas.batches import (
    Batch,
    BatchCancel,
    BatchManifest,
    BatchSummary,
)
from schemas.errors import (
    BatchGone,
    BatchNotFound,
    IdempotencyMismatch,
    QuotaExceeded,
    WanError,
)
from schemas.jobs import (
    JobRecord,
    JobState,
    Tombstone,
    batch_id_from,
    item_id,
    item_of,
    new_batch_id,
)
from schemas.requests import GenerateRequest, GenerationParameters
from schemas.webhooks import WebhookDelivery
from serve_graph.api_keys import Principal
from serve_graph.jobs.batch_intake import Intake, Sent, Taken
from serve_graph.jobs.batch_reading import BatchReading, check_owner
from serve_graph.jobs.calling import Caller
from serve_graph.jobs.limits import Patiences
from serve_graph.jobs.live import LiveJob
from serve_graph.jobs.manifest_lines import ManifestLines
from serve_graph.jobs.outbox import Outbox
from serve_graph.jobs.recording import Recorder
from serve_graph.jobs.running_batch import ELSEWHERE, HERE, WAITING, RunningBatch
from serve_graph.jobs.views import Views
from serve_graph.jobs.worker import Worker
from serve_graph.logs import log_event, log_failure
from serve_graph.metrics import IngressMetrics
from storage.batch_records import BatchDeleted, BatchRecords, entry_of_batch
from storage.job_records import ActiveEntry, RecordUnreadable
from storage.store import PreconditionFailed


class Jobs(Protocol):
    """What batches need of the job service."""

    @property
    def caller(self) -> Caller | None: ...

    def live(self, job_id: str) -> LiveJob | None: ...

    def in_hand(self, job_id: str) -> LiveJob | None: ...

    def dispatch(self) -> None: ...

    def cancel_live(self, live: LiveJob) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


class Batches:
    """The batches of one process.

    check: fills in a request's defaults and says whether its texts surely fit. max_batches: unfinished ones of one
    principal. check_url: raises InvalidRequest for a webhook's URL that is not allowed.
    """

    def __init__(
        self,
        jobs: Jobs,
        recorder: Recorder,
        worker: Worker,
        views: Views,
        metrics: IngressMetrics,
        patiences: Patiences,
        *,
        check: Callable[[GenerateRequest], tuple[GenerationParameters, bool]],
        model: str,
        hash_secret: bytes,
        max_batches: int,
        outbox: Outbox,
        check_url: Callable[[str], None],
    ) -> None:
        self._jobs = jobs
        self._recorder = recorder
        self._records = BatchRecords(recorder.records.store)
        self._worker = worker
        self._views = views
        self._metrics = metrics
        self._patiences = patiences
        self._check = check
        self._model = model
        self._hash_secret = hash_secret
        self._max_batches = max_batches
        self._outbox = outbox
        self._check_url = check_url
        self._lines = ManifestLines(recorder, self._records)
        self._running: dict[str, RunningBatch] = {}
        self.reading = BatchReading(
            self._running, jobs, recorder, self._records, self._lines, views, hash_secret=hash_secret
        )
        self._submitting: Counter[str] = Counter()
        self._heads: dict[str, str] = {}
        self._creating: set[asyncio.Task[str]] = set()
        self._fetching: set[str] = set()
        self._refused: set[str] = set()
        self._orphans: dict[str, float] = {}
        self._telling: dict[str, tuple[str, float]] = {}
        self._tell_metrics()

    # What clients ask for

    async def submit(
        self,
        requests: AsyncIterator[Sent],
        request_id: str,
        principal: Principal,
        *,
        webhook_url: str | None = None,
        idempotency_key: str | None = None,
    ) -> Batch:
        """Check all requests and commit them. Returns the batch, or the one that was made with the same key.

        Raises InvalidRequest with every mistake, QuotaExceeded, IdempotencyMismatch, BatchGone; no batch exists then.
        """
        if webhook_url is not None:
            self._check_url(webhook_url)
        if self._jobs.caller is not None:
            await self._jobs.caller.count()
        batch_id = new_batch_id()
        known = None
        if idempotency_key is not None:
            named = f"batch\0{principal.name}\0{idempotency_key}".encode()
            batch_id = batch_id_from(hmac.new(self._hash_secret, named, hashlib.sha256).hexdigest())
            known = await self._known(batch_id)
        if known is None:
            self._admit(principal)
        self._submitting[principal.name] += 1
        try:
            intake = Intake(self._worker, self._check, batch_id, digest_only=known is not None)
            taken = await intake.take(requests)
            if known is None:
                manifest = self._manifest(batch_id, taken, request_id, principal, webhook_url, idempotency_key)
                known = await self._commit(manifest, taken)
        finally:
            self._submitting[principal.name] -= 1
        if known != hashlib.sha256(f"{taken.digest}\n{webhook_url}".encode()).hexdigest():
            raise IdempotencyMismatch
        return await self.reading.batch(batch_id, principal)

    async def cancel(self, batch_id: str, principal: Principal) -> Batch:
        """Cancel what has not ended. Returns the batch as it ended, or `cancelling` where that takes longer."""
        running = self._running.get(batch_id)
        if running is None:
            batch = await self.reading.view(await self.reading.head(batch_id, principal))
            if batch.state == "ended":
                return batch
        else:
            check_owner(running.head.principal, principal)
        cancel = await self._recorder.io(self._records.cancel, batch_id)
        self.reading.forget(batch_id)
        running = self._running.get(batch_id)
        if running is not None:
            await self._see_cancelled(running, cancel)
            with suppress(TimeoutError):
                async with asyncio.timeout(2 * self._patiences.renewal_s):
                    await running.over.wait()
        return await self.reading.batch(batch_id, principal)

    # What the job service asks for

    async def committed(self) -> None:
        """Wait until no manifest is being written."""
        while self._creating:
            await asyncio.wait(list(self._creating))

    def heads(self, line: Container[str]) -> list[LiveJob]:
        """The next job of each principal who has none of its batches' in `line`; who gets how much is the line's.

        Of one principal's batches it is the one that got least so far. A job whose line has to be read first is left
        out; `dispatch` is called once it is there.
        """
        least: dict[str, RunningBatch] = {}
        for batch in self._running.values():
            principal = batch.head.principal
            if batch.next_waiting() is None or self._heads.get(principal) in line:
                continue
            if principal not in least or batch.service < least[principal].service:
                least[principal] = batch
        found = []
        for batch in least.values():
            live = self._next_of(batch)
            if live is not None:
                self._heads[batch.head.principal] = live.job_id
                found.append(live)
        return found

    def _next_of(self, batch: RunningBatch) -> LiveJob | None:
        while (index := batch.next_waiting()) is not None:
            if self._jobs.live(item_id(batch.batch_id, index)) is None:
                break
            batch.put(index, HERE)  # taken over before the batch was known here
        if index is None:
            return None
        try:
            item = self._lines.cached(batch.batch_id, index)
        except ValueError as failure:
            self._refuse(batch, failure)
            return None
        if item is None:
            if batch.batch_id not in self._fetching:
                self._fetching.add(batch.batch_id)
                self._jobs.spawn(self._fetch(batch, index))
            return None
        batch.put(index, HERE)
        batch.service += _cost(item.parameters)
        self._tell_metrics()
        record = self.reading.record(batch.head, index, item.request, item.parameters)
        return LiveJob(record, None, began=time.monotonic())

    def took(self, record: JobRecord) -> bool:
        """This process has taken a job with a record in hand. Returns whether its batch was cancelled."""
        batch, index = self._of(record.job_id)
        if batch is None:
            return False
        batch.put(index, HERE)
        return batch.cancel is not None

    def went(self, live: LiveJob) -> None:
        """This process has a job no longer in hand; it is looked at until its end is filed."""
        batch, index = self._of(live.job_id)
        if batch is not None:
            batch.put(index, ELSEWHERE)
            batch.shared = batch.shared or live.lost

    def filed(self, job_id: str, state: JobState) -> None:
        """A job has ended and has its place among the ended ones."""
        batch, index = self._of(job_id)
        if batch is not None:
            batch.ended(index, state)
            if batch.is_over:
                self._jobs.spawn(self._finish(batch))

    async def work_on(self, batch_id: str) -> None:
        """Work on a batch until it has ended, here or elsewhere. Raises StoreUnavailable."""
        try:
            head = await self._recorder.io(self._records.head, batch_id)
        except (BatchNotFound, BatchGone):
            return
        await self.see(ActiveEntry(head.principal, entry_of_batch(head)))
        batch = self._running.get(batch_id)
        if batch is not None:
            await batch.over.wait()

    def foreign(self) -> list[str]:
        """Jobs whose records have to be looked at."""
        return [job_id for batch in self._running.values() for job_id in batch.at(ELSEWHERE)]

    def not_begun(self, job_id: str) -> None:
        """A job that seemed to be in somebody's hands has no record."""
        batch, index = self._of(job_id)
        if batch is not None:
            batch.put(index, WAITING)
            self._jobs.dispatch()

    async def file(self, record: JobRecord) -> None:
        """A job has ended in another process, or was not filed in this one. Raises StoreUnavailable."""
        records = self._recorder.records
        if record.attempts > 1:
            await self._recorder.io(records.discard_lost_clips, record)
        await self._recorder.io(records.file_item, record.job_id, record.state)
        self.filed(record.job_id, record.state)

    async def bury(self, tombstone: Tombstone) -> None:
        """A job was deleted, perhaps before its end was filed."""
        item = item_of(tombstone.job_id)
        ends = [state for state in tombstone.at if state.is_terminal and state is not JobState.DELETED]
        if item is not None and ends:
            await self._recorder.io(self._recorder.records.file_item, tombstone.job_id, ends[0])
            self.filed(tombstone.job_id, ends[0])

    async def see(self, entry: ActiveEntry) -> None:
        """Look at a batch of the active index: work on it, hear of its cancel, end it. Raises StoreUnavailable."""
        batch = self._running.get(entry.id)
        if entry.id in self._refused:
            return
        try:
            if batch is None:
                await self._adopt(entry)
            else:
                await self._refresh(batch)
        except BatchNotFound:
            await self._see_orphan(entry)
        except RecordUnreadable as failure:  # not this version's: the other entries have to be seen to
            log_failure("manifest_unreadable", failure)
            self._refused.add(entry.id)
        except BatchDeleted as deleted:
            self._running.pop(entry.id, None)
            await self._recorder.io(self._records.bury, deleted.tombstone)

    async def see_absent(self, active: Collection[str]) -> None:
        """Look at the batches that the active index has no more: another process has ended them, most likely."""
        self._orphans = {batch_id: at for batch_id, at in self._orphans.items() if batch_id in active}
        self._refused &= set(active)
        for batch in [batch for batch_id, batch in self._running.items() if batch_id not in active]:
            if await self._recorder.io(self._records.summary, batch.batch_id) is not None:
                self._let_go(batch)

    # How it is done

    def _admit(self, principal: Principal) -> None:
        unfinished = sum(batch.head.principal == principal.name for batch in self._running.values())
        if self._jobs.caller is not None:
            unfinished = self._jobs.caller.unfinished_batches[principal.name]
        if unfinished + self._submitting[principal.name] >= self._max_batches:
            raise QuotaExceeded(self._max_batches, 60, "batches")

    async def _known(self, batch_id: str) -> str | None:
        """The digest of the batch with this id; None where there is none. Raises BatchGone."""
        try:
            return (await self._recorder.io(self._records.head, batch_id)).request_digest
        except BatchNotFound:
            return None

    def _manifest(
        self,
        batch_id: str,
        taken: Taken,
        request_id: str,
        principal: Principal,
        webhook_url: str | None,
        idempotency_key: str | None,
    ) -> BatchManifest:
        return BatchManifest(
            batch_id=batch_id,
            request_id=request_id,
            principal=principal.name,
            created_at=datetime.now(UTC),
            model=self._model,
            total=taken.total,
            idempotent=idempotency_key is not None,
            request_digest=hashlib.sha256(f"{taken.digest}\n{webhook_url}".encode()).hexdigest(),
            webhook_url=webhook_url,
        )

    async def _commit(self, manifest: BatchManifest, taken: Taken) -> str:
        """As `_create`, which goes on where the client goes away: a write can't be stopped."""
        # An empty context: Serve cancels what runs in a request's context when its client goes away.
        creating = asyncio.create_task(self._create(manifest, taken), context=contextvars.Context())
        self._creating.add(creating)
        creating.add_done_callback(self._creating.discard)
        try:
            return await asyncio.shield(creating)
        except asyncio.CancelledError:
            if not manifest.idempotent:  # nobody will learn of this batch
                creating.add_done_callback(lambda _: self._jobs.spawn(self._abandon(manifest.batch_id)))
            raise

    async def _abandon(self, batch_id: str) -> None:
        batch = self._running.get(batch_id)
        try:
            if batch is not None or self._jobs.caller is not None:
                cancel = await self._recorder.io(self._records.cancel, batch_id)
                if batch is not None:
                    await self._see_cancelled(batch, cancel)
        except WanError as failure:  # the store is away: the batch runs
            log_failure("batch_abandon_failed", failure)

    async def _create(self, manifest: BatchManifest, taken: Taken) -> str:
        """Write the manifest and begin. Returns the digest of what is there then."""
        try:
            await self._recorder.io(self._records.create, manifest, taken.items)
        except PreconditionFailed:
            return await self._known(manifest.batch_id) or manifest.request_digest
        log_event("batch_created", batch_id=manifest.batch_id, request_id=manifest.request_id)
        if self._jobs.caller is None:
            self._run(manifest, await self._lines.ends(manifest.batch_id), {}, None)
        else:
            await self._jobs.caller.begin_batch(manifest.batch_id, manifest.total)
        return manifest.request_digest

    def _run(
        self, head: BatchManifest, ends: "array[int]", done: Mapping[int, JobState], cancel: BatchCancel | None
    ) -> RunningBatch:
        """Begin to work on a batch, level with the one of the same principal that got least so far."""
        if head.batch_id in self._running:
            return self._running[head.batch_id]
        mine = [
            batch.service
            for batch in self._running.values()
            if batch.head.principal == head.principal and batch.next_waiting() is not None
        ]
        batch = self._running[head.batch_id] = RunningBatch(head, ends, min(mine, default=0))
        batch.all_ended(done)
        batch.cancel = cancel
        self._tell_metrics()
        self._jobs.dispatch()
        return batch

    async def _adopt(self, entry: ActiveEntry) -> None:
        """Work on a batch that another process, or an earlier one, has begun."""
        batch_id = entry.id
        head = await self._recorder.io(self._records.head, batch_id)
        if entry_of_batch(head) != entry.entry:
            await self._recorder.io(self._records.forget_entries, entry)
            return
        ended = await self._recorder.io(self._records.versioned_summary, batch_id)
        if ended is not None:
            await self._see_end(head, *ended)
            return
        cancel = await self._recorder.io(self._records.cancelled, batch_id)
        if head.model != self._model and cancel is None:  # left to services that have this model
            return
        if self._jobs.caller is not None and cancel is None:
            await self._jobs.caller.see_batch(batch_id, head.total)
            return
        ends = await self._lines.ends(batch_id)
        done = await self._recorder.io(self._records.done, batch_id)
        if batch_id not in self._running:
            log_event("batch_adopted", batch_id=batch_id, request_id=head.request_id)
        await self._refresh(self._run(head, ends, done, cancel))

    async def _refresh(self, batch: RunningBatch) -> None:
        """Hear what other processes have done."""
        cancel = batch.cancel or await self._recorder.io(self._records.cancelled, batch.batch_id)
        if cancel is not None:
            await self._see_cancelled(batch, cancel)
        if batch.shared:
            batch.all_ended(await self._recorder.io(self._records.done, batch.batch_id))
        if batch.is_over:
            await self._finish(batch)
        else:
            self._jobs.dispatch()

    async def _see_cancelled(self, batch: RunningBatch, cancel: BatchCancel) -> None:
        """Stop what is under way here, and find what others have begun: nothing begins any more from now on."""
        if batch.cancel is None:
            batch.cancel = cancel
            log_event("batch_cancelled", batch_id=batch.batch_id)
        self._stop_live(batch)
        if not batch.looked:
            begun = await self._recorder.io(self._records.begun, batch.batch_id)
            batch.all_ended(await self._recorder.io(self._records.done, batch.batch_id))
            for index in begun:
                if batch.place(index) == WAITING:
                    live = self._jobs.live(item_id(batch.batch_id, index))
                    batch.put(index, ELSEWHERE if live is None else HERE)
            batch.looked = True
            self._stop_live(batch)
        self._tell_metrics()
        if batch.is_over:
            await self._finish(batch)

    def _stop_live(self, batch: RunningBatch) -> None:
        for job_id in batch.at(HERE):
            live = self._jobs.live(job_id)
            if live is not None and not live.stopping and not live.ending:
                self._jobs.cancel_live(live)

    async def _finish(self, batch: RunningBatch) -> None:
        """Record the batch's end; a sweep tries again where the store is away."""
        if batch.finishing:
            return
        batch.finishing = True
        try:
            url = batch.head.webhook_url
            summary = BatchSummary(
                counts=batch.counts(running=0),
                ended_at=datetime.now(UTC),
                webhook=None if url is None else WebhookDelivery(url=url),
            )
            etag = await self._recorder.io(self._records.end, batch.head, summary)
        except WanError as failure:
            log_failure("batch_end_failed", failure)
            return
        finally:
            batch.finishing = False
        self._let_go(batch)
        if etag is not None:
            self._metrics.batch_ended(cancelled=batch.cancel is not None)
            log_event("batch_ended", batch_id=batch.batch_id, request_id=batch.head.request_id)
            if summary.awaits_webhook:
                self._jobs.spawn(self._tell(batch.head, summary, etag))

    async def _tell(self, head: BatchManifest, summary: BatchSummary, etag: str) -> None:
        """Try an ended batch's webhook. It stays active until that is done."""
        try:
            told = await self._outbox.deliver_batch(self._records, head, summary, etag)
            if not told.awaits_webhook:
                await self._recorder.io(self._records.deactivate, head)
        except WanError as failure:
            log_failure("batch_webhook_failed", failure)

    async def _see_end(self, head: BatchManifest, summary: BatchSummary, etag: str) -> None:
        """An ended batch in the active index: its end has still to be told, or nobody took it off."""
        if not summary.awaits_webhook:
            await self._recorder.io(self._records.deactivate, head)
            return
        seen_etag, since = self._telling.get(head.batch_id, ("", 0.0))
        if seen_etag != etag:
            seen_etag, since = self._telling[head.batch_id] = etag, time.monotonic()
        due_in_s = self._outbox.due_in_s(summary.webhook)
        somebody_is_at_it = summary.lease is not None and time.monotonic() - since < self._patiences.lease_s
        if due_in_s == 0 and not somebody_is_at_it:
            self._telling.pop(head.batch_id)
            await self._tell(head, summary, etag)

    def _let_go(self, batch: RunningBatch) -> None:
        self._running.pop(batch.batch_id, None)
        self.reading.forget(batch.batch_id)
        batch.over.set()
        self._tell_metrics()

    def _refuse(self, batch: RunningBatch, failure: Exception) -> None:
        """A line is not what this version writes; nothing of the batch runs here."""
        log_failure("manifest_unreadable", failure)
        self._refused.add(batch.batch_id)
        self._let_go(batch)

    async def _see_orphan(self, entry: ActiveEntry) -> None:
        now = time.monotonic()
        if now - self._orphans.setdefault(entry.id, now) > self._patiences.orphan_s:
            await self._recorder.io(self._records.forget_entries, entry)

    async def _fetch(self, batch: RunningBatch, index: int) -> None:
        """Have the next lines at hand. A sweep tries again where the store is away."""
        try:
            await self._lines.fetch(batch.batch_id, index, batch.ends)
        except WanError as failure:
            log_failure("manifest_read_failed", failure)
        else:
            self._fetching.discard(batch.batch_id)
            self._jobs.dispatch()
        finally:
            self._fetching.discard(batch.batch_id)

    def _of(self, job_id: str) -> tuple[RunningBatch | None, int]:
        batch_id, index = item_of(job_id) or ("", 0)
        return self._running.get(batch_id), index

    def _tell_metrics(self) -> None:
        batches = self._running.values()
        self._metrics.set_batches(len(batches), sum(batch.num_waiting for batch in batches))


def _cost(parameters: GenerationParameters) -> int:
    """Forwards times pixels: what batches share is the device's time."""
    pixels = parameters.width * parameters.height * parameters.num_frames
    return pixels * parameters.num_inference_steps * (2 if parameters.does_guidance else 1)
