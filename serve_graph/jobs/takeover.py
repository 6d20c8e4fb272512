"""Sees to jobs that nobody works on: left waiting at a stop, or running in a process that was lost.

What has to be seen to is in the active index. A job whose record stays the same for the time of a lease, on this
process's monotonic clock and with the store answering throughout, has lost its owner. No wall clock decides
anything: containers are frozen and thawed, and clocks jump. Knows no worker and no HTTP.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from schemas.errors import JobNotFound, WanError
from schemas.jobs import JobRecord, JobState, Tombstone, is_batch_id
from serve_graph.jobs.limits import Patiences
from serve_graph.jobs.recording import Recorder
from serve_graph.logs import log_event, log_failure
from storage.job_records import ActiveEntry, Deleted, RecordUnreadable, entry_of
from storage.store import PreconditionFailed

T = TypeVar("T")

MAX_LOOKS = 1_000
"""Entries looked at in one sweep, oldest first, beyond those there is room for."""

LOOKERS = 8
"""Looks at the store at the same time; half of the pool's threads."""


class Jobs(Protocol):
    """What the sweeper needs of the job service."""

    def is_live(self, job_id: str) -> bool: ...

    def room(self) -> int: ...

    def adopt(self, record: JobRecord, etag: str) -> None: ...

    def webhook_due_in_s(self, record: JobRecord) -> float | None: ...

    async def file(self, record: JobRecord, etag: str) -> None: ...


class Batches(Protocol):
    """What the sweeper needs of batches, and tells them."""

    async def see(self, entry: ActiveEntry) -> None: ...

    async def see_absent(self, active: Collection[str]) -> None: ...

    def foreign(self) -> list[str]: ...

    def not_begun(self, job_id: str) -> None: ...

    async def file(self, record: JobRecord) -> None: ...

    async def bury(self, tombstone: Tombstone) -> None: ...


@dataclass
class _Watched:
    """What the last looks at an entry have found. record: None where there was none."""

    record: JobRecord | None
    etag: str | None
    since: float


