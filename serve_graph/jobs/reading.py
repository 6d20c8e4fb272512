"""Reads jobs wherever they are: in this process's hands, in the store, or in a batch's manifest. Changes none."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from schemas.errors import (
    JobGone,
    JobNotFound,
    StoreUnavailable,
    WanError,
)
from schemas.jobs import (
    JobRecord,
    Tombstone,
    item_of,
)
from serve_graph.api_keys import Principal
from serve_graph.jobs.following import LOOK_INTERVAL_S, Followers
from serve_graph.jobs.live import LiveJob
from serve_graph.jobs.recording import Recorder
from serve_graph.jobs.running import Running
from serve_graph.jobs.views import owned, owned_tombstone
from serve_graph.logs import log_failure
from storage.job_records import Deleted, entry_of
from storage.keys import entry_id


class Reading:
    """What one service knows of jobs, its own and others'."""

    def __init__(self, running: Running, recorder: Recorder) -> None:
        self._running = running
        self._recorder = recorder
        self._records = recorder.records
        self._followers = Followers(recorder)

    async def changes(
        self, job_id: str, principal: Principal
    ) -> AsyncGenerator[tuple[JobRecord, LiveJob | None], None]:
        """The record at each change, and the job where it is this process's."""
        while not self._running.drained.is_set():
            live = self._running.live(job_id)
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
            if self._running.is_live(job_id) or self._running.drained.is_set():
                continue
            async with aclosing(self.changes_elsewhere(job_id, principal)) as elsewhere:
                async for record in elsewhere:
                    yield record, None
                    if record.state.is_terminal:
                        return

    async def _changes_unbegun(self, job_id: str, principal: Principal) -> AsyncGenerator[JobRecord, None]:
        """What there is to say of a batch's job before it has a record. Ends once it has one, or at a stop."""
        shown = None
        while item_of(job_id) is not None and not self._running.is_live(job_id) and not self._running.drained.is_set():
            try:
                record, etag = await self.read(job_id, principal)
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

    async def changes_elsewhere(self, job_id: str, principal: Principal) -> AsyncGenerator[JobRecord, None]:
        """Ends when the job does, when this process takes it in hand, or at a stop."""
        try:
            async with aclosing(self._followers.changes(job_id)) as seen:
                following = asyncio.create_task(anext(seen))
                stopped = asyncio.create_task(self._running.drained.wait())
                try:
                    while True:
                        await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED, timeout=1.0)
                        if following.done():
                            record = following.result()
                            yield owned(record, principal)
                            if record.state.is_terminal:
                                return
                            following = asyncio.create_task(anext(seen))
                        elif stopped.done() or self._running.is_live(job_id):
                            return
                finally:
                    following.cancel()
                    stopped.cancel()
                    await asyncio.gather(following, stopped, return_exceptions=True)
        except Deleted as deleted:
            owned_tombstone(deleted.tombstone, principal)
            raise JobGone from deleted

    async def read(self, job_id: str, principal: Principal) -> tuple[JobRecord, str | None]:
        """A record and its ETag; None for a job of a batch that has no record yet. Raises JobNotFound, JobGone."""
        try:
            record, etag = await self._recorder.io(self._records.get, job_id)
        except JobNotFound:
            return await self._running.batches.reading.unbegun(job_id, principal), None
        except Deleted as deleted:
            owned_tombstone(deleted.tombstone, principal)
            raise JobGone from deleted
        return owned(record, principal), etag

    async def record(self, job_id: str, principal: Principal) -> JobRecord:
        return (await self.read(job_id, principal))[0]

    async def record_or_tombstone(self, job_id: str, principal: Principal) -> JobRecord | Tombstone:
        try:
            return owned((await self._recorder.io(self._records.get, job_id))[0], principal)
        except Deleted as deleted:
            return owned_tombstone(deleted.tombstone, principal)

    async def listed(self, entry: str) -> JobRecord | None:
        """The record behind an entry of an index; None where there is none any more."""
        job_id = entry_id(entry)
        live = self._running.in_hand(job_id)
        try:
            record = live.record if live is not None else (await self._recorder.io(self._records.get, job_id))[0]
        except JobNotFound:
            return None
        except Deleted:
            self._running.spawn(self.bury_again(job_id))  # it was deleted while its end was filed
            return None
        # A job of a batch has an entry of its own for its webhook; it is listed with its batch.
        return record if entry_of(record) == entry and record.batch_id is None else None

    async def bury_again(self, job_id: str) -> None:
        try:
            await self._recorder.io(self._records.get, job_id)
        except Deleted as deleted:
            await self._recorder.io(self._records.bury, deleted.tombstone)
        except WanError as failure:  # the next one who looks does it
            log_failure("burial_failed", failure, job_id=job_id)
