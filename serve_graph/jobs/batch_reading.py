"""Reads batches and their jobs: in this process's hands, in the store's lists, or in the manifest. Changes none."""

import asyncio
import itertools
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from secrets import token_hex
from typing import Final, Protocol

from schemas.batches import Batch, BatchCancel, BatchCounts, BatchManifest, BatchPage, BatchResult, BatchState
from schemas.errors import (
    BatchGone,
    BatchNotFound,
    FieldError,
    InvalidRequest,
    JobCancelled,
    JobGone,
    JobNotFound,
    StoreUnavailable,
)
from schemas.jobs import JobRecord, JobState, item_id, item_of
from schemas.requests import GenerateRequest, GenerationParameters
from serve_graph.api_keys import Principal
from serve_graph.jobs.live import LiveJob
from serve_graph.jobs.manifest_lines import ManifestLines
from serve_graph.jobs.recording import Recorder
from serve_graph.jobs.running_batch import HERE, WAITING, RunningBatch
from serve_graph.jobs.views import Views
from serve_graph.logs import log_failure
from serve_graph.prompts import prompt_hash
from storage.batch_records import BatchDeleted, BatchRecords, entry_of_batch
from storage.job_records import Deleted, RecordUnreadable
from storage.keys import entry_id
from storage.store import InvalidKey

READS_AHEAD: Final = 16
"""Records read at the same time for a stream of results."""

SEEN_FOR_S: Final = 2.0
"""What the store's lists say of a batch is asked for no more often."""

MAX_SEEN: Final = 8
"""Each is 2 MB at 10,000 jobs."""

_PLACE = re.compile(r"[0-9]{5}")


@dataclass(frozen=True)
class _Seen:
    """What the store's lists said of a batch: how jobs ended, and which have a record."""

    at: float
    ended: bool
    done: dict[int, JobState]
    begun: frozenset[int]
    cancel: BatchCancel | None

    def has_record(self, index: int) -> bool:
        """Whether a job has begun, or was cancelled by itself."""
        return index in self.begun or index in self.done


class Jobs(Protocol):
    """What reading asks of the jobs in this process."""

    def live(self, job_id: str) -> LiveJob | None: ...

    def in_hand(self, job_id: str) -> LiveJob | None: ...