class Sweeper:
    """Looks at the active index again and again.

    model: jobs of other models are left to services that have these. monotonic: the clock, in seconds.
    looked: set once `run` has looked at everything, or has tried to.
    """

    def __init__(
        self,
        recorder: Recorder,
        patiences: Patiences,
        *,
        model: str,
        jobs: Jobs,
        batches: Batches,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._recorder = recorder
        self._records = recorder.records
        self._patiences = patiences
        self._model = model
        self._jobs = jobs
        self._batches = batches
        self._watched: dict[str, _Watched] = {}
        self._swept = False
        self.looked = asyncio.Event()

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                await self.sweep()
            except WanError as failure:
                log_failure("sweep_failed", failure)
                self._watched.clear()  # owners could not renew either: begin to watch anew
            except Exception as failure:  # the boundary: one bad sweep must not be the last one
                log_failure("sweep_failed", failure)
            self.looked.set()
            slept = self._monotonic()
            await asyncio.sleep(self._patiences.renewal_s)
            if self._monotonic() - slept > self._patiences.lease_s:
                self._watched.clear()  # this process was frozen, and others may have been with it

    async def sweep(self) -> None:
        """Look at everything once. Raises StoreUnavailable."""
        entries = await self._recorder.io(lambda: sorted(self._records.active(), key=lambda e: e.entry, reverse=True))
        batches = [entry for entry in entries if is_batch_id(entry.id)]
        others = [entry for entry in entries if not is_batch_id(entry.id) and not self._jobs.is_live(entry.id)]
        others = others[: max(MAX_LOOKS, self._jobs.room())]
        await self._batches.see_absent({entry.id for entry in batches})
        await self._each(self._batches.see, batches)
        items = [job_id for job_id in self._batches.foreign() if not self._jobs.is_live(job_id)][:MAX_LOOKS]
        known = {entry.id for entry in others} | set(items)
        self._watched = {job_id: seen for job_id, seen in self._watched.items() if job_id in known}
        await self._each(self._look, others)
        await self._each(self._look_at_item, items)
        self._swept = True

    @staticmethod
    async def _each(look: Callable[[T], Awaitable[None]], things: Sequence[T]) -> None:
        """Look at several things at the same time."""
        looking = iter(things)

        async def some() -> None:
            for thing in looking:
                await look(thing)

        await asyncio.gather(*(some() for _ in range(LOOKERS)))

    async def _look_at_item(self, job_id: str) -> None:
        """A job of a batch of this process, in somebody else's hands or with an end that is not filed yet."""
        now, seen = self._monotonic(), self._watched.get(job_id)
        try:
            etag = await self._recorder.io(self._records.etag, job_id)
            if seen is None or seen.etag != etag:
                record, etag = await self._recorder.io(self._records.get, job_id)
                seen = self._watched[job_id] = _Watched(record, etag, now)
        except JobNotFound:
            self._batches.not_begun(job_id)
        except Deleted as deleted:
            await self._batches.bury(deleted.tombstone)
        except RecordUnreadable as failure:
            log_failure("record_unreadable", failure, job_id=job_id)
        else:
            if self._jobs.is_live(job_id) or seen.record is None:
                return
            if seen.record.state.is_terminal:  # its webhook, if any, has an entry of its own
                await self._batches.file(seen.record)
            else:
                await self._see_to(seen.record, etag, now - seen.since)

    async def _look(self, entry: ActiveEntry) -> None:
        now, seen = self._monotonic(), self._watched.get(entry.id)
        try:
            etag = await self._recorder.io(self._records.etag, entry.id)
        except JobNotFound:
            await self._see_orphan(entry, now, seen)
            return
        if seen is None or seen.etag != etag:
            try:
                record, etag = await self._recorder.io(self._records.get, entry.id)
            except Deleted as deleted:
                await self._recorder.io(self._records.bury, deleted.tombstone)
                await self._recorder.io(self._records.forget_entry, entry)
                return
            except JobNotFound:
                return
            except RecordUnreadable as failure:
                log_failure("record_unreadable", failure, job_id=entry.id)
                return
            first = seen is None
            seen = self._watched[entry.id] = _Watched(record, etag, now)
            if first and self._swept:
                return  # made by another process a moment ago, most likely
        if seen.record is not None and entry_of(seen.record) != entry.entry:
            await self._recorder.io(self._records.forget_entry, entry)
            return
        if self._jobs.is_live(entry.id) or seen.record is None:
            return
        await self._see_to(seen.record, etag, now - seen.since)

    async def _see_to(self, record: JobRecord, etag: str, unchanged_s: float) -> None:
        if record.state.is_terminal:
            await self._see_to_end(record, etag, unchanged_s)
        elif record.model != self._model:
            return
        elif record.state is JobState.QUEUED:
            if self._jobs.room() > 0:
                self._jobs.adopt(record, etag)
        elif unchanged_s >= self._patiences.lease_s:
            await self._take_over(record, etag)

    async def _see_to_end(self, record: JobRecord, etag: str, unchanged_s: float) -> None:
        """File an ended job, and tell its end once that is due and nobody is at it."""
        due_in_s = self._jobs.webhook_due_in_s(record)
        if record.awaits_webhook and (due_in_s is None or due_in_s > 0 or self._may_be_at_it(record, unchanged_s)):
            return
        await self._jobs.file(record, etag)

    def _may_be_at_it(self, record: JobRecord, unchanged_s: float) -> bool:
        return record.lease is not None and unchanged_s < self._patiences.lease_s

    async def _take_over(self, record: JobRecord, etag: str) -> None:
        """Put a job back in line whose owner is lost; the owner, if it thaws, finds its ETag gone."""
        log_event("job_taken_over", level=logging.WARNING, job_id=record.job_id, request_id=record.request_id)
        if record.cancel_requested:
            moved = self._records.cancelled(record)
        else:
            moved = self._records.moved(record, JobState.QUEUED, lease=None)
        try:
            etag = await self._recorder.io(self._records.write, moved, etag)
        except PreconditionFailed:
            return  # somebody was first, or its owner is back
        if moved.state.is_terminal:
            await self._jobs.file(moved, etag)
        elif self._jobs.room() > 0:
            self._jobs.adopt(moved, etag)

    async def _see_orphan(self, entry: ActiveEntry, now: float, seen: _Watched | None) -> None:
        if seen is None:
            self._watched[entry.id] = _Watched(None, None, now)
        elif now - seen.since > self._patiences.orphan_s:
            await self._recorder.io(self._records.forget_entry, entry)
