"""Jobs whose worker is lost, or whose store goes away and comes back, over the real local store and records."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import PATIENCE_S, PROGRESS, Gate, Jobs, open_jobs

from schemas.errors import (
    ModelNotReady,
    RecordedFailure,
    RenderFailed,
    ShuttingDown,
    StoreUnavailable,
    WanError,
    WorkerLost,
)
from schemas.jobs import JobRecord, JobState
from schemas.requests import GenerateRequest
from serve_graph.jobs.attempts import MAX_CRASHES as MAX_ATTEMPTS
from storage.job_records import JobRecords
from storage.keys import clip_key

REQUEST = GenerateRequest(prompt="an otter in a red boat", seed=7)
LOST = WorkerLost("the process went away", 1)
AWAY = StoreUnavailable("the object store can't be reached")


@pytest.fixture
async def jobs(tmp_path: Path) -> AsyncIterator[Jobs]:
    with open_jobs(tmp_path / "store", worker_patience_s=PATIENCE_S, store_patience_s=PATIENCE_S) as opened:
        yield opened


async def clip_of(jobs: Jobs) -> str:
    """Run a job to its end. Returns its id. Raises RecordedFailure."""
    record = await jobs.service.submit(REQUEST, "request-1")
    async with asyncio.timeout(PATIENCE_S):
        await jobs.service.wait(record.job_id)
    return record.job_id


def clips(jobs: Jobs) -> list[str]:
    return [stat.key for stat in jobs.store.list("clips/").stats]


def retries(jobs: Jobs, error: str) -> float | None:
    return jobs.registry.get_sample_value("wan_job_retries_total", {"error": error})


# ---- the worker is lost


@pytest.mark.parametrize("stage", ["prepare", "queued", "running"])
@pytest.mark.parametrize("failure", [LOST, ModelNotReady("its deployment is not healthy"), ShuttingDown("closing")])
async def test_a_job_is_tried_again_when_its_worker_is_lost(jobs: Jobs, stage: str, failure: WanError) -> None:
    jobs.worker.passing[stage] = [failure]

    stored = jobs.record(await clip_of(jobs))

    assert stored.state is JobState.SUCCEEDED
    assert stored.error is None
    assert clips(jobs) == [clip_key(stored.clip_id, stored.attempt_token)]
    assert retries(jobs, failure.name) == 1
    assert jobs.registry.get_sample_value("wan_jobs_total", {"outcome": "succeeded", "error": ""}) == 1
    assert (jobs.service.queue().waiting, jobs.service.queue().running) == (0, 0)


async def test_each_attempt_has_a_key_of_its_own_and_the_same_parameters(jobs: Jobs) -> None:
    jobs.worker.passing["running"] = [LOST, LOST]

    stored = jobs.record(await clip_of(jobs))

    tasks = jobs.worker.tasks
    assert len({task.clip_key for task in tasks}) == MAX_ATTEMPTS == 3
    assert [task.parameters for task in tasks] == [stored.parameters] * 3
    assert tasks[-1].clip_key == clip_key(stored.clip_id, stored.attempt_token)
    again = [JobState.PREPARING, JobState.RUNNING]
    assert jobs.store.recorded == [JobState.QUEUED, *again * 3, JobState.SUCCEEDED]


async def test_a_job_fails_when_every_attempt_loses_its_worker(jobs: Jobs) -> None:
    jobs.worker.failures["running"] = LOST

    with pytest.raises(RecordedFailure) as caught:
        await clip_of(jobs)

    assert caught.value.recorded.name == "worker-lost"
    assert len(jobs.worker.tasks) == MAX_ATTEMPTS
    assert retries(jobs, "worker-lost") == MAX_ATTEMPTS - 1


async def test_a_failure_of_the_job_s_own_is_not_tried_again(jobs: Jobs) -> None:
    jobs.worker.failures["running"] = RenderFailed("the model failed on this job")

    with pytest.raises(RecordedFailure):
        await clip_of(jobs)

    assert len(jobs.worker.tasks) == 1


async def test_the_next_attempt_waits_until_the_worker_is_back(jobs: Jobs) -> None:
    jobs.worker.passing["running"] = [LOST]
    jobs.worker.passing["health"] = [ModelNotReady("the model is loading"), LOST]

    await clip_of(jobs)

    assert jobs.worker.passing["health"] == []


async def test_a_job_fails_when_its_worker_does_not_come_back_in_time(tmp_path: Path) -> None:
    with open_jobs(tmp_path / "store", worker_patience_s=0.05) as jobs:
        jobs.worker.passing["running"] = [LOST]
        jobs.worker.passing["health"] = [ModelNotReady("the model is loading")] * 9

        with pytest.raises(RecordedFailure) as caught:
            await clip_of(jobs)

    assert caught.value.recorded.name == "worker-lost"
    assert len(jobs.worker.tasks) == 1


async def test_a_job_fails_when_the_call_that_it_waits_for_has_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve keeps a call until there is a replica, be that for ever."""
    monkeypatch.setattr("serve_graph.jobs.attempts.WATCH_INTERVAL_S", 0.01)
    with open_jobs(tmp_path / "store", worker_patience_s=0.1) as jobs:
        jobs.worker.gates["queued"].close()
        jobs.worker.failures["health"] = ModelNotReady("the model is loading")

        with pytest.raises(RecordedFailure) as caught:
            await clip_of(jobs)

    assert caught.value.recorded.name == "worker-lost"
    assert jobs.worker.rendering == set()


