"""Idempotency keys: the same key and request are one job, whenever they come and wherever to."""

import asyncio

import pytest
from processes import REQUEST, keys, problem_of, process, running
from support import PATIENCE_S, Jobs

from schemas.errors import IdempotencyMismatch, JobGone, OutOfMemory, StoreUnavailable
from schemas.jobs import JobState
from serve_graph.api_keys import Principal

KEY = "order-66"
OTHER = REQUEST.model_copy(update={"prompt": "a heron"})
ALICE, BOB = Principal("alice"), Principal("bob")


async def test_the_same_key_joins_the_job_while_it_runs(jobs: Jobs) -> None:
    first = await running(jobs, idempotency_key=KEY)
    again = await jobs.service.submit(REQUEST, "request-2", idempotency_key=KEY)
    waiting = [asyncio.create_task(jobs.service.wait(record.job_id)) for record in (first, again)]
    await asyncio.sleep(0)
    jobs.worker.gates["running"].open()

    clip, same = await asyncio.gather(*waiting)
    assert again.job_id == first.job_id
    assert clip == same
    assert jobs.worker.rendered == [first.job_id]


async def test_the_same_key_gives_the_outcome_once_there_is_one(jobs: Jobs) -> None:
    first = await jobs.service.submit(REQUEST, "request-1", idempotency_key=KEY)
    clip = await jobs.service.wait(first.job_id)
    again = await jobs.service.submit(REQUEST, "request-2", idempotency_key=KEY)

    assert await jobs.service.wait(again.job_id) == clip
    assert jobs.worker.rendered == [first.job_id]


async def test_the_same_key_gives_a_failure_again_and_does_not_try_anew(jobs: Jobs) -> None:
    jobs.worker.passing["running"] = [OutOfMemory()]
    first = await jobs.service.submit(REQUEST, "request-1", idempotency_key=KEY)
    assert (await problem_of(jobs, first.job_id)).name == "out-of-memory"

    again = await jobs.service.submit(REQUEST, "request-2", idempotency_key=KEY)
    assert (await problem_of(jobs, again.job_id)).name == "out-of-memory"
    assert len(jobs.worker.tasks) == 1


async def test_a_key_outlives_its_process(jobs: Jobs) -> None:
    first = await jobs.service.submit(REQUEST, "request-1", idempotency_key=KEY)
    await jobs.service.wait(first.job_id)
    await jobs.service.drain(PATIENCE_S)

    async with process(jobs.store.folder) as later:
        again = await later.service.submit(REQUEST, "request-2", idempotency_key=KEY)
        assert (await later.service.wait(again.job_id)).job_id == first.job_id
        with pytest.raises(IdempotencyMismatch):
            await later.service.submit(OTHER, "request-3", idempotency_key=KEY)
        assert later.worker.tasks == []


async def test_a_key_joins_the_job_of_another_process(jobs: Jobs, quick_looks: None) -> None:
    first = await running(jobs, idempotency_key=KEY)
    async with process(jobs.store.folder, started=False) as other:
        again = await other.service.submit(REQUEST, "request-2", idempotency_key=KEY)
        waiting = asyncio.create_task(other.service.wait(again.job_id))
        await asyncio.sleep(0.05)
        jobs.worker.gates["running"].open()

        assert (await waiting).job_id == first.job_id
        assert other.worker.tasks == []


async def test_a_key_with_another_body_is_refused_while_it_runs_and_afterwards(jobs: Jobs) -> None:
    first = await running(jobs, idempotency_key=KEY)
    with pytest.raises(IdempotencyMismatch):
        await jobs.service.submit(OTHER, "request-2", idempotency_key=KEY)
    jobs.worker.gates["running"].open()
    await jobs.service.wait(first.job_id)
    with pytest.raises(IdempotencyMismatch):
        await jobs.service.submit(OTHER, "request-3", idempotency_key=KEY)

    assert len(jobs.job_records()) == 1


async def test_a_default_that_is_spelled_out_is_the_same_body(jobs: Jobs) -> None:
    spelled = REQUEST.model_validate({"prompt": REQUEST.prompt, "seed": 7, "negative_prompt": None})
    first = await jobs.service.submit(REQUEST, "request-1", idempotency_key=KEY)
    assert (await jobs.service.submit(spelled, "request-2", idempotency_key=KEY)).job_id == first.job_id
    await jobs.service.wait(first.job_id)
    await jobs.service.delete(first.job_id)

    with pytest.raises(JobGone):
        await jobs.service.submit(spelled, "request-3", idempotency_key=KEY)


