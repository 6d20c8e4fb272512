"""Tidies the store now and then: retention and garbage, a slice at a time. Knows no jobs of this process."""

import asyncio
from datetime import timedelta
from secrets import token_hex

from schemas.errors import WanError
from serve_graph.jobs.limits import Patiences
from serve_graph.jobs.recording import Recorder
from serve_graph.logs import log_event, log_failure
from storage.batch_records import BatchRecords
from storage.upkeep import Upkeep


class Janitor:
    """Several processes may each have one."""

    def __init__(self, recorder: Recorder, patiences: Patiences) -> None:
        self._recorder = recorder
        self._interval_s = patiences.upkeep_s
        self._kept = None if patiences.kept_s is None else timedelta(seconds=patiences.kept_s)
        store = recorder.records.store
        self._upkeep = Upkeep(store, recorder.records, BatchRecords(store))
        self._cursor: str | None = f"clips/clip_{token_hex(2)}"  # anywhere: not all processes live for a whole round

    async def run(self) -> None:
        """Tidy until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.tidy()
            except WanError as failure:  # the store is away; the next round comes by again
                log_failure("upkeep_failed", failure)
            except Exception as failure:  # the boundary: one bad round must not be the last one
                log_failure("upkeep_failed", failure)

    async def tidy(self) -> None:
        """One round: some of what has expired, and the next slice of all clips. Raises StoreUnavailable."""
        io, upkeep = self._recorder.io, self._upkeep
        jobs = batches = 0
        if self._kept is not None:
            jobs = await io(upkeep.delete_expired_jobs, self._kept)
            batches = await io(upkeep.delete_expired_batches, self._kept)
        tombstones = await io(upkeep.forget_tombstones)
        swept = await io(upkeep.collect_garbage, self._cursor)
        self._cursor = swept.cursor
        if jobs or batches or tombstones or swept.deleted:
            log_event("tidied", jobs=jobs, batches=batches, tombstones=tombstones, clips=swept.deleted)
