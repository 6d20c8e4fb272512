"""The job service over the real local store and records; only the worker behind it is scripted."""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from random_wan import RANDOM_WAN
from support import CLIP_BYTES, PATIENCE_S, PROGRESS, PUBLIC_URL, STAGES_S, Gate, Jobs, LogLines, open_jobs

from schemas.errors import (
    ClipGone,
    ClipNotFound,
    InternalError,
    InvalidRequest,
    JobNotFound,
    OutOfMemory,
    Problem,
    PromptTooLong,
    QueueFull,
    RecordedFailure,
    RenderFailed,
    ShuttingDown,
    StoreFull,
    StoreUnavailable,
    WanError,
    WorkerLost,
)
from schemas.jobs import Job, JobState, clip_id_of
from schemas.requests import GenerateRequest
from serve_graph.jobs.admission import MAX_RETRY_AFTER_S
from serve_graph.logs import LOGGER_NAME, configure_logging
from storage.store import ObjectNotFound

PROMPT = "a secret otter in a red boat"
REQUEST = GenerateRequest(prompt=PROMPT, seed=7)
CHECKED = REQUEST.model_copy(update={"prompt": "ein Käuzchen"})
"""Not ASCII: its tokens are counted before there is a job."""
BEFORE_THE_END = [JobState.QUEUED, JobState.PREPARING, JobState.RUNNING]

marker: ContextVar[str] = ContextVar("marker", default="empty")