async def test_a_key_is_its_principal_s_own(jobs: Jobs) -> None:
    records = [
        await jobs.service.submit(request, "request-1", principal, idempotency_key=KEY)
        for request, principal in ((REQUEST, ALICE), (OTHER, BOB))
    ]
    for record, principal in zip(records, (ALICE, BOB), strict=True):
        await jobs.service.wait(record.job_id, principal)

    assert len({record.job_id for record in records}) == 2
    assert not any(KEY in key for key in keys(jobs, ""))


async def test_a_key_of_a_deleted_job_is_never_rendered_again(jobs: Jobs) -> None:
    first = await jobs.service.submit(REQUEST, "request-1", idempotency_key=KEY)
    await jobs.service.wait(first.job_id)
    await jobs.service.delete(first.job_id)

    with pytest.raises(JobGone):
        await jobs.service.submit(REQUEST, "request-2", idempotency_key=KEY)
    with pytest.raises(IdempotencyMismatch):
        await jobs.service.submit(OTHER, "request-3", idempotency_key=KEY)
    assert len(jobs.worker.tasks) == 1


async def test_a_key_that_comes_many_times_at_once_is_one_job(jobs: Jobs) -> None:
    submitting = [jobs.service.submit(REQUEST, f"request-{n}", idempotency_key=KEY) for n in range(7)]
    records = await asyncio.gather(*submitting)
    await asyncio.gather(*(jobs.service.wait(record.job_id) for record in records))
    await jobs.service.drain(PATIENCE_S)

    (job_id,) = {record.job_id for record in records}
    assert jobs.worker.rendered == [job_id]
    assert len(jobs.job_records()) == len(keys(jobs, "done/")) == 1
    assert keys(jobs, "active/") == []
    assert (jobs.service.queue().waiting, jobs.service.queue().running) == (0, 0)


async def test_a_key_that_comes_with_two_bodies_at_once_takes_one_of_them(jobs: Jobs) -> None:
    submitting = [jobs.service.submit(body, "request-1", idempotency_key=KEY) for body in (REQUEST, OTHER)]
    answers = await asyncio.gather(*submitting, return_exceptions=True)

    (record,) = [answer for answer in answers if not isinstance(answer, BaseException)]
    (refusal,) = [answer for answer in answers if isinstance(answer, BaseException)]
    assert isinstance(refusal, IdempotencyMismatch)
    await jobs.service.wait(record.job_id)


async def test_a_key_whose_answer_was_lost_finds_its_job(jobs: Jobs) -> None:
    """The client was told that the store is away, and comes again."""
    jobs.store.lost_answers = {JobState.QUEUED}
    with pytest.raises(StoreUnavailable):
        await jobs.service.submit(REQUEST, "request-1", idempotency_key=KEY)
    again = await jobs.service.submit(REQUEST, "request-2", idempotency_key=KEY)

    async with process(jobs.store.folder) as other:  # or this one's own sweep
        assert (await other.service.wait(again.job_id)).job_id == again.job_id
    assert len(jobs.job_records()) == 1


async def test_drain_waits_for_equal_submissions_of_one_request_id(jobs: Jobs) -> None:
    """They were kept under one name, so that a drain saw only the last."""
    submitting = [asyncio.create_task(jobs.service.submit(REQUEST, "request-1", idempotency_key=KEY)) for _ in "ab"]
    jobs.store.hold(JobState.QUEUED)
    await jobs.store.reached(JobState.QUEUED)
    draining = asyncio.create_task(jobs.service.drain(0))
    await asyncio.sleep(0.05)
    assert not draining.done()
    jobs.store.release(JobState.QUEUED)
    await draining

    await asyncio.gather(*submitting, return_exceptions=True)
    assert (jobs.service.queue().waiting, jobs.service.queue().running) == (0, 0)
    assert len(jobs.job_records()) == 1


async def test_a_keyed_job_goes_on_when_its_client_goes_away(jobs: Jobs) -> None:
    record = await running(jobs, idempotency_key=KEY)
    jobs.service.abandon(record.job_id)
    await asyncio.sleep(0)
    jobs.worker.gates["running"].open()

    assert (await jobs.service.wait(record.job_id)).job_id == record.job_id


async def test_a_job_is_cancelled_when_its_client_goes_away_unless_another_waits(jobs: Jobs) -> None:
    record = await running(jobs)
    other = asyncio.create_task(jobs.service.wait(record.job_id))
    await asyncio.sleep(0)
    jobs.service.abandon(record.job_id)
    await asyncio.sleep(0.02)
    assert jobs.record(record.job_id).state is JobState.RUNNING

    other.cancel()
    await asyncio.wait([other])
    jobs.service.abandon(record.job_id)
    assert (await problem_of(jobs, record.job_id)).name == "job-cancelled"
