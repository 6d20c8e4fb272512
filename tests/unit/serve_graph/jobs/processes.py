"""Several job services on one store, as several processes have them, and what their tests say."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support import PATIENCE_S, Jobs, open_jobs

from schemas.errors import Problem, RecordedFailure
from schemas.jobs import JobRecord, JobState
from schemas.requests import GenerateRequest

REQUEST = GenerateRequest(prompt="an otter in a red boat", seed=7)


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
        while not condition():
            await asyncio.sleep(0.01)


async def until_stored(jobs: Jobs, job_id: str, state: JobState) -> JobRecord:
    """The record once it is in that state."""
    await until(lambda: jobs.record(job_id).state is state)
    return jobs.record(job_id)


def keys(jobs: Jobs, prefix: str) -> list[str]:
    return [stat.key for stat in jobs.store.list(prefix).stats]
