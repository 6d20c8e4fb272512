"""Many prompts submitted together: what is stored of a batch, and what clients see of it.

A batch's manifest is one object; its creation is the commit of all of its jobs. Their ids derive from the
batch's (`schemas.jobs.item_id`), and a job gets a record of its own once its work begins.
"""

from datetime import datetime
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.clips import Clip
from schemas.errors import Problem
from schemas.jobs import JobState, Lease
from schemas.requests import GenerateRequest, GenerationParameters
from schemas.webhooks import WebhookDelivery

MAX_BATCH_REQUESTS: Final = 10_000
MAX_BATCH_BYTES: Final = 16 * 2**20

BatchState = Literal["running", "cancelling", "ended"]


class BatchItem(BaseModel):
    """One request of a batch, with every default filled in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: GenerateRequest
    parameters: GenerationParameters


class BatchManifest(BaseModel):
    """The first line of a batch's manifest; one `BatchItem` per line follows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    batch_id: str
    request_id: str
    principal: str
    created_at: datetime
    model: str
    total: int
    idempotent: bool = False
    request_digest: str = Field(description="Hex SHA-256 of what was submitted, keyed by the batch's id.")
    webhook_url: str | None = None


class BatchCounts(BaseModel):
    """How many of a batch's jobs are in each state; they add up to `total`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queued: int = Field(description="Those that run in another process count as queued here.")
    running: int
    succeeded: int
    failed: int
    cancelled: int


class BatchCancel(BaseModel):
    """That a batch was cancelled: what has not begun never does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    cancelled_at: datetime


class BatchSummary(BaseModel):
    """How a batch has ended; only `webhook` and `lease` change afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    counts: BatchCounts
    ended_at: datetime
    webhook: WebhookDelivery | None = Field(default=None, description="Of the batch's end, where that is to be told.")
    lease: Lease | None = Field(default=None, description="Of the process that tells it just now.")

    @property
    def awaits_webhook(self) -> bool:
        """Whether the batch's end has still to be told."""
        return self.webhook is not None and self.webhook.state == "waiting"


class BatchTombstone(BaseModel):
    """What is left of a deleted batch, in its manifest's place: enough to answer 410, and to never render it again.

    One object for all of its jobs: their ids lead to it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    batch_id: str
    principal: str
    created_at: datetime
    deleted_at: datetime
    request_digest: str


class Batch(BaseModel):
    """A batch as clients see it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_id: str
    state: BatchState
    created_at: datetime
    ended_at: datetime | None = None
    request_id: str
    model: str
    total: int
    counts: BatchCounts
    seconds_left: float | None = Field(default=None, description="An estimate; null before there is one.")


class BatchPage(BaseModel):
    """Some batches, newest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batches: tuple[Batch, ...]
    next_cursor: str | None = Field(description="`after` of the next page; null on the last.")


class BatchResult(BaseModel):
    """One line of a batch's results, in the order of submission."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    job_id: str
    state: JobState
    clip: Clip | None = None
    error: Problem | None = None