class BatchReading:
    """running: the batches that this process works on."""

    def __init__(
        self,
        running: Mapping[str, RunningBatch],
        jobs: Jobs,
        recorder: Recorder,
        records: BatchRecords,
        lines: ManifestLines,
        views: Views,
        *,
        hash_secret: bytes,
    ) -> None:
        self._running = running
        self._jobs = jobs
        self._recorder = recorder
        self._records = records
        self._lines = lines
        self._views = views
        self._hash_secret = hash_secret
        self._seen: dict[str, _Seen] = {}

    async def batch(self, batch_id: str, principal: Principal) -> Batch:
        """A batch as its owner sees it. Raises BatchNotFound, BatchGone."""
        running = self._running.get(batch_id)
        if running is None:
            return await self.view(await self.head(batch_id, principal))
        check_owner(running.head.principal, principal)
        if running.shared:
            with suppress(StoreUnavailable):  # what this process knows has to do then
                running.all_ended((await self._look(batch_id)).done)
                if running.is_over:  # another process has written its end, or a sweep of this one will
                    return await self.view(running.head)
        return self.running_view(running)

    async def batches(self, principal: Principal, *, limit: int, after: str | None) -> BatchPage:
        """One page of a principal's batches, newest first. Raises InvalidRequest for a cursor that is none."""
        _check_cursor(after)
        found: list[Batch] = []
        more = True
        while more and len(found) < limit:
            wanted = limit - len(found)
            entries, more = await self._recorder.io(
                lambda after=after, wanted=wanted: self._records.entries(principal.name, after=after, limit=wanted)
            )
            read = await asyncio.gather(*(self._listed(entry, principal) for entry in entries))
            found += [batch for batch in read if batch is not None]
            after = entries[-1] if entries else after
        return BatchPage(batches=tuple(found), next_cursor=after if more else None)

    async def page(
        self, batch_id: str, principal: Principal, *, states: Sequence[JobState], limit: int, after: str | None
    ) -> tuple[list[JobRecord], str | None]:
        """Records of a batch's jobs in the order of submission, and the next page's cursor.

        Raises BatchNotFound, BatchGone, InvalidRequest for a cursor that is none.
        """
        if after is not None and not _PLACE.fullmatch(after):
            raise _no_cursor()
        head = await self.head(batch_id, principal)
        seen = await self._look(batch_id)
        places = range(0 if after is None else int(after) + 1, head.total)
        possible = iter([index for index in places if self._may_be_in(states, batch_id, index, seen)])
        found: list[tuple[int, JobRecord]] = []
        while len(found) <= limit:
            window = list(itertools.islice(possible, READS_AHEAD))
            if not window:
                break
            read = await asyncio.gather(*(self._item(head, index, seen) for index in window))
            found += [(i, r) for i, r in zip(window, read, strict=True) if r is not None and r.state in states]
        cursor = f"{found[limit - 1][0]:05d}" if len(found) > limit else None
        return [record for _, record in found[:limit]], cursor

    async def results(self, batch_id: str, principal: Principal) -> AsyncGenerator[BatchResult, None]:
        """Every job's state, and its clip or its problem, in the order of submission; 16 records are read ahead.

        Raises BatchNotFound, BatchGone, StoreUnavailable.
        """
        head = await self.head(batch_id, principal)
        seen = await self._look(batch_id)
        ahead: list[asyncio.Task[BatchResult]] = []
        try:
            for index in range(head.total):
                ahead.append(asyncio.create_task(self._result(head, index, seen)))
                if len(ahead) == READS_AHEAD:
                    yield await ahead.pop(0)
            while ahead:
                yield await ahead.pop(0)
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def unbegun(self, job_id: str, principal: Principal) -> JobRecord:
        """What the manifest says of a job that has no record: it waits, or was cancelled before it began.

        Raises JobNotFound, JobGone.
        """
        item = item_of(job_id)
        if item is None:
            raise JobNotFound
        batch_id, index = item
        running = self._running.get(batch_id)
        try:
            head = running.head if running is not None else await self.head(batch_id, principal)
            check_owner(head.principal, principal)
            if index >= head.total:
                raise JobNotFound
            if running is not None:
                return await self._from_manifest(head, index, running.cancel)
            cancel = await self._recorder.io(self._records.cancelled, batch_id)
            return await self._from_manifest(head, index, cancel)
        except BatchNotFound as error:
            raise JobNotFound from error
        except BatchGone as error:
            raise JobGone from error

    async def head(self, batch_id: str, principal: Principal) -> BatchManifest:
        """Raises BatchNotFound, BatchGone."""
        running = self._running.get(batch_id)
        try:
            head = running.head if running else await self._recorder.io(self._records.head, batch_id)
        except BatchDeleted as deleted:
            check_owner(deleted.tombstone.principal, principal)
            raise
        check_owner(head.principal, principal)
        return head

    async def view(self, head: BatchManifest) -> Batch:
        """A batch that this process does not work on."""
        summary = await self._recorder.io(self._records.summary, head.batch_id)
        if summary is not None:
            return _batch(head, "ended", summary.counts, ended_at=summary.ended_at)
        seen = await self._look(head.batch_id)
        ended = Counter(seen.done.values())
        unbegun = 0 if seen.cancel is None else head.total - len(seen.begun | seen.done.keys())
        counts = BatchCounts(
            queued=head.total - ended.total() - unbegun,
            running=0,
            succeeded=ended[JobState.SUCCEEDED],
            failed=ended[JobState.FAILED],
            cancelled=ended[JobState.CANCELLED] + unbegun,
        )
        return _batch(head, "running" if seen.cancel is None else "cancelling", counts)

    def running_view(self, batch: RunningBatch) -> Batch:
        lives = [self._jobs.live(job_id) for job_id in batch.at(HERE)]
        counts = batch.counts(running=sum(live is not None and live.started for live in lives))
        state: BatchState = "running" if batch.cancel is None else "cancelling"
        return _batch(batch.head, state, counts, seconds_left=batch.seconds_left())

    def forget(self, batch_id: str) -> None:
        """Look at the store's lists again, since something has changed."""
        self._seen.pop(batch_id, None)

    def record(
        self, head: BatchManifest, index: int, request: GenerateRequest, parameters: GenerationParameters
    ) -> JobRecord:
        """The record of a job that has not begun."""
        return JobRecord(
            job_id=item_id(head.batch_id, index),
            request_id=head.request_id,
            principal=head.principal,
            batch_id=head.batch_id,
            state=JobState.QUEUED,
            created_at=head.created_at,
            at={JobState.QUEUED: head.created_at},
            attempt_token=token_hex(8),
            idempotent=head.idempotent,
            request=request,
            parameters=parameters,
            model=head.model,
            prompt_hash=prompt_hash(self._hash_secret, parameters.prompt),
        )

    async def _from_manifest(self, head: BatchManifest, index: int, cancel: BatchCancel | None) -> JobRecord:
        item = await self._lines.item(head.batch_id, index)
        record = self.record(head, index, item.request, item.parameters)
        if cancel is None:
            return record
        at = {**record.at, JobState.CANCELLED: cancel.cancelled_at}
        error = JobCancelled().problem(job_id=record.job_id)
        return record.model_copy(update={"state": JobState.CANCELLED, "at": at, "error": error})

    async def _look(self, batch_id: str) -> _Seen:
        """What the store's lists say, or have said a moment ago, but nothing from before the batch's end."""
        io, records, seen = self._recorder.io, self._records, self._seen.get(batch_id)
        fresh = seen is not None and time.monotonic() - seen.at <= SEEN_FOR_S
        if seen is not None and fresh and seen.ended:
            return seen
        ended = await io(records.summary, batch_id) is not None
        if seen is not None and fresh and not ended:
            return seen
        cancel, done, begun = await asyncio.gather(
            io(records.cancelled, batch_id), io(records.done, batch_id), io(records.begun, batch_id)
        )
        seen = self._seen[batch_id] = _Seen(time.monotonic(), ended, done, frozenset(begun), cancel)
        if len(self._seen) > MAX_SEEN:
            self._seen.pop(next(iter(self._seen)))
        return seen

    async def _listed(self, entry: str, principal: Principal) -> Batch | None:
        """The batch behind an entry of the index; None where there is none any more."""
        try:
            head = await self._recorder.io(self._records.head, entry_id(entry))
            return await self.batch(head.batch_id, principal) if entry_of_batch(head) == entry else None
        except (BatchNotFound, BatchGone):
            return None
        except RecordUnreadable as failure:
            log_failure("manifest_unreadable", failure)
            return None

    def _has_record(self, batch_id: str, index: int, seen: _Seen) -> bool:
        """Whether there may be a record, as far as the store's lists and this process know."""
        running = self._running.get(batch_id)
        return seen.has_record(index) or (running is not None and running.place(index) != WAITING)

    def _may_be_in(self, states: Sequence[JobState], batch_id: str, index: int, seen: _Seen) -> bool:
        if index in seen.done:
            return seen.done[index] in states
        if self._has_record(batch_id, index, seen):
            return True
        return (JobState.QUEUED if seen.cancel is None else JobState.CANCELLED) in states

    async def _item(self, head: BatchManifest, index: int, seen: _Seen) -> JobRecord | None:
        """A job's record, or what the manifest says of it; None once it was deleted."""
        job_id = item_id(head.batch_id, index)
        live = self._jobs.in_hand(job_id)
        if live is not None and not live.lost:
            return live.record
        if self._has_record(head.batch_id, index, seen):
            try:
                return (await self._recorder.io(self._recorder.records.get, job_id))[0]
            except Deleted:
                return None
            except JobNotFound:
                pass
        return await self._from_manifest(head, index, seen.cancel)

    async def _result(self, head: BatchManifest, index: int, seen: _Seen) -> BatchResult:
        job_id = item_id(head.batch_id, index)
        if not self._has_record(head.batch_id, index, seen):
            if seen.cancel is None:
                return BatchResult(index=index, job_id=job_id, state=JobState.QUEUED)
            error = JobCancelled().problem(job_id=job_id)
            return BatchResult(index=index, job_id=job_id, state=JobState.CANCELLED, error=error)
        record = await self._item(head, index, seen)
        if record is None:
            error = JobGone().problem(job_id=job_id)
            return BatchResult(index=index, job_id=job_id, state=JobState.DELETED, error=error)
        job = self._views.job(record)
        return BatchResult(index=index, job_id=job_id, state=job.state, clip=job.clip, error=job.error)


def _batch(
    head: BatchManifest,
    state: BatchState,
    counts: BatchCounts,
    *,
    ended_at: datetime | None = None,
    seconds_left: float | None = None,
) -> Batch:
    return Batch(
        batch_id=head.batch_id,
        state=state,
        created_at=head.created_at,
        ended_at=ended_at,
        request_id=head.request_id,
        model=head.model,
        total=head.total,
        counts=counts,
        seconds_left=seconds_left,
    )


def check_owner(owner: str, principal: Principal) -> None:
    """Another's batch looks like none."""
    if owner != principal.name:
        raise BatchNotFound


def _check_cursor(cursor: str | None) -> None:
    try:
        if cursor is not None:
            entry_id(cursor)
    except InvalidKey as error:
        raise _no_cursor() from error


def _no_cursor() -> InvalidRequest:
    return InvalidRequest([FieldError(field="after", message="is no cursor of this list")])
