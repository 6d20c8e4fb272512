"""Follows the records of jobs that other processes run, by looking at them. Knows no live job."""

import asyncio
import contextvars
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from schemas.errors import StoreUnavailable
from schemas.jobs import JobRecord
from serve_graph.jobs.recording import Recorder

LOOK_INTERVAL_S = 1.0
LOOKS_PER_S = 50
"""However many jobs are followed, the store is asked no more often."""


@dataclass
class _Followed:
    """A record that somebody follows; one task looks for all of them."""

    record: JobRecord
    etag: str
    listeners: set[asyncio.Event] = field(default_factory=set)
    failure: Exception | None = None
    task: asyncio.Task[None] | None = None

    def tell(self) -> None:
        for listener in self.listeners:
            listener.set()


class Followers:
    """Any number of followers per record, one look for all of them."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._followed: dict[str, _Followed] = {}

    async def changes(self, job_id: str) -> AsyncGenerator[JobRecord, None]:
        """The record at once, then each change that is seen, up to the one that ends the job.

        Raises JobNotFound, storage.job_records.Deleted, RecordUnreadable; StoreUnavailable at the first look only.
        """
        followed = self._followed.get(job_id)
        if followed is None:
            record, etag = await self._recorder.io(self._recorder.records.get, job_id)
            followed = self._followed.setdefault(job_id, _Followed(record, etag))
        changed = asyncio.Event()
        followed.listeners.add(changed)
        if followed.task is None:
            followed.task = asyncio.create_task(self._look(followed), context=contextvars.Context())
        try:
            while True:
                changed.clear()
                if followed.failure is not None:
                    raise followed.failure
                yield followed.record
                if followed.record.state.is_terminal:
                    return
                await changed.wait()
        finally:
            followed.listeners.discard(changed)
            if not followed.listeners:
                self._followed.pop(job_id, None)
                followed.task.cancel()

    async def _look(self, followed: _Followed) -> None:
        job_id = followed.record.job_id
        records = self._recorder.records
        while not followed.record.state.is_terminal:
            await asyncio.sleep(max(LOOK_INTERVAL_S, len(self._followed) / LOOKS_PER_S))
            try:
                if await self._recorder.io(records.etag, job_id) == followed.etag:
                    continue
                followed.record, followed.etag = await self._recorder.io(records.get, job_id)
            except StoreUnavailable:
                continue
            except Exception as failure:  # deleted or unreadable: the followers' to tell
                followed.failure = failure
                followed.tell()
                return
            followed.tell()