@pytest.mark.parametrize(("patience_s", "absences"), [(0.0, []), (PATIENCE_S, [ModelNotReady("the model is loading")])])
async def test_a_job_whose_worker_is_there_in_time_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float, absences: list[Exception]
) -> None:
    monkeypatch.setattr("serve_graph.jobs.attempts.WATCH_INTERVAL_S", 0.01)
    with open_jobs(tmp_path / "store", worker_patience_s=patience_s) as jobs:
        gate = jobs.worker.gates["queued"]
        gate.close()
        jobs.worker.passing["health"] = absences
        record = await jobs.service.submit(REQUEST, "request-1")
        await gate.reached()
        await jobs.worker.gates["health"].reached()
        gate.open()
        await jobs.service.wait(record.job_id)

    assert len(jobs.worker.tasks) == 1


async def lost_once_released(jobs: Jobs) -> tuple[JobRecord, Gate]:
    """A job that runs, and whose worker is lost when the gate opens."""
    jobs.worker.passing["running"] = [LOST]
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    await gate.reached()
    return record, gate


async def test_a_clip_that_the_lost_attempt_left_is_deleted(jobs: Jobs) -> None:
    record, gate = await lost_once_released(jobs)
    jobs.store.put(clip_key(record.clip_id, record.attempt_token), b"the lost attempt's")

    gate.open()
    clip = await jobs.service.wait(record.job_id)

    stored = jobs.record(record.job_id)
    assert stored.attempt_token != record.attempt_token
    assert clips(jobs) == [clip_key(stored.clip_id, stored.attempt_token)]
    assert stored.attempt_token in clip.output_url


async def test_progress_of_a_lost_attempt_is_forgotten(jobs: Jobs) -> None:
    record, gate = await lost_once_released(jobs)
    assert (await jobs.service.job(record.job_id)).progress == PROGRESS

    jobs.store.hold(JobState.PREPARING)
    gate.open()
    await jobs.store.reached(JobState.PREPARING)
    job = await jobs.service.job(record.job_id)
    assert job.progress is None
    assert (jobs.service.queue().waiting, jobs.service.queue().running) == (1, 0)

    jobs.store.release(JobState.PREPARING)
    await jobs.service.wait(record.job_id)


async def test_cancel_between_two_attempts_ends_the_job(jobs: Jobs) -> None:
    jobs.worker.passing["running"] = [LOST]
    jobs.worker.failures["health"] = ModelNotReady("the model is loading")
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.worker.gates["health"].reached()

    await jobs.service.cancel(record.job_id)
    with pytest.raises(RecordedFailure) as caught:
        await jobs.service.wait(record.job_id)

    assert caught.value.recorded.name == "job-cancelled"
    assert jobs.record(record.job_id).state is JobState.CANCELLED
    assert len(jobs.worker.tasks) == 1


# ---- the store is away


@pytest.mark.parametrize("state", [JobState.PREPARING, JobState.RUNNING, JobState.SUCCEEDED])
async def test_a_record_is_written_again_when_the_store_was_away(jobs: Jobs, state: JobState) -> None:
    jobs.store.passing[state] = [AWAY, AWAY]

    stored = jobs.record(await clip_of(jobs))

    assert stored.state is JobState.SUCCEEDED
    assert len(jobs.worker.tasks) == 1


@pytest.mark.parametrize("state", [JobState.PREPARING, JobState.RUNNING, JobState.SUCCEEDED])
async def test_a_record_whose_answer_was_lost_counts_as_written(jobs: Jobs, state: JobState) -> None:
    """Else the clip would be deleted beside a record that says succeeded."""
    jobs.store.lost_answers = {state}

    stored = jobs.record(await clip_of(jobs))

    assert stored.state is JobState.SUCCEEDED
    assert jobs.store.recorded.count(state) == 1
    assert clips(jobs) == [clip_key(stored.clip_id, stored.attempt_token)]


async def test_a_failure_is_recorded_when_the_store_is_back(jobs: Jobs) -> None:
    jobs.worker.failures["running"] = RenderFailed("the model failed on this job")
    jobs.store.passing[JobState.FAILED] = [AWAY]
    record = await jobs.service.submit(REQUEST, "request-1")

    with pytest.raises(RecordedFailure):
        await jobs.service.wait(record.job_id)

    assert jobs.record(record.job_id).state is JobState.FAILED


async def test_a_record_that_another_changed_meanwhile_is_not_written_over(jobs: Jobs) -> None:
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    await gate.reached()
    current, etag = JobRecords(jobs.store).get(record.job_id)
    JobRecords(jobs.store).transition(current, etag, JobState.CANCELLED)

    jobs.store.passing[JobState.SUCCEEDED] = [AWAY]
    waiting = asyncio.create_task(jobs.service.wait(record.job_id))
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(WorkerLost):  # this record says cancelled, and neither by what nor what for
        await waiting

    assert jobs.record(record.job_id).state is JobState.CANCELLED
    assert clips(jobs) == []


async def test_a_drain_that_is_over_waits_for_no_store(jobs: Jobs) -> None:
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    await gate.reached()
    waiting = asyncio.create_task(jobs.service.wait(record.job_id))
    await asyncio.sleep(0)

    jobs.store.failures[JobState.QUEUED] = AWAY
    async with asyncio.timeout(PATIENCE_S / 2):
        await jobs.service.drain(timeout_s=0)
    with pytest.raises(ShuttingDown):
        await waiting
    assert jobs.record(record.job_id).state is JobState.RUNNING  # its lease runs out
