"""A job's life: its record, its states and the view of it that clients get.

       handed back at a stop, or taken from an owner that was lost
       ┌────────────┬────────────┐
       v            │            │
    queued ──> preparing ──> running ──> succeeded ──┐
      │            │  ^         │ │                  ├──> deleted
      │            │  └─────────┘ │                  │
      └────────────┴──────────────┴─> failed │ ──────┘
                  (another attempt)   cancelled

An attempt that is lost while it is prepared enters `preparing` again. Each attempt has a token of its own.
`TRANSITIONS` is the only table of what may follow what. Progress is not durable: it lives with the process that
runs the job, and a copy rides on the renewals of its lease for other processes to show.
"""

import re
import secrets
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.clips import Clip, Timings
from schemas.errors import Problem
from schemas.presets import Effort
from schemas.requests import GenerateRequest, GenerationParameters
from schemas.webhooks import WebhookDelivery, WebhookState

ANONYMOUS: Final = "anonymous"
"""The owner of jobs made where no API key was asked for."""


class JobState(StrEnum):
    """Where a job is in its life; drawn at the top of this file. A record that is `deleted` is a `Tombstone`."""

    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DELETED = "deleted"

    @property
    def is_terminal(self) -> bool:
        """Whether the job's work is over."""
        return self in _ENDED

    @property
    def is_owned(self) -> bool:
        """Whether a process works on it and renews its lease."""
        return self in _OWNED


_ENDED: Final = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DELETED})
_OWNED: Final = frozenset({JobState.PREPARING, JobState.RUNNING})

