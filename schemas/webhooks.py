"""What a webhook says and how its delivery stands. Knows nothing of HTTP, signatures or jobs.

    waiting ──> delivered
       │ ^ │
       └─┘ └──> given_up          after the last of the retries, or at once when the receiver says 410 Gone

An event names what it is about and no more: no prompt and no URL, so that a receiver who is no longer ours learns
nothing. The clip's URL is for `GET /jobs/{job_id}` to sign.
"""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

WebhookState = Literal["waiting", "delivered", "given_up"]

WebhookEventType = Literal["video.completed", "video.failed", "video.cancelled", "batch.completed"]

WebhookError = Literal[
    "url_not_allowed",  # the service no longer allows http, or this address
    "no_public_address",  # one word for a name without an address and one with a private address: no map of our network
    "connect_failed",
    "tls_failed",  # among others: the certificate is not for this host, or nobody we trust signed it
    "timed_out",
    "redirected",
    "unexpected_status",
    "gone",
    "broken_answer",
]
"""Why an attempt failed: fixed words, never the receiver's."""


class WebhookDelivery(BaseModel):
    """How far the delivery of one event is; kept in the record of what it is about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    state: WebhookState = "waiting"
    attempts: int = Field(default=0, ge=0)
    last_status: int | None = Field(default=None, description="The HTTP status that the last attempt got, if any.")
    last_error: WebhookError | None = Field(default=None, description="Why the last attempt failed.")
    delivered_at: datetime | None = None
    next_attempt_at: datetime | None = Field(
        default=None, description="When the next attempt is due; a hint, since clocks may disagree."
    )


class WebhookSubject(BaseModel):
    """What an event is about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(description="The job's id, or the batch's.")
    state: str = Field(description="The state that it ended in.", examples=["succeeded"])
    request_id: str


class WebhookEvent(BaseModel):
    """The body of a webhook. It is the same at every attempt; only the signature's timestamp moves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: WebhookEventType
    timestamp: datetime = Field(description="When it happened, in UTC.")
    data: WebhookSubject


def webhook_id(subject_id: str) -> str:
    """The `webhook-id` of the one event of a job or batch: stable, so that receivers can drop repetitions."""
    return f"msg_{subject_id}"
