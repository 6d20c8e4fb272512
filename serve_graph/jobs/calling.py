"""Has jobs run by a platform (`platform.py`), from a process that runs none itself: it calls, and looks after calls."""

import asyncio
import time
from collections import Counter

from schemas.errors import JobNotFound, WanError
from schemas.jobs import JobRecord, is_batch_id
from serve_graph.jobs.census import Census
from serve_graph.jobs.platform import Platform, PlatformUnavailable
from serve_graph.jobs.recording import Recorder
from serve_graph.logs import log_event, log_failure
from storage.job_records import Deleted
from storage.store import PreconditionFailed

COUNTED_FOR_S = 2.0
"""How old the numbers of unfinished jobs may be, by which requests are admitted."""


class Caller:
    """All of it belongs to one event loop. census: gets the numbers of unfinished jobs."""

    def __init__(self, platform: Platform, recorder: Recorder, census: Census) -> None:
        self._platform = platform
        self._recorder = recorder
        self._records = recorder.records
        self._census = census
        self._counted_at = float("-inf")
        self._counting = asyncio.Lock()
        self.unfinished_batches: Counter[str] = Counter()

    async def begin(self, record: JobRecord, etag: str) -> None:
        """Call for a recorded job, and put the call's id on record. A sweep tries again where that fails."""
        call_id = await self._call(record.job_id)
        if call_id is None:
            return
        try:
            while not record.state.is_terminal:
                try:
                    await self._recorder.io(self._records.write, self._records.amended(record, call_id=call_id), etag)
                    return
                except PreconditionFailed:  # it was begun already, or cancelled
                    record, etag = await self._recorder.io(self._records.get, record.job_id)
        except (JobNotFound, Deleted):
            pass
        except WanError as failure:  # the store is away; whoever looks at the job calls once more, which does no harm
            log_failure("call_not_recorded", failure, job_id=record.job_id)

    async def see(self, record: JobRecord, etag: str) -> None:
        """Look at a job that waits: what it was called for with may be lost."""
        try:
            if record.call_id is not None and await self._recorder.io(self._platform.is_pending, record.call_id):
                return
        except PlatformUnavailable as failure:
            log_failure("platform_unavailable", failure, job_id=record.job_id)
            return
        log_event("job_called_again", job_id=record.job_id, request_id=record.request_id)
        await self.begin(record, etag)

    async def begin_batch(self, batch_id: str, total: int) -> None:
        """Call for a batch: a turn for each of its jobs, as far as there can be so many at once."""
        turns = min(total, self._platform.max_turns)
        await asyncio.gather(*(self._call(batch_id) for _ in range(turns)))

    async def see_batch(self, batch_id: str, total: int) -> None:
        """Look at a batch that has not ended. Turns that are there for other work take up its jobs, too."""
        try:
            if not await self._recorder.io(self._platform.is_idle):
                return
        except PlatformUnavailable as failure:
            log_failure("platform_unavailable", failure)
            return
        log_event("batch_called_again", batch_id=batch_id)
        await self.begin_batch(batch_id, total)

    async def count(self) -> None:
        """Have the census know what others run. Raises StoreUnavailable."""
        async with self._counting:
            if time.monotonic() - self._counted_at < COUNTED_FOR_S:
                return
            entries = await self._recorder.io(lambda: list(self._records.active()))
            self._census.elsewhere = Counter(entry.principal for entry in entries if not is_batch_id(entry.id))
            self.unfinished_batches = Counter(entry.principal for entry in entries if is_batch_id(entry.id))
            self._counted_at = time.monotonic()

    async def _call(self, work_id: str) -> str | None:
        try:
            return await self._recorder.io(self._platform.call, work_id)
        except PlatformUnavailable as failure:
            log_failure("platform_unavailable", failure, work_id=work_id)
            return None
