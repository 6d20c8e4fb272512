"""Delivers the webhooks of ended jobs. How far a delivery is stands in the job's record; knows no job that runs.

An attempt begins with a lease on the record, so that of several processes one makes it, and ends with what came of
it. A process that is killed in between leaves a lease that runs out, and the attempt is made again, with the same
`webhook-id` and body.
"""

import asyncio
from datetime import UTC, datetime

from schemas.errors import WanError
from schemas.jobs import JobRecord, Lease
from schemas.webhooks import webhook_id
from serve_graph.jobs.recording import Recorder
from serve_graph.logs import log_failure
from serve_graph.webhooks.events import job_event
from serve_graph.webhooks.schedule import pause_before
from serve_graph.webhooks.sender import WebhookSender
from storage.store import PreconditionFailed

MAX_ATTEMPTS_AT_ONCE = 4


class Outbox:
    """sender: None where the service can't sign, which leaves what waits as it is."""

    def __init__(self, recorder: Recorder, sender: WebhookSender | None) -> None:
        self._recorder = recorder
        self._sender = sender
        self._turns = asyncio.Semaphore(MAX_ATTEMPTS_AT_ONCE)

    def due_in_s(self, record: JobRecord) -> float | None:
        """Seconds until this ended job's delivery may be tried; None where nothing is to be delivered here."""
        if self._sender is None or record.webhook is None or record.webhook.state != "waiting":
            return None
        return pause_before(record.webhook, datetime.now(UTC)).total_seconds()

    async def deliver(self, record: JobRecord, etag: str) -> JobRecord:
        """Make one attempt, unless another process is at it. Returns the record as it is then, as far as is known."""
        if self._sender is None or record.webhook is None:
            return record
        records, io = self._recorder.records, self._recorder.io
        async with self._turns:
            try:
                claimed = records.amended(record, lease=Lease(owner=self._recorder.owner))
                etag = await io(records.write, claimed, etag)
                tried = await self._sender.attempt(record.webhook, webhook_id(record.job_id), job_event(record))
                told = records.amended(claimed, webhook=tried, lease=None)
                await io(records.write, told, etag)
            except PreconditionFailed:
                return record
            except WanError as failure:  # the store is away: the lease runs out, and a sweep comes by again
                log_failure("webhook_unrecorded", failure, job_id=record.job_id)
                return record
        return told
