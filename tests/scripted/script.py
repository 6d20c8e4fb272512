"""What the scripted service has and does next; `service.py` puts it on a port.

Jobs end by themselves, a state further with each look (`auto`), or when a test says so. Faults are answered first.
"""

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from random_wan import RANDOM_WAN

from schemas.batches import Batch, BatchCounts
from schemas.clips import Clip, Timings
from schemas.errors import (
    PROBLEM_MEDIA_TYPE,
    BatchNotFound,
    JobCancelled,
    JobGone,
    JobNotFound,
    RenderFailed,
)
from schemas.jobs import Job, JobState, Progress, clip_id_of
from schemas.requests import GenerateRequest

ENDED = {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


def clip_bytes(job_id: str) -> bytes:
    return b"\0\0\0\x20ftypisom" + job_id.encode() * 40


@dataclass
class Fault:
    """Answers `times` requests to paths that match, after `delay_s`."""

    path: str
    status: int = 503
    retry_after: str | None = "0"
    times: int = 1
    delay_s: float = 0.0
    body: bytes = b"{}"
    media_type: str = PROBLEM_MEDIA_TYPE
    methods: tuple[str, ...] = ("GET", "POST", "DELETE")


@dataclass
class Script:
    """The service's state, and what it was asked. Shared between threads: change it with `advance` and the like."""

    api_key: str | None = None
    jobs: dict[str, Job] = field(default_factory=dict)
    batches: dict[str, list[str]] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    keys: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    downloads: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    expired: set[str] = field(default_factory=set)  # clips whose first URL has expired
    damaged: set[str] = field(default_factory=set)
    cut_events_after: int | None = None
    cut_results_after: int | None = None
    auto: bool = True  # jobs end by themselves when they are looked at
    base: str = ""

    def end(self, job_id: str, state: JobState = JobState.SUCCEEDED) -> Job:
        job = self.jobs[job_id]
        problem = {JobState.FAILED: RenderFailed("the model failed"), JobState.CANCELLED: JobCancelled()}.get(state)
        changes: dict[str, Any] = {"state": state, "at": {**job.at, state: datetime.now(UTC)}}
        if problem is not None:
            changes["error"] = problem.problem(job.request_id, job_id)
        else:
            changes["clip"] = self.clip(job)
        self.jobs[job_id] = job.model_copy(update=changes)
        return self.jobs[job_id]

    def clip(self, job: Job) -> Clip:
        content, clip_id = clip_bytes(job.job_id), clip_id_of(job.job_id)
        return Clip(
            clip_id=clip_id,
            job_id=job.job_id,
            request_id=job.request_id,
            output_url=f"{self.base}/outputs/{clip_id}/first.mp4?signature=secret",
            expires_at=datetime.now(UTC) + timedelta(hours=1),
            model=job.model,
            **job.parameters.model_dump(exclude={"levers"}),
            duration=job.parameters.duration,
            size_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            timings=Timings(total=0.3),
        )

    def make(self, request: GenerateRequest, job_id: str, batch_id: str | None = None) -> Job:
        now = datetime.now(UTC)
        self.jobs[job_id] = Job(
            job_id=job_id,
            state=JobState.QUEUED,
            created_at=now,
            at={JobState.QUEUED: now},
            request_id="request-1",
            batch_id=batch_id,
            model="wan-random",
            parameters=RANDOM_WAN.resolve(request),
            priority="normal",
            attempts=1,
            position=0,
            seconds_left=1.5,
        )
        return self.jobs[job_id]

    def look(self, job_id: str) -> Job:
        """A job; with `auto`, each look takes it one state further."""
        if job_id in self.deleted:
            raise JobGone
        if job_id not in self.jobs:
            raise JobNotFound
        job = self.jobs[job_id]
        if self.auto and job.state is JobState.QUEUED:
            progress = Progress(stage="denoise", step=1, steps=2, seconds_left=0.5)
            self.jobs[job_id] = job.model_copy(update={"state": JobState.RUNNING, "progress": progress})
        elif self.auto and job.state is JobState.RUNNING:
            self.end(job_id, JobState.FAILED if "fail" in job.parameters.prompt else JobState.SUCCEEDED)
        return self.jobs[job_id]

    def batch(self, batch_id: str) -> Batch:
        if batch_id not in self.batches:
            raise BatchNotFound
        jobs = [self.look(job_id) for job_id in self.batches[batch_id]]
        count = {state: sum(job.state is state for job in jobs) for state in JobState}
        ended = all(job.state in ENDED for job in jobs)
        return Batch(
            batch_id=batch_id,
            state="ended" if ended else "running",
            created_at=jobs[0].created_at,
            request_id="request-1",
            model="wan-random",
            total=len(jobs),
            counts=BatchCounts(**{s.value: count[s] for s in JobState if s.value in BatchCounts.model_fields}),
            seconds_left=None if ended else 3.0,
        )

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.fullmatch(path, p) is not None for m, p in self.asked)
