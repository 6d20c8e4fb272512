"""What a job that ended says to its receiver."""

from typing import Final

from schemas.jobs import JobRecord, JobState
from schemas.webhooks import WebhookEvent, WebhookEventType, WebhookSubject

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
