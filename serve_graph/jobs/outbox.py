"""Delivers the webhooks of ended jobs and batches. How far a delivery is stands in the record of what has ended.

An attempt begins with a lease on the record, so that of several processes one makes it, and ends with what came of
it. A process that is killed in between leaves a lease that runs out, and the attempt is made again, with the same
`webhook-id` and body. Knows no job that runs.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from schemas.batches import BatchManifest, BatchSummary
from schemas.errors import WanError
from schemas.jobs import JobRecord, Lease
from schemas.webhooks import WebhookDelivery, WebhookEvent, webhook_id
from serve_graph.jobs.recording import Recorder
from serve_graph.logs import log_failure
from serve_graph.webhooks.events import batch_event, job_event
from serve_graph.webhooks.schedule import pause_before
from serve_graph.webhooks.sender import WebhookSender
from storage.batch_records import BatchRecords
from storage.store import PreconditionFailed

MAX_ATTEMPTS_AT_ONCE = 4

Write = Callable[[WebhookDelivery, Lease | None, str], Awaitable[str]]
"""Puts a delivery and a lease into the record that has this ETag. Returns the new ETag. Raises PreconditionFailed."""


class Outbox:
    """sender: None where the service can't sign, which leaves what waits as it is."""

    def __init__(self, recorder: Recorder, sender: WebhookSender | None) -> None:
        self._recorder = recorder
        self._sender = sender
        self._turns = asyncio.Semaphore(MAX_ATTEMPTS_AT_ONCE)

    def due_in_s(self, delivery: WebhookDelivery | None) -> float | None:
        """Seconds until a delivery may be tried; None where nothing is to be delivered here."""
        if self._sender is None or delivery is None or delivery.state != "waiting":
            return None
        return pause_before(delivery, datetime.now(UTC)).total_seconds()

    async def deliver(self, record: JobRecord, etag: str) -> JobRecord:
        """Make one attempt for a job, unless another process is at it. Returns the record, as far as is known."""
        if record.webhook is None:
            return record
        records = self._recorder.records

        async def write(webhook: WebhookDelivery, lease: Lease | None, etag: str) -> str:
            changed = records.amended(record, webhook=webhook, lease=lease)
            return await self._recorder.io(records.write, changed, etag)

        told = await self._tell(record.webhook, record.job_id, job_event(record), etag, write)
        return records.amended(record, webhook=told)

    async def deliver_batch(
        self, records: BatchRecords, head: BatchManifest, summary: BatchSummary, etag: str
    ) -> BatchSummary:
        """As `deliver`, for a batch."""
        if summary.webhook is None:
            return summary

        async def write(webhook: WebhookDelivery, lease: Lease | None, etag: str) -> str:
            changed = summary.model_copy(update={"webhook": webhook, "lease": lease})
            return await self._recorder.io(records.write_summary, head.batch_id, changed, etag)

        told = await self._tell(summary.webhook, head.batch_id, batch_event(head, summary), etag, write)
        return summary.model_copy(update={"webhook": told})

    async def _tell(
        self, delivery: WebhookDelivery, subject_id: str, event: WebhookEvent, etag: str, write: Write
    ) -> WebhookDelivery:
        """One attempt. Returns the delivery as it was where there was none, or its outcome could not be recorded."""
        if self._sender is None:
            return delivery
        async with self._turns:
            try:
                etag = await write(delivery, Lease(owner=self._recorder.owner), etag)
                tried = await self._sender.attempt(delivery, webhook_id(subject_id), event)
                await write(tried, None, etag)
            except PreconditionFailed:
                return delivery
            except WanError as failure:  # the store is away: the lease runs out, and a sweep comes by again
                log_failure("webhook_unrecorded", failure, job_id=subject_id)
                return delivery
        return tried