@pytest.fixture
async def jobs(tmp_path: Path) -> AsyncIterator[Jobs]:
    with open_jobs(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def log() -> Iterator[LogLines]:
    """What the service logs, the loggers put back afterwards."""
    logger = logging.getLogger(LOGGER_NAME)
    before = logger.level, logger.handlers[:], logger.propagate
    lines = LogLines()
    configure_logging(lines)
    yield lines
    logger.setLevel(before[0])
    logger.handlers[:], logger.propagate = before[1], before[2]


async def ended(jobs: Jobs, job_id: str) -> Problem:
    """The problem that a waiter gets."""
    with pytest.raises(RecordedFailure) as caught:
        async with asyncio.timeout(PATIENCE_S):
            await jobs.service.wait(job_id)
    return caught.value.problem()


def assert_nothing_is_left(jobs: Jobs) -> None:
    """No live job, no held slot, no renderer that nobody listens to."""
    queue = jobs.service.queue()
    assert (queue.waiting, queue.running) == (0, 0)
    assert jobs.worker.rendering == set()
    assert gauge(jobs.registry, "wan_jobs_waiting") == gauge(jobs.registry, "wan_jobs_running") == 0


def gauge(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def clips(jobs: Jobs) -> list[str]:
    return [stat.key for stat in jobs.store.list("clips/").stats]


# ---- a job that succeeds


async def test_submit_records_the_states_in_their_order(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.service.wait(record.job_id)

    assert jobs.store.recorded == [*BEFORE_THE_END, JobState.SUCCEEDED]
    stored = jobs.record(record.job_id)
    assert list(stored.at) == jobs.store.recorded
    assert sorted(stored.at.values()) == list(stored.at.values())
    assert stored.state is JobState.SUCCEEDED
    assert stored.error is None
    assert_nothing_is_left(jobs)


async def test_submit_returns_the_record_as_it_was_created(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")

    assert record.state is JobState.QUEUED
    assert record.request_id == "request-1"
    assert record.request == REQUEST
    assert record.parameters.seed == 7
    assert record.model == "wan-random"
    assert PROMPT not in record.prompt_hash
    await jobs.service.wait(record.job_id)


async def test_wait_answers_the_clip_with_every_effective_parameter(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")
    clip = await jobs.service.wait(record.job_id)

    assert clip.job_id == record.job_id
    assert clip.clip_id == clip_id_of(record.job_id)
    assert clip.request_id == "request-1"
    assert clip.model_dump().items() >= record.parameters.model_dump(exclude={"levers"}).items()
    assert clip.duration == 1.0
    assert clip.size_bytes == len(CLIP_BYTES)
    assert clip.sha256 == hashlib.sha256(CLIP_BYTES).hexdigest()
    assert clip.output_url.startswith(f"{PUBLIC_URL}/outputs/{clip.clip_id}/{record.attempt_token}.mp4?")
    assert jobs.store.get(clips(jobs)[0]).body == CLIP_BYTES


async def test_wait_answers_the_workers_timings_and_the_services_own(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")
    timings = (await jobs.service.wait(record.job_id)).timings

    stages = {"denoise", "decode", "encode", "upload"}
    assert timings.model_dump(include=stages) == STAGES_S.model_dump(include=stages)
    assert timings.queued >= 0
    assert timings.preprocess >= 0
    assert timings.queued + timings.preprocess <= timings.total < PATIENCE_S
    assert timings.total != STAGES_S.total


async def test_wait_answers_the_same_clip_again_after_the_job_left_the_table(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")

    assert await jobs.service.wait(record.job_id) == await jobs.service.wait(record.job_id)


async def test_url_lives_as_long_as_the_request_asks(jobs: Jobs) -> None:
    own = await jobs.service.submit(REQUEST.model_copy(update={"url_ttl_s": 5}), "request-1")
    default = await jobs.service.submit(REQUEST, "request-2")

    assert (await jobs.service.wait(own.job_id)).expires_at == jobs.clock.now + timedelta(seconds=5)
    assert (await jobs.service.wait(default.job_id)).expires_at == jobs.clock.now + timedelta(seconds=600)


async def test_job_shows_its_state_and_progress_while_it_runs(jobs: Jobs) -> None:
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    await gate.reached()

    job = await jobs.service.job(record.job_id)
    assert job.state is JobState.RUNNING
    assert job.progress == PROGRESS
    assert job.clip is None
    assert jobs.record(record.job_id).state is JobState.RUNNING
    assert (jobs.service.queue().waiting, jobs.service.queue().running) == (0, 1)

    gate.open()
    await jobs.service.wait(record.job_id)
    job = await jobs.service.job(record.job_id)
    assert job.state is JobState.SUCCEEDED
    assert job.progress is None
    assert job.clip is not None
    assert job.created_at == record.at[JobState.QUEUED]


async def test_no_more_jobs_than_may_be_dispatched_reach_the_worker(tmp_path: Path) -> None:
    with open_jobs(tmp_path / "store", max_dispatched_jobs=2) as jobs:
        gate = jobs.worker.gates["running"]
        gate.close()
        records = [await jobs.service.submit(REQUEST, f"request-{n}") for n in range(5)]
        await gate.reached()

        assert len(jobs.worker.rendering) <= 2
        gate.open()
        await asyncio.gather(*(jobs.service.wait(record.job_id) for record in records))
        assert set(jobs.worker.rendered) == {record.job_id for record in records}
        assert_nothing_is_left(jobs)


async def test_jobs_of_unknown_ids_are_not_found(jobs: Jobs) -> None:
    for job_id in ("job_" + "0" * 32, "job_", "", "../../etc/passwd", "job_" + "0" * 32 + "/", "\0", "x" * 9_999):
        with pytest.raises(JobNotFound):
            await jobs.service.job(job_id)
        with pytest.raises(JobNotFound):
            await jobs.service.wait(job_id)


# ---- clip_url


async def test_clip_url_is_signed_anew(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")
    clip = await jobs.service.wait(record.job_id)
    jobs.clock.forward(1_000)

    signed = await jobs.service.clip_url(clip.clip_id)
    assert signed.url != clip.output_url
    assert signed.expires_at == jobs.clock.now + timedelta(seconds=600)


async def test_clip_url_is_not_found_before_the_job_succeeded(jobs: Jobs) -> None:
    jobs.worker.failures["running"] = RenderFailed("the model failed")
    record = await jobs.service.submit(REQUEST, "request-1")
    await ended(jobs, record.job_id)

    with pytest.raises(ClipNotFound):
        await jobs.service.clip_url(record.clip_id)


async def test_clip_url_knows_a_clip_by_its_one_id_only(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.service.wait(record.job_id)
    digits = record.clip_id.removeprefix("clip_")

    for other in (digits, record.job_id, f"clip_clip_{digits}", f"clip_{digits.upper()}", f"{record.clip_id}/"):
        with pytest.raises(ClipNotFound):
            await jobs.service.clip_url(other)


# ---- refused before there is a job


async def test_submit_makes_no_job_of_a_request_that_the_profile_refuses(jobs: Jobs) -> None:
    with pytest.raises(InvalidRequest):
        await jobs.service.submit(GenerateRequest(prompt="a", num_frames=80), "request-1")

    assert jobs.job_records() == []


async def test_submit_makes_no_job_of_a_prompt_that_is_too_long(jobs: Jobs) -> None:
    jobs.worker.failures["check"] = PromptTooLong("prompt", 600, 128)

    with pytest.raises(PromptTooLong):
        await jobs.service.submit(CHECKED, "request-1")
    assert jobs.job_records() == []
    assert_nothing_is_left(jobs)


@pytest.mark.parametrize("error", [StoreUnavailable("gone"), StoreFull()], ids=lambda error: error.name)
async def test_submit_makes_no_job_when_it_can_not_be_recorded(jobs: Jobs, error: WanError) -> None:
    jobs.store.failures[JobState.QUEUED] = error

    with pytest.raises(type(error)):
        await jobs.service.submit(REQUEST, "request-1")
    assert jobs.job_records() == []
    assert jobs.store.recorded == []
    assert_nothing_is_left(jobs)


# ---- admission


async def test_submit_refuses_the_first_job_beyond_the_bound(tmp_path: Path) -> None:
    with open_jobs(tmp_path / "store", max_waiting_jobs=3, max_dispatched_jobs=1) as jobs:
        gate = jobs.worker.gates["prepare"]
        gate.close()
        records = [await jobs.service.submit(REQUEST, f"request-{n}") for n in range(3)]

        with pytest.raises(QueueFull) as caught:
            await jobs.service.submit(REQUEST, "request-3")
        assert caught.value.args[0] == 3
        assert 1 <= caught.value.retry_after_s <= MAX_RETRY_AFTER_S
        assert len(jobs.job_records()) == 3
        gate.open()
        await asyncio.gather(*(jobs.service.wait(record.job_id) for record in records))
        await jobs.service.wait((await jobs.service.submit(REQUEST, "request-4")).job_id)


async def test_submit_does_not_count_running_jobs_as_waiting(tmp_path: Path) -> None:
    with open_jobs(tmp_path / "store", max_waiting_jobs=1, max_dispatched_jobs=1) as jobs:
        gate = jobs.worker.gates["running"]
        gate.close()
        running = await jobs.service.submit(REQUEST, "request-1")
        await gate.reached()
        waiting = await jobs.service.submit(REQUEST, "request-2")

        with pytest.raises(QueueFull):
            await jobs.service.submit(REQUEST, "request-3")
        gate.open()
        await jobs.service.wait(running.job_id)
        await jobs.service.wait(waiting.job_id)


async def test_prompts_of_the_next_job_are_encoded_while_another_renders(tmp_path: Path) -> None:
    with open_jobs(tmp_path / "store", max_dispatched_jobs=2) as jobs:
        running = jobs.worker.gates["running"]
        running.close()
        first = await jobs.service.submit(REQUEST, "request-1")
        await running.reached()
        jobs.worker.gates["queued"] = handed_over = Gate()

        second = await jobs.service.submit(REQUEST, "request-2")

        await handed_over.reached()  # with its prompt encoded
        assert jobs.worker.rendering == {first.job_id, second.job_id}
        assert jobs.worker.rendered == []
        running.open()
        for record in (first, second):
            await jobs.service.wait(record.job_id)


async def test_submit_admits_exactly_the_bound_when_fifty_come_at_once(tmp_path: Path) -> None:
    with open_jobs(tmp_path / "store", max_waiting_jobs=7, max_dispatched_jobs=2) as jobs:
        jobs.worker.gates["prepare"].close()
        submitting = [asyncio.create_task(jobs.service.submit(REQUEST, f"request-{n}")) for n in range(50)]
        answers = await asyncio.gather(*submitting, return_exceptions=True)

        refused = [answer for answer in answers if isinstance(answer, QueueFull)]
        admitted = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert (len(admitted), len(refused)) == (7, 43)
        assert len(jobs.job_records()) == 7
        jobs.worker.gates["prepare"].open()
        await asyncio.gather(*(jobs.service.wait(record.job_id) for record in admitted))
        assert_nothing_is_left(jobs)


@pytest.mark.parametrize(
    ("changes", "is_asked"),
    [
        ({}, False),
        ({"prompt": "x" * (RANDOM_WAN.max_sequence_length - 2)}, False),
        ({"prompt": "x" * (RANDOM_WAN.max_sequence_length - 1)}, True),
        ({"prompt": "ein Käuzchen"}, True),
        ({"prompt": "caf&eacute;"}, True),
        ({"negative_prompt": "blurred"}, False),
        ({"negative_prompt": "unscharf, häßlich"}, True),
        ({"negative_prompt": "unscharf, häßlich", "guidance_scale": 1}, False),
    ],
)
async def test_submit_asks_for_a_count_only_where_a_text_could_be_too_long(
    jobs: Jobs, changes: dict[str, Any], is_asked: bool
) -> None:
    jobs.worker.failures["check"] = PromptTooLong("prompt", 600, 128)
    request = REQUEST.model_copy(update=changes)

    if is_asked:
        with pytest.raises(PromptTooLong):
            await jobs.service.submit(request, "request-1")
    else:
        await jobs.service.wait((await jobs.service.submit(request, "request-1")).job_id)


async def test_submit_frees_its_place_when_the_check_fails(tmp_path: Path) -> None:
    with open_jobs(tmp_path / "store", max_waiting_jobs=1) as jobs:
        jobs.worker.failures["check"] = PromptTooLong("prompt", 600, 128)
        for _ in range(3):
            with pytest.raises(PromptTooLong):
                await jobs.service.submit(CHECKED, "request-1")
        del jobs.worker.failures["check"]

        await jobs.service.wait((await jobs.service.submit(REQUEST, "request-2")).job_id)


# ---- failures


@pytest.mark.parametrize("stage", ["prepare", "queued", "running"])
@pytest.mark.parametrize(
    "error",
    [
        OutOfMemory(),
        RenderFailed("the encoder failed"),
        StoreFull(),
        StoreUnavailable("the storage folder is gone"),
        WorkerLost("the process went away", 1),
        PromptTooLong("prompt", 600, 128),
        InternalError(),
    ],
    ids=lambda error: error.name,
)
async def test_a_workers_error_fails_the_job_with_that_problem(jobs: Jobs, stage: str, error: WanError) -> None:
    jobs.worker.failures[stage] = error
    record = await jobs.service.submit(REQUEST, "request-1")

    problem = await ended(jobs, record.job_id)
    assert problem == error.problem(job_id=record.job_id)
    stored = jobs.record(record.job_id)
    assert stored.state is JobState.FAILED
    assert stored.error == problem
    assert stored.result is None
    assert jobs.store.recorded[-1] is JobState.FAILED
    assert_nothing_is_left(jobs)


@pytest.mark.parametrize("stage", ["prepare", "queued", "running"])
async def test_an_unknown_exception_fails_the_job_and_tells_nothing_of_the_inside(
    jobs: Jobs, log: LogLines, stage: str
) -> None:
    jobs.worker.failures[stage] = RuntimeError(f"/srv/private/weights.bin: {PROMPT}")
    record = await jobs.service.submit(REQUEST, "request-1")

    problem = await ended(jobs, record.job_id)
    assert problem == InternalError().problem(job_id=record.job_id)
    stored = jobs.record(record.job_id).error
    assert stored is not None
    assert "private" not in stored.model_dump_json()
    (line,) = log.of("job_failed")
    assert (line["exc_type"], line["job_id"], line["request_id"]) == ("RuntimeError", record.job_id, "request-1")
    assert "/srv/private" not in log.text
    assert PROMPT not in log.text
    assert_nothing_is_left(jobs)


async def test_a_worker_that_ends_without_a_clip_fails_the_job(jobs: Jobs) -> None:
    jobs.worker.ends_without_clip = True
    record = await jobs.service.submit(REQUEST, "request-1")

    assert (await ended(jobs, record.job_id)).name == "internal-error"
    assert_nothing_is_left(jobs)


async def test_one_jobs_failure_leaves_the_others_alone(jobs: Jobs) -> None:
    gate = jobs.worker.gates["running"]
    gate.close()
    bystander = await jobs.service.submit(REQUEST, "request-1")
    await gate.reached()
    jobs.worker.failures["prepare"] = OutOfMemory()
    failing = await jobs.service.submit(REQUEST, "request-2")
    assert (await ended(jobs, failing.job_id)).name == "out-of-memory"

    gate.open()
    assert (await jobs.service.wait(bystander.job_id)).job_id == bystander.job_id


async def test_every_waiter_gets_the_recorded_problem(jobs: Jobs) -> None:
    jobs.worker.failures["running"] = RenderFailed("the model failed")
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    waiters = [asyncio.create_task(ended(jobs, record.job_id)) for _ in range(3)]
    await gate.reached()
    gate.open()

    problems = await asyncio.gather(*waiters)
    recorded = jobs.record(record.job_id).error
    assert problems == [recorded] * 3
    assert (await jobs.service.job(record.job_id)).error == recorded
    assert await ended(jobs, record.job_id) == recorded


@pytest.mark.parametrize("state", BEFORE_THE_END[1:])
async def test_a_record_that_can_not_be_moved_fails_the_job(jobs: Jobs, state: JobState) -> None:
    jobs.store.failures[state] = StoreUnavailable("the disk reports an error")
    record = await jobs.service.submit(REQUEST, "request-1")

    assert (await ended(jobs, record.job_id)).name == "store-unavailable"
    assert jobs.record(record.job_id).state is JobState.FAILED
    assert clips(jobs) == []
    assert_nothing_is_left(jobs)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (StoreUnavailable("the disk reports an error"), "store-unavailable"),
        (StoreFull(), "store-full"),
        (ObjectNotFound(), "internal-error"),
        (RuntimeError("cannot schedule new futures after shutdown"), "internal-error"),
    ],
    ids=["unavailable", "full", "deleted", "unknown"],
)
async def test_an_end_that_can_not_be_recorded_is_told_to_the_waiter(
    jobs: Jobs, log: LogLines, error: Exception, name: str
) -> None:
    jobs.store.failures[JobState.SUCCEEDED] = error
    record = await jobs.service.submit(REQUEST, "request-1")

    problem = await ended(jobs, record.job_id)
    assert problem.name == name
    assert "futures" not in problem.detail
    assert jobs.record(record.job_id).state is JobState.RUNNING
    assert len(log.of("record_failed")) == 1
    assert [(line["state"], line["error"]) for line in log.of("job")] == [("failed", name)]
    assert gauge(jobs.registry, "wan_jobs_total", outcome="failed", error=name) == 1
    assert_nothing_is_left(jobs)


async def test_a_job_of_another_process_is_waited_for(jobs: Jobs) -> None:
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    await gate.reached()
    with open_jobs(jobs.store.folder) as other:
        waiting = asyncio.create_task(other.service.wait(record.job_id))
        assert (await other.service.job(record.job_id)).state is JobState.RUNNING
        gate.open()
        assert (await waiting).job_id == record.job_id


# ---- cancellation


async def test_cancel_of_a_queued_job_ends_it(tmp_path: Path) -> None:
    with open_jobs(tmp_path / "store", max_dispatched_jobs=1) as jobs:
        gate = jobs.worker.gates["running"]
        gate.close()
        first = await jobs.service.submit(REQUEST, "request-1")
        queued = await jobs.service.submit(REQUEST, "request-2")
        await gate.reached()

        await jobs.service.cancel(queued.job_id)
        problem = await ended(jobs, queued.job_id)
        assert problem.name == "job-cancelled"
        stored = jobs.record(queued.job_id)
        assert list(stored.at) == [JobState.QUEUED, JobState.CANCELLED]
        assert stored.error == problem
        gate.open()
        await jobs.service.wait(first.job_id)
        assert jobs.worker.rendered == [first.job_id]
        assert_nothing_is_left(jobs)


async def test_cancel_ends_a_job_whose_task_has_not_begun(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = "job_" + "1" * 32
    set_queue = jobs.metrics.set_queue
    cancelling: list[asyncio.Task[Job]] = []

    def set_queue_and_cancel(*args: int) -> None:  # called right after the job's task was made
        set_queue(*args)
        cancelling.append(asyncio.create_task(jobs.service.cancel(job_id)))

    monkeypatch.setattr("serve_graph.jobs.service.new_job_id", lambda: job_id)
    monkeypatch.setattr(jobs.metrics, "set_queue", set_queue_and_cancel)
    await jobs.service.submit(REQUEST, "request-1")

    assert (await ended(jobs, job_id)).name == "job-cancelled"
    assert {(await task).state for task in cancelling} == {JobState.CANCELLED}
    assert jobs.record(job_id).state is JobState.CANCELLED
    assert_nothing_is_left(jobs)


@pytest.mark.parametrize(
    ("stage", "states"),
    [("prepare", BEFORE_THE_END[:2]), ("queued", BEFORE_THE_END[:2]), ("running", BEFORE_THE_END)],
)
async def test_cancel_ends_a_job_in_any_stage(jobs: Jobs, stage: str, states: list[JobState]) -> None:
    gate = jobs.worker.gates[stage]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    await gate.reached()

    await jobs.service.cancel(record.job_id)
    problem = await ended(jobs, record.job_id)
    assert problem.name == "job-cancelled"
    stored = jobs.record(record.job_id)
    assert list(stored.at) == [*states, JobState.CANCELLED]
    assert stored.error == problem
    assert stored.result is None
    assert clips(jobs) == []
    assert_nothing_is_left(jobs)


@pytest.mark.parametrize("state", BEFORE_THE_END[1:])
async def test_cancel_waits_for_the_write_that_is_under_way(jobs: Jobs, state: JobState) -> None:
    jobs.store.hold(state)
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.store.reached(state)

    cancelling = asyncio.create_task(jobs.service.cancel(record.job_id))
    waiter = asyncio.create_task(ended(jobs, record.job_id))
    await asyncio.sleep(0)
    jobs.store.release(state)
    assert (await waiter).name == "job-cancelled"
    assert (await cancelling).state is JobState.CANCELLED
    assert jobs.store.recorded[-2:] == [state, JobState.CANCELLED]
    assert_nothing_is_left(jobs)


async def test_cancel_during_the_terminal_write_comes_too_late(jobs: Jobs, log: LogLines) -> None:
    jobs.store.hold(JobState.SUCCEEDED)
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.store.reached(JobState.SUCCEEDED)

    cancelling = asyncio.create_task(jobs.service.cancel(record.job_id))
    waiter = asyncio.create_task(jobs.service.wait(record.job_id))
    await asyncio.sleep(0)
    jobs.store.release(JobState.SUCCEEDED)
    assert (await waiter).job_id == record.job_id
    assert (await cancelling).state is JobState.SUCCEEDED
    assert jobs.store.recorded[-1] is JobState.SUCCEEDED
    assert jobs.record(record.job_id).state is JobState.SUCCEEDED
    assert [line["state"] for line in log.of("job")] == ["succeeded"]


async def test_cancel_twice_has_one_outcome(jobs: Jobs, log: LogLines) -> None:
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    await gate.reached()

    await jobs.service.cancel(record.job_id)
    await jobs.service.cancel(record.job_id)
    assert (await ended(jobs, record.job_id)).name == "job-cancelled"
    await jobs.service.cancel(record.job_id)
    assert jobs.store.recorded.count(JobState.CANCELLED) == 1
    assert [line["state"] for line in log.of("job")] == ["cancelled"]
    assert gauge(jobs.registry, "wan_jobs_total", outcome="cancelled", error="job-cancelled") == 1


async def test_cancel_of_an_ended_job_answers_its_end_and_of_an_unknown_one_404(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")
    clip = await jobs.service.wait(record.job_id)

    assert (await jobs.service.cancel(record.job_id)).state is JobState.SUCCEEDED
    with pytest.raises(JobNotFound):
        await jobs.service.cancel("job_" + "0" * 32)
    assert await jobs.service.wait(record.job_id) == clip


async def test_cancel_that_can_not_be_recorded_is_told_to_both(jobs: Jobs) -> None:
    jobs.store.failures[JobState.CANCELLED] = StoreUnavailable("the disk reports an error")
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    await gate.reached()

    waiter = asyncio.create_task(ended(jobs, record.job_id))
    await asyncio.sleep(0)
    with pytest.raises(RecordedFailure):
        await jobs.service.cancel(record.job_id)
    assert (await waiter).name == "store-unavailable"
    assert_nothing_is_left(jobs)


# ---- the submitter goes away


async def test_a_job_outlives_a_waiter_that_is_cancelled(jobs: Jobs) -> None:
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    waiter = asyncio.create_task(jobs.service.wait(record.job_id))
    await gate.reached()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter

    gate.open()
    assert (await jobs.service.wait(record.job_id)).job_id == record.job_id


async def test_a_job_runs_in_a_context_of_its_own(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    prepare = jobs.worker.prepare

    async def prepare_and_look(*args: Any) -> Any:
        seen.append(marker.get())
        return await prepare(*args)

    monkeypatch.setattr(jobs.worker, "prepare", prepare_and_look)
    marker.set("the request's")
    await jobs.service.wait((await jobs.service.submit(REQUEST, "request-1")).job_id)

    assert seen == ["empty"]


async def test_submit_cancelled_while_it_checks_makes_no_job(jobs: Jobs) -> None:
    gate = jobs.worker.gates["check"]
    gate.close()
    submitting = asyncio.create_task(jobs.service.submit(CHECKED, "request-1"))
    await gate.reached()
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting

    gate.open()
    assert jobs.job_records() == []
    assert_nothing_is_left(jobs)


async def test_submit_cancelled_while_it_records_leaves_no_job_that_nobody_runs(jobs: Jobs) -> None:
    jobs.store.hold(JobState.QUEUED)
    submitting = asyncio.create_task(jobs.service.submit(REQUEST, "request-1"))
    await jobs.store.reached(JobState.QUEUED)
    submitting.cancel()
    jobs.store.release(JobState.QUEUED)
    with pytest.raises(asyncio.CancelledError):
        await submitting
    await jobs.service.drain(PATIENCE_S)
    await asyncio.to_thread(jobs.executor.shutdown)  # whatever was being written is written

    states = [jobs.record(_job_id(key)).state for key in jobs.job_records()]
    assert states == [JobState.CANCELLED]
    assert_nothing_is_left(jobs)


# ---- drain


async def test_drain_refuses_new_jobs_and_lets_running_ones_end(jobs: Jobs) -> None:
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    await gate.reached()
    draining = asyncio.create_task(jobs.service.drain(PATIENCE_S))
    await asyncio.sleep(0)  # it begins

    with pytest.raises(ShuttingDown) as caught:
        await jobs.service.submit(REQUEST, "request-2")
    assert caught.value.retry_after_s >= 1
    assert not draining.done()
    gate.open()
    await draining
    assert jobs.record(record.job_id).state is JobState.SUCCEEDED
    assert_nothing_is_left(jobs)


async def test_drain_hands_back_what_is_late_and_tells_who_waits(tmp_path: Path) -> None:
    with open_jobs(tmp_path / "store", max_dispatched_jobs=1) as jobs:
        gate = jobs.worker.gates["running"]
        gate.close()
        records = [await jobs.service.submit(REQUEST, f"request-{n}") for n in range(3)]
        await gate.reached()

        waiters = [asyncio.create_task(jobs.service.wait(record.job_id)) for record in records]
        await asyncio.sleep(0)
        await jobs.service.drain(0)
        for record, waiter in zip(records, waiters, strict=True):
            stored = jobs.record(record.job_id)
            assert (stored.state, stored.lease) == (JobState.QUEUED, None)
            with pytest.raises(ShuttingDown):
                await waiter
        assert clips(jobs) == []
        assert_nothing_is_left(jobs)


async def test_drain_lets_a_terminal_write_end(jobs: Jobs) -> None:
    jobs.store.hold(JobState.SUCCEEDED)
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.store.reached(JobState.SUCCEEDED)
    draining = asyncio.create_task(jobs.service.drain(0))
    await asyncio.sleep(0)  # it begins
    jobs.store.release(JobState.SUCCEEDED)
    await draining

    assert jobs.record(record.job_id).state is JobState.SUCCEEDED


@pytest.mark.parametrize("stage", ["check", "create"])
async def test_drain_leaves_no_job_behind_that_was_being_submitted(jobs: Jobs, stage: str) -> None:
    release = _hold_submission(jobs, stage)
    submitting = asyncio.create_task(jobs.service.submit(CHECKED, "request-1"))
    if stage == "check":
        await jobs.worker.gates["check"].reached()
    else:
        await jobs.store.reached(JobState.QUEUED)
    draining = asyncio.create_task(jobs.service.drain(PATIENCE_S))
    await asyncio.sleep(0)  # it begins
    release()
    await draining

    outcome = (await asyncio.gather(submitting, return_exceptions=True))[0]
    assert_nothing_is_left(jobs)
    if isinstance(outcome, BaseException):
        assert isinstance(outcome, ShuttingDown)
        assert jobs.job_records() == []
    else:
        assert jobs.record(outcome.job_id).state.is_terminal


async def test_drain_of_an_idle_service_ends_at_once(jobs: Jobs) -> None:
    await jobs.service.drain(PATIENCE_S)

    with pytest.raises(ShuttingDown):
        await jobs.service.submit(REQUEST, "request-1")


# ---- logs and metrics


async def test_one_job_line_is_logged_for_each_end(jobs: Jobs, log: LogLines) -> None:
    succeeded = await jobs.service.submit(REQUEST, "request-1")
    await jobs.service.wait(succeeded.job_id)
    jobs.worker.failures["running"] = OutOfMemory()
    failed = await jobs.service.submit(REQUEST, "request-2")
    await ended(jobs, failed.job_id)

    first, second = log.of("job")
    assert first["job_id"] == succeeded.job_id
    assert first["request_id"] == "request-1"
    assert first["state"] == "succeeded"
    assert first["prompt_hash"] == succeeded.prompt_hash
    assert first["duration_s"] >= 0
    assert first["parameters"]["seed"] == 7
    assert first["timings"]["denoise"] == STAGES_S.denoise
    assert first.get("error") is None
    assert (second["job_id"], second["state"], second["error"]) == (failed.job_id, "failed", "out-of-memory")
    assert second["level"] == "error"
    assert PROMPT not in log.text


async def test_metrics_count_jobs_by_their_end(jobs: Jobs) -> None:
    await jobs.service.wait((await jobs.service.submit(REQUEST, "request-1")).job_id)
    jobs.worker.failures["queued"] = OutOfMemory()
    await ended(jobs, (await jobs.service.submit(REQUEST, "request-2")).job_id)

    assert gauge(jobs.registry, "wan_jobs_total", outcome="succeeded", error="") == 1
    assert gauge(jobs.registry, "wan_jobs_total", outcome="failed", error="out-of-memory") == 1
    assert gauge(jobs.registry, "wan_job_stage_seconds_count", stage="denoise") == 1
    assert gauge(jobs.registry, "wan_job_duration_seconds_count", outcome="succeeded") == 1
    assert gauge(jobs.registry, "wan_queue_capacity") == 8


async def test_metrics_follow_the_queue(jobs: Jobs) -> None:
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    assert gauge(jobs.registry, "wan_jobs_waiting") == 1
    await gate.reached()
    assert gauge(jobs.registry, "wan_jobs_waiting") == 0
    assert gauge(jobs.registry, "wan_jobs_running") == 1

    gate.open()
    await jobs.service.wait(record.job_id)
    assert_nothing_is_left(jobs)


async def test_the_prompt_is_kept_in_the_record_only(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")
    clip = await jobs.service.wait(record.job_id)

    stored = json.loads(jobs.store.get(jobs.job_records()[0]).body)
    assert stored["parameters"]["prompt"] == PROMPT
    assert "otter" not in clip.output_url
    assert all("otter" not in key for key in clips(jobs))


def _hold_submission(jobs: Jobs, stage: str) -> Callable[[], None]:
    """Stop the next submission at a stage; returns what lets it on."""
    if stage == "check":
        jobs.worker.gates["check"].close()
        return jobs.worker.gates["check"].open
    jobs.store.hold(JobState.QUEUED)
    return lambda: jobs.store.release(JobState.QUEUED)


def _job_id(key: str) -> str:
    return key.removeprefix("jobs/").removesuffix(".json")


# ---- a prompt of which nothing is left


@pytest.mark.parametrize("prompt", ["&nbsp;", "&amp;nbsp;", "\u00a0&#32;"])
async def test_submit_refuses_a_prompt_that_is_blank_once_cleaned(jobs: Jobs, prompt: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await jobs.service.submit(REQUEST.model_copy(update={"prompt": prompt}), "request-1")

    assert [error.field for error in refused.value.errors] == ["prompt"]
    assert jobs.store.recorded == []


# ---- a URL never outlives its clip


async def test_a_url_that_would_outlive_its_clip_is_refused(tmp_path: Path) -> None:
    with open_jobs(tmp_path / "store", clip_retention=timedelta(days=1)) as jobs:
        with pytest.raises(InvalidRequest) as refusal:
            await jobs.service.submit(REQUEST.model_copy(update={"url_ttl_s": 86_401}), "request-1")

        assert refusal.value.errors[0].field == "url_ttl_s"
        assert refusal.value.errors[0].legal == "up to 86400"
        record = await jobs.service.submit(REQUEST.model_copy(update={"url_ttl_s": 86_400}), "request-1")
        await jobs.service.wait(record.job_id)


async def test_a_later_url_ends_with_its_clip(tmp_path: Path) -> None:
    kept = timedelta(seconds=630)
    with open_jobs(tmp_path / "store", clip_retention=kept) as jobs:
        record = await jobs.service.submit(REQUEST, "request-1")
        await jobs.service.wait(record.job_id)
        key, finished = jobs.job_records()[0], jobs.record(record.job_id)

        for age, left in ((timedelta(seconds=60), timedelta(seconds=570)), (kept, None)):
            older = {**finished.at, JobState.SUCCEEDED: datetime.now(UTC) - age}
            body = finished.model_copy(update={"at": older}).model_dump_json().encode()
            jobs.store.put(key, body)
            if left is None:
                with pytest.raises(ClipGone):
                    await jobs.service.clip_url(record.clip_id)
                continue
            expires_in = (await jobs.service.clip_url(record.clip_id)).expires_at - jobs.clock()
            assert timedelta(0) < expires_in <= left


# ---- memory


async def test_a_clip_that_does_not_fit_into_the_device_is_refused(tmp_path: Path) -> None:
    with open_jobs(tmp_path / "store", max_clip_pixels=64 * 64 * 17) as jobs:
        with pytest.raises(InvalidRequest) as refusal:
            await jobs.service.submit(REQUEST.model_copy(update={"num_frames": 21}), "request-1")
        assert refusal.value.errors[0].legal == "at most 17 frames of 64x64 fit into this device"
        assert jobs.job_records() == []

        fitting = await jobs.service.submit(REQUEST.model_copy(update={"num_frames": 17}), "request-2")
        await jobs.service.wait(fitting.job_id)
