"""A job's life: its record, its states and the view of it that clients get.

                   ┌────────────┐ another attempt, when the worker of the last one was lost
                   v            │
    queued ──> preparing ──> running ──> succeeded
      │            │            │
      └────────────┴────────────┴──────> failed | cancelled

An attempt that is lost while it is prepared enters `preparing` again. Each attempt has a token of its own.
`TRANSITIONS` is the only table of what may follow what. Progress is not durable: it lives with the process that
runs the job and never reaches the record.
"""

import secrets
from datetime import datetime
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from schemas.clips import Clip, Timings
from schemas.errors import Problem
from schemas.requests import GenerateRequest, GenerationParameters

ANONYMOUS: Final = "anonymous"
"""The owner of jobs made where no API key was asked for."""


class JobState(StrEnum):
    """Where a job is in its life; drawn at the top of this file."""

    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: Final[dict[JobState, frozenset[JobState]]] = {
    JobState.QUEUED: frozenset({JobState.PREPARING, JobState.FAILED, JobState.CANCELLED}),
    JobState.PREPARING: frozenset({JobState.PREPARING, JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.PREPARING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class RenderedClip(BaseModel):
    """What the generator hands back: where the bytes are and what they are. The bytes never cross a handle.

    denoise_device_s, decode_device_s: seconds that the device worked on this job, its part of shared forwards; the
    timings of the two stages also hold the turns of other jobs. 0 in records of before they were kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    size_bytes: int
    sha256: str
    timings: Timings
    denoise_device_s: float = 0.0
    decode_device_s: float = 0.0


class JobRecord(BaseModel):
    """The durable truth about a job: a JSON object in the store, changed by compare-and-swap only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    job_id: str
    request_id: str
    principal: str = Field(default=ANONYMOUS, description="Who owns it: an API key's name.")
    state: JobState
    at: dict[JobState, datetime] = Field(description="When each state was entered last (UTC).")
    attempt_token: str
    request: GenerateRequest
    parameters: GenerationParameters
    model: str
    prompt_hash: str
    result: RenderedClip | None = None
    error: Problem | None = None

    @property
    def clip_id(self) -> str:
        return clip_id_of(self.job_id)


class Progress(BaseModel):
    """How far a job is. `seconds_left` is an estimate, null until there is something to estimate from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str = Field(examples=["denoise"])
    step: int
    steps: int
    seconds_left: float | None


class Job(BaseModel):
    """A job as clients see it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job_id: str
    state: JobState
    created_at: datetime
    request_id: str
    progress: Progress | None = Field(default=None, description="While it runs, from the process that runs it.")
    clip: Clip | None = Field(default=None, description="Once it succeeded.")
    error: Problem | None = Field(default=None, description="Once it failed or was cancelled.")


_JOB_PREFIX = "job_"
_CLIP_PREFIX = "clip_"
ID_PATTERN: Final = r"[0-9a-f]{32}"


def new_job_id() -> str:
    """A job id that can't be guessed: 128 random bits."""
    return _JOB_PREFIX + secrets.token_hex(16)


def clip_id_of(job_id: str) -> str:
    """The id of the one clip that a job makes."""
    return _CLIP_PREFIX + job_id.removeprefix(_JOB_PREFIX)


def job_id_of(clip_id: str) -> str:
    """The job that made a clip."""
    return _JOB_PREFIX + clip_id.removeprefix(_CLIP_PREFIX)
