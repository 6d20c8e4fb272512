"""Several job services on one store, as several processes have them, and what their tests say."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from random_wan import RANDOM_WAN
from support import PATIENCE_S, Jobs, open_jobs

from schemas.clips import Timings
from schemas.errors import Problem, RecordedFailure
from schemas.jobs import JobRecord, JobState, RenderedClip, new_job_id
from schemas.requests import GenerateRequest
from storage.job_records import JobChanges
from storage.keys import clip_key

REQUEST = GenerateRequest(prompt="an otter in a red boat", seed=7)
NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
PATHS = {
    JobState.QUEUED: (),
    JobState.PREPARING: (JobState.PREPARING,),
    JobState.RUNNING: (JobState.PREPARING, JobState.RUNNING),
    JobState.SUCCEEDED: (JobState.PREPARING, JobState.RUNNING, JobState.SUCCEEDED),
    JobState.FAILED: (JobState.FAILED,),
    JobState.CANCELLED: (JobState.CANCELLED,),
}


@asynccontextmanager
async def process(folder: Path, *, started: bool = True, **options: Any) -> AsyncIterator[Jobs]:
    """A process on the store in `folder`. One that is not started is as good as frozen: it renews no lease."""
    with open_jobs(folder, **options) as jobs:
        if started:
            jobs.service.start()
        try:
            yield jobs
        finally:
            for gate in jobs.worker.gates.values():
                gate.open()
            await jobs.service.drain(PATIENCE_S)


async def running(jobs: Jobs, request: GenerateRequest = REQUEST, **options: Any) -> JobRecord:
    """A job that runs until its gate is opened."""
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(request, "request-1", **options)
    await gate.reached()
    return record


async def problem_of(jobs: Jobs, job_id: str) -> Problem:
    """What a job ended with."""
    with pytest.raises(RecordedFailure) as caught:
        async with asyncio.timeout(PATIENCE_S):
            await jobs.service.wait(job_id)
    return caught.value.problem()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what must happen."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # what is waited for is in a store
            await asyncio.sleep(0.01)


async def until_stored(jobs: Jobs, job_id: str, state: JobState) -> JobRecord:
    """The record once it is in that state."""
    await until(lambda: jobs.record(job_id).state is state)
    return jobs.record(job_id)


def keys(jobs: Jobs, prefix: str) -> list[str]:
    return [stat.key for stat in jobs.store.list(prefix).stats]


def recorded(
    jobs: Jobs,
    state: JobState,
    age_s: float,
    *,
    principal: str = "anonymous",
    filed: bool = True,
    now: datetime = NOW,
) -> str:
    """A job that is so old, written without a service. Returns its id."""
    created = now - timedelta(seconds=age_s)
    record = JobRecord(
        job_id=new_job_id(),
        request_id="request-1",
        principal=principal,
        state=JobState.QUEUED,
        created_at=created,
        at={JobState.QUEUED: created},
        attempt_token="0123456789abcdef",
        request=REQUEST,
        parameters=RANDOM_WAN.resolve(REQUEST),
        model=RANDOM_WAN.name,
        prompt_hash="hash",
    )
    etag = jobs.records.create(record)
    for step in PATHS[state]:
        record, etag = jobs.records.transition(record, etag, step, **_changes(record, step))
    if state.is_terminal and filed:
        jobs.records.file_as_done(record)
    return record.job_id


def _changes(record: JobRecord, state: JobState) -> JobChanges:
    if state is not JobState.SUCCEEDED:
        return {}
    key = clip_key(record.clip_id, record.attempt_token)
    return {"result": RenderedClip(key=key, size_bytes=3, sha256="0" * 64, timings=Timings(total=1.5))}
