"""What a job or a batch that ended says to its receiver."""

from typing import Final

from schemas.batches import BatchManifest, BatchSummary
from schemas.jobs import JobRecord, JobState
from schemas.webhooks import WebhookEvent, WebhookEventType, WebhookSubject

_BATCH_ENDED: Final = "ended"

_TYPES: Final[dict[JobState, WebhookEventType]] = {
    JobState.SUCCEEDED: "video.completed",
    JobState.FAILED: "video.failed",
    JobState.CANCELLED: "video.cancelled",
}


def job_event(record: JobRecord) -> WebhookEvent:
    """The one event of a job that ended; from its record alone, so that it is the same after a restart.

    Raises ValueError where the job has not ended.
    """
    kind = _TYPES.get(record.state)
    if kind is None:
        raise ValueError(f"a job that is {record.state.value} has no event yet")
    subject = WebhookSubject(id=record.job_id, state=record.state.value, request_id=record.request_id)
    return WebhookEvent(type=kind, timestamp=record.at[record.state], data=subject)


def batch_event(head: BatchManifest, summary: BatchSummary) -> WebhookEvent:
    """The one event of a batch that ended; the same after a restart."""
    subject = WebhookSubject(id=head.batch_id, state=_BATCH_ENDED, request_id=head.request_id)
    return WebhookEvent(type="batch.completed", timestamp=summary.ended_at, data=subject)
