"""How this process changes the records of its jobs: compare-and-swap, leases, and what to do when another was first.

Knows no worker and no queue.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from secrets import token_hex
from typing import Any, TypeVar, Unpack

from schemas.errors import JobCancelled, JobNotFound, StoreUnavailable
from schemas.jobs import JobRecord, JobState, Lease, Progress
from serve_graph.jobs.live import LiveJob
from serve_graph.patience import Patience
from storage.job_records import Deleted, JobChanges, JobRecords
from storage.store import PreconditionFailed

T = TypeVar("T")


class Lost(Exception):
    """Another process has the job, has ended it or has deleted it."""


class Recorder:
    """Writes the records of this process's jobs.

    owner: this process's name in leases. patience_s: how long a write waits for a store that is away.
    """

    def __init__(self, records: JobRecords, executor: Executor, *, owner: str, patience_s: float) -> None:
        self.records = records
        self.owner = owner
        self.hurrying = False
        self._executor = executor
        self._patience_s = patience_s

    async def io(self, call: Callable[..., T], *args: Any) -> T:
        """Run a blocking store call on the bounded pool."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)

    async def claim(self, live: LiveJob) -> None:
        """Begin an attempt: `preparing`, under this process's lease. Raises Lost, JobCancelled.

        The attempt's token is new unless it is the job's first. A job of a batch gets its record here. Whoever
        ends a cancelled batch looks for such records once the cancel is written, so one made later has to see it.
        """
        unbegun = live.etag is None

        def changes(record: JobRecord) -> JobChanges:
            lease = Lease(owner=self.owner)
            if JobState.PREPARING not in record.at:
                return {"lease": lease}
            return {"lease": lease, "attempt_token": token_hex(8), "attempts": record.attempts + 1}

        await self._move(live, JobState.PREPARING, changes)
        batch_id = live.record.batch_id
        if unbegun and batch_id is not None and await self.io(self.records.batch_is_cancelled, batch_id):
            raise JobCancelled

    async def move(self, live: LiveJob, state: JobState, **changes: Unpack[JobChanges]) -> None:
        """Bring the job into its next state. A caller that is cancelled meanwhile leaves the write to finish.

        Raises Lost; JobCancelled where another process has asked for that and `state` ends nothing.
        """
        await self._move(live, state, lambda _: changes)

    async def _move(self, live: LiveJob, state: JobState, changes: Callable[[JobRecord], JobChanges]) -> None:
        async def write() -> None:
            async with live.writing:
                while True:
                    moved = self.records.moved(live.record, state, **changes(live.record))
                    try:
                        live.etag = await self._write(moved, live.etag)
                    except PreconditionFailed:
                        if await self._catch_up(live, moved):
                            return
                        if live.record.cancel_requested and not state.is_terminal:
                            raise JobCancelled from None
                        continue
                    live.record = moved
                    live.tell()
                    return

        await asyncio.shield(write())

    async def renew(self, live: LiveJob, progress: Progress | None) -> None:
        """Renew the job's lease, with its progress as others shall see it; one try. Raises Lost, StoreUnavailable.

        Afterwards `live.record.cancel_requested` says whether another process was asked to cancel it.
        """
        if live.writing.locked():  # the record changes just now, which is as good as a renewal
            return
        async with live.writing:
            lease = live.record.lease
            if lease is None or live.etag is None or live.ending:
                return
            renewed = Lease(owner=lease.owner, renewal=lease.renewal + 1, progress=progress)
            record = self.records.amended(live.record, lease=renewed)
            try:
                live.etag = await self.io(self.records.write, record, live.etag)
            except PreconditionFailed:
                await self._catch_up(live, record)
            else:
                live.record = record

    async def _write(self, moved: JobRecord, etag: str | None) -> str:
        """Put a record in the place of its last version, again and again while the store is away."""
        patience, again = Patience(self._patience_s), False
        while True:
            try:
                return await self.io(lambda again=again: self.records.write(moved, etag, again=again))
            except StoreUnavailable:
                if self.hurrying or not await patience.pause():
                    raise
                again = True

    async def _catch_up(self, live: LiveJob, refused: JobRecord) -> bool:
        """Take over what another process has written, where the job is still this one's. Raises Lost.

        Returns whether it is ended by the very write that was refused: an earlier try had arrived, without an
        answer, and another process has told the job's webhook since.
        """
        try:
            record, etag = await self.io(self.records.get, live.job_id)
        except (JobNotFound, Deleted) as error:
            raise Lost from error
        ended_here = record.state.is_terminal and (record.state, record.at) == (refused.state, refused.at)
        mine = not record.state.is_terminal and record.lease is not None and record.lease.owner == self.owner
        unclaimed = record.state is JobState.QUEUED and live.record.state is JobState.QUEUED
        if not (ended_here or mine or unclaimed):
            raise Lost
        live.record, live.etag = record, etag
        if ended_here:
            live.tell()
        return ended_here