TRANSITIONS: Final[dict[JobState, frozenset[JobState]]] = {
    JobState.QUEUED: frozenset({JobState.PREPARING, JobState.FAILED, JobState.CANCELLED}),
    JobState.PREPARING: frozenset(
        {JobState.QUEUED, JobState.PREPARING, JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.RUNNING: frozenset(
        {JobState.QUEUED, JobState.PREPARING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.SUCCEEDED: frozenset({JobState.DELETED}),
    JobState.FAILED: frozenset({JobState.DELETED}),
    JobState.CANCELLED: frozenset({JobState.DELETED}),
    JobState.DELETED: frozenset(),
}


class RenderedClip(BaseModel):
    """What the generator hands back: where the bytes are and what they are. The bytes never cross a handle.

    denoise_device_s, decode_device_s: seconds that the device worked on this job, its part of shared forwards; the
    timings of the two stages also hold the turns of other jobs. 0, and no `effort`, in records of before they
    were kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    size_bytes: int
    sha256: str
    timings: Timings
    denoise_device_s: float = 0.0
    decode_device_s: float = 0.0
    effort: Effort | None = None


class Progress(BaseModel):
    """How far a job is. `seconds_left` is an estimate, null until there is something to estimate from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str = Field(examples=["denoise"])
    step: int
    steps: int
    seconds_left: float | None


class Lease(BaseModel):
    """A process's claim on a job. It is renewed while the work advances; who sees it unchanged for the lease's
    time, on a clock of its own, may take the job away."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: str = Field(description="A process's name, drawn at its start.")
    renewal: int = Field(default=0, description="Counts up, so that every renewal changes the record.")
    progress: Progress | None = None


class JobRecord(BaseModel):
    """The durable truth about a job: a JSON object in the store, changed by compare-and-swap only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 2
    job_id: str
    request_id: str
    principal: str = Field(default=ANONYMOUS, description="Who owns it: an API key's name.")
    batch_id: str | None = None
    state: JobState
    created_at: datetime
    at: dict[JobState, datetime] = Field(description="When each state was entered last (UTC).")
    attempt_token: str
    attempts: int = Field(default=1, description="How many attempts have begun, those of lost owners included.")
    crashes: int = Field(default=0, description="Attempts that ended with their worker's process, while alone in it.")
    suspect: bool = Field(default=False, description="Its worker was lost while it ran: it runs alone from now on.")
    lease: Lease | None = Field(default=None, description="Whose it is, in `preparing` and `running`.")
    cancel_requested: bool = False
    call_id: str | None = Field(default=None, description="Of the call that a platform (Modal) was given to run it.")
    idempotent: bool = Field(default=False, description="Made with an Idempotency-Key.")
    request: GenerateRequest
    parameters: GenerationParameters
    model: str
    prompt_hash: str
    result: RenderedClip | None = None
    error: Problem | None = None
    webhook: WebhookDelivery | None = Field(default=None, description="Of the job's end, where that is to be told.")

    @model_validator(mode="before")
    @classmethod
    def _created_at_of_version_1(cls, fields: Any) -> Any:
        """Version 1 had it in `at` only."""
        if isinstance(fields, dict) and fields.get("version") == 1:
            return {"created_at": fields["at"][JobState.QUEUED], **fields, "version": 2}
        return fields

    @property
    def clip_id(self) -> str:
        return clip_id_of(self.job_id)

    @property
    def awaits_webhook(self) -> bool:
        """Whether the job's end has still to be told."""
        return self.webhook is not None and self.webhook.state == "waiting"


class Tombstone(BaseModel):
    """What is left of a deleted job, in its record's place: enough to answer 410, and to never render it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 2
    job_id: str
    principal: str
    batch_id: str | None = None
    state: Literal[JobState.DELETED] = JobState.DELETED
    created_at: datetime
    at: dict[JobState, datetime]
    request_digest: str = Field(description="Hex SHA-256 of the request as JSON, keyed by the job's id.")


class Job(BaseModel):
    """A job as clients see it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job_id: str
    state: JobState
    created_at: datetime
    at: dict[JobState, datetime] = Field(description="When each state was entered last.")
    request_id: str
    batch_id: str | None = None
    model: str
    parameters: GenerationParameters
    priority: str
    attempts: int = Field(description="Attempts begun: more than one when a process was lost on the way.")
    cancel_requested: bool = False
    position: int | None = Field(default=None, description="Jobs that go first, while it waits in this process.")
    seconds_left: float | None = Field(default=None, description="An estimate until it ends; null before there is one.")
    progress: Progress | None = Field(default=None, description="While it runs.")
    clip: Clip | None = Field(default=None, description="Once it succeeded.")
    error: Problem | None = Field(default=None, description="Once it failed or was cancelled.")
    webhook: WebhookState | None = Field(default=None, description="How far `webhook_url` was told, once it ended.")


class JobPage(BaseModel):
    """Some jobs, newest first (those of a batch: in the order of submission)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    jobs: tuple[Job, ...]
    next_cursor: str | None = Field(description="`after` of the next page; null on the last.")


_JOB_PREFIX = "job_"
_CLIP_PREFIX = "clip_"
_BATCH_PREFIX = "batch_"
_HEX = r"[0-9a-f]{32}"
ID_PATTERN: Final = rf"{_HEX}(?:-[0-9]{{5}})?"
"""Of jobs and clips, behind their prefix. The five digits: the place in a batch."""
BATCH_ID_PATTERN: Final = rf"{_BATCH_PREFIX}{_HEX}"
_ITEM_ID: Final = re.compile(rf"{_JOB_PREFIX}({_HEX})-([0-9]{{5}})")


def new_job_id() -> str:
    """A job id that can't be guessed: 128 random bits."""
    return _JOB_PREFIX + secrets.token_hex(16)


def job_id_from(digest: str) -> str:
    """The id of a job whose submission is named by 32 or more hex digits (of an idempotency key)."""
    return _JOB_PREFIX + digest[:32]


def new_batch_id() -> str:
    """A batch id that can't be guessed."""
    return _BATCH_PREFIX + secrets.token_hex(16)


def batch_id_from(digest: str) -> str:
    """As `job_id_from`."""
    return _BATCH_PREFIX + digest[:32]


def is_batch_id(job_or_batch_id: str) -> bool:
    """Whether an id is a batch's and not a job's."""
    return job_or_batch_id.startswith(_BATCH_PREFIX)


def item_id(batch_id: str, index: int) -> str:
    """The job id of the prompt at `index` (from 0) of a batch."""
    return f"{_JOB_PREFIX}{batch_id.removeprefix(_BATCH_PREFIX)}-{index:05d}"


def item_of(job_id: str) -> tuple[str, int] | None:
    """The batch and the place in it that a job id names; None for a job of its own, and for what is no job id."""
    match = _ITEM_ID.fullmatch(job_id)
    return None if match is None else (_BATCH_PREFIX + match[1], int(match[2]))


def clip_id_of(job_id: str) -> str:
    """The id of the one clip that a job makes."""
    return _CLIP_PREFIX + job_id.removeprefix(_JOB_PREFIX)


def job_id_of(clip_id: str) -> str:
    """The job that made a clip."""
    return _JOB_PREFIX + clip_id.removeprefix(_CLIP_PREFIX)
