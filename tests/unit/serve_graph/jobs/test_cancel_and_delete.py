"""Cancel and delete, in the process that runs a job and in others: one outcome, and every answer says which."""

import asyncio
from pathlib import Path

import pytest
from processes import REQUEST, keys, problem_of, process, running, until, until_stored
from support import PATIENCE_S, Jobs, open_jobs

from schemas.errors import ClipGone, JobGone, JobNotEnded, JobNotFound, ShuttingDown, StoreUnavailable
from schemas.jobs import JobState
from serve_graph.api_keys import Principal

ALICE, BOB = Principal("alice"), Principal("bob")
LEASE_S = 1.0


# ---- cancel, where the job runs


async def test_cancel_answers_the_job_as_it_ended(jobs: Jobs) -> None:
    record = await running(jobs)

    job = await jobs.service.cancel(record.job_id)
    again = await jobs.service.cancel(record.job_id)
    assert job.state is again.state is JobState.CANCELLED
    assert job.error == again.error
    assert jobs.store.recorded.count(JobState.CANCELLED) == 1


async def test_cancel_against_a_finish_has_one_winner_and_says_which(jobs: Jobs) -> None:
    jobs.store.hold(JobState.SUCCEEDED)
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.store.reached(JobState.SUCCEEDED)
    cancelling = [asyncio.create_task(jobs.service.cancel(record.job_id)) for _ in range(3)]
    await asyncio.sleep(0)
    jobs.store.release(JobState.SUCCEEDED)

    answers = await asyncio.gather(*cancelling)
    assert {job.state for job in answers} == {JobState.SUCCEEDED}
    assert all(job.clip is not None for job in answers)
    assert JobState.CANCELLED not in jobs.store.recorded


async def test_finish_against_a_cancel_has_one_winner_and_says_which(jobs: Jobs) -> None:
    record = await running(jobs)
    jobs.store.hold(JobState.CANCELLED)
    cancelling = asyncio.create_task(jobs.service.cancel(record.job_id))
    await jobs.store.reached(JobState.CANCELLED)
    jobs.worker.gates["running"].open()
    jobs.store.release(JobState.CANCELLED)

    assert (await cancelling).state is JobState.CANCELLED
    assert JobState.SUCCEEDED not in jobs.store.recorded
    assert keys(jobs, "clips/") == []


async def test_cancel_of_another_s_job_finds_none(jobs: Jobs) -> None:
    gate = jobs.worker.gates["running"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1", ALICE)
    await gate.reached()

    with pytest.raises(JobNotFound):
        await jobs.service.cancel(record.job_id, BOB)
    gate.open()
    await jobs.service.wait(record.job_id, ALICE)
    with pytest.raises(JobNotFound):
        await jobs.service.cancel(record.job_id, BOB)


# ---- cancel and a stop


async def test_a_cancel_right_before_a_stop_is_not_undone_by_it(jobs: Jobs) -> None:
    """It was handed back, and rendered at the next start."""
    record = await running(jobs)
    cancelling = asyncio.create_task(jobs.service.cancel(record.job_id))
    await asyncio.sleep(0)  # asked for, not yet delivered
    await jobs.service.drain(0)

    assert (await cancelling).state is JobState.CANCELLED
    assert jobs.record(record.job_id).state is JobState.CANCELLED


async def test_a_cancel_that_meets_a_hand_back_is_not_lost(jobs: Jobs) -> None:
    record = await running(jobs)
    jobs.store.hold(JobState.QUEUED)
    draining = asyncio.create_task(jobs.service.drain(0))
    await jobs.store.reached(JobState.QUEUED)
    cancelling = asyncio.create_task(jobs.service.cancel(record.job_id))
    await asyncio.sleep(0)
    jobs.store.release(JobState.QUEUED)

    assert (await cancelling).state is JobState.CANCELLED
    await draining
    assert jobs.record(record.job_id).state is JobState.CANCELLED


async def test_a_claim_on_its_way_to_the_store_is_handed_back_too(jobs: Jobs) -> None:
    """The record would say `preparing` until its lease ran out."""
    jobs.store.hold(JobState.PREPARING)
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.store.reached(JobState.PREPARING)
    draining = asyncio.create_task(jobs.service.drain(0))
    await asyncio.sleep(0.02)
    jobs.store.release(JobState.PREPARING)
    await draining

    stored = jobs.record(record.job_id)
    assert (stored.state, stored.lease) == (JobState.QUEUED, None)


# ---- cancel, elsewhere


@pytest.mark.usefixtures("quick_looks")
async def test_cancel_reaches_the_process_that_runs_the_job(tmp_path: Path) -> None:
    async with process(tmp_path, lease_s=LEASE_S) as owner, process(tmp_path, started=False, lease_s=LEASE_S) as other:
        record = await running(owner)
        job = await other.service.cancel(record.job_id)

        assert job.state is JobState.CANCELLED
        assert owner.worker.rendering == set()
        assert (await other.service.cancel(record.job_id)).state is JobState.CANCELLED
        assert (await problem_of(owner, record.job_id)).name == "job-cancelled"


@pytest.mark.usefixtures("quick_looks")
async def test_cancel_whose_owner_does_not_answer_says_so_and_is_idempotent(tmp_path: Path) -> None:
    async with process(tmp_path, started=False) as owner, process(tmp_path, started=False, lease_s=0.1) as other:
        record = await running(owner)
        for _ in range(2):
            job = await other.service.cancel(record.job_id)
            assert (job.state, job.cancel_requested) == (JobState.RUNNING, True)
        etag = other.records.etag(record.job_id)
        await other.service.cancel(record.job_id)
        assert other.records.etag(record.job_id) == etag

        owner.worker.gates["running"].open()  # it was frozen, and finishes before it hears of the cancel
        await owner.service.wait(record.job_id)
        assert (await other.service.cancel(record.job_id)).state is JobState.SUCCEEDED


@pytest.mark.usefixtures("quick_looks")
async def test_cancel_elsewhere_against_a_finish_has_one_winner_and_says_which(tmp_path: Path) -> None:
    async with process(tmp_path, started=False) as owner, process(tmp_path, started=False) as other:
        owner.store.hold(JobState.SUCCEEDED)
        record = await owner.service.submit(REQUEST, "request-1")
        await owner.store.reached(JobState.SUCCEEDED)
        cancelling = asyncio.create_task(other.service.cancel(record.job_id))
        await until(lambda: other.record(record.job_id).cancel_requested)
        owner.store.release(JobState.SUCCEEDED)

        job = await cancelling
        assert job.state is JobState.SUCCEEDED
        assert job.clip is not None
        assert keys(owner, "clips/") == [owner.record(record.job_id).result.key]


@pytest.mark.usefixtures("quick_looks")
async def test_cancel_of_a_job_in_another_s_line_ends_it_at_once(tmp_path: Path) -> None:
    async with (
        process(tmp_path, max_dispatched_jobs=1, lease_s=0.3) as owner,
        process(tmp_path, started=False) as other,
    ):
        first = await running(owner)
        queued = await owner.service.submit(REQUEST, "request-2")
        waiting = asyncio.create_task(problem_of(owner, queued.job_id))
        assert (await other.service.cancel(queued.job_id)).state is JobState.CANCELLED

        assert (await waiting).name == "job-cancelled"  # though its turn has not come
        assert (await owner.service.job(queued.job_id)).state is JobState.CANCELLED
        assert owner.service.queue().waiting == 0
        owner.worker.gates["running"].open()
        await owner.service.wait(first.job_id)
        assert owner.worker.rendered == [first.job_id]


@pytest.mark.usefixtures("quick_looks")
async def test_cancel_of_a_job_whose_owner_is_lost_ends_it_when_it_is_taken_over(tmp_path: Path) -> None:
    async with process(tmp_path, started=False) as owner:
        record = await running(owner)
        async with process(tmp_path, lease_s=0.3) as other:
            await other.service.cancel(record.job_id)
            await until_stored(other, record.job_id, JobState.CANCELLED)
            assert other.worker.tasks == []
        owner.worker.gates["running"].open()
        assert (await problem_of(owner, record.job_id)).name == "job-cancelled"
        assert keys(owner, "clips/") == []


@pytest.mark.usefixtures("quick_looks")
async def test_cancel_of_a_job_that_is_deleted_meanwhile_says_so(tmp_path: Path) -> None:
    async with process(tmp_path, started=False) as owner, process(tmp_path, started=False) as other:
        record = await running(owner)
        cancelling = asyncio.create_task(other.service.cancel(record.job_id))
        await until(lambda: other.record(record.job_id).cancel_requested)
        stored, etag = owner.records.get(record.job_id)
        ended, etag = owner.records.transition(stored, etag, JobState.CANCELLED, lease=None)
        owner.records.delete(ended, etag)

        with pytest.raises(JobGone):
            await cancelling


# ---- delete


async def test_a_deleted_job_is_gone_with_its_clip_and_its_place_in_the_lists(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1", ALICE)
    await jobs.service.wait(record.job_id, ALICE)
    await until(lambda: keys(jobs, "done/alice/succeeded/") != [])
    with pytest.raises(JobNotFound):
        await jobs.service.delete(record.job_id, BOB)
    await jobs.service.delete(record.job_id, ALICE)

    assert keys(jobs, "clips/") == []
    assert [key for key in keys(jobs, "done/") if "/deleted/" not in key] == keys(jobs, "active/") == []
    assert "otter" not in jobs.store.get(jobs.job_records()[0]).body.decode()
    for ask in (jobs.service.job, jobs.service.wait, jobs.service.cancel, jobs.service.delete):
        with pytest.raises(JobGone):
            await ask(record.job_id, ALICE)
        with pytest.raises(JobNotFound):
            await ask(record.job_id, BOB)
    with pytest.raises(ClipGone):
        await jobs.service.clip_url(record.clip_id, ALICE)
    assert (await jobs.service.jobs(ALICE)).jobs == ()


async def test_a_job_that_has_not_ended_is_not_deleted(jobs: Jobs) -> None:
    record = await running(jobs)
    with pytest.raises(JobNotEnded):
        await jobs.service.delete(record.job_id)
    with open_jobs(jobs.store.folder) as other, pytest.raises(JobNotEnded):
        await other.service.delete(record.job_id)

    jobs.worker.gates["running"].open()
    await jobs.service.wait(record.job_id)


async def test_a_delete_whose_answer_was_lost_is_finished_by_the_next(jobs: Jobs) -> None:
    """The tombstone was there, so that the next delete found nothing to do and the clip stayed."""
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.service.wait(record.job_id)
    await until(lambda: keys(jobs, "active/") == [])
    jobs.store.lost_answers = {JobState.DELETED}
    with pytest.raises(StoreUnavailable):
        await jobs.service.delete(record.job_id)
    assert len(keys(jobs, "clips/")) == 1

    with pytest.raises(JobGone):
        await jobs.service.delete(record.job_id)
    assert keys(jobs, "clips/") == []


async def test_two_deletes_at_once_delete_once(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.service.wait(record.job_id)

    answers = await asyncio.gather(*(jobs.service.delete(record.job_id) for _ in range(2)), return_exceptions=True)
    assert [type(answer) for answer in sorted(answers, key=str)].count(JobGone) == 1
    assert answers.count(None) == 1


async def test_an_entry_filed_after_the_delete_is_mended_by_the_list_that_meets_it(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.service.wait(record.job_id)
    await until(lambda: keys(jobs, "active/") == [])
    ended = jobs.record(record.job_id)
    await jobs.service.delete(record.job_id)
    jobs.records.file_as_done(ended)

    assert (await jobs.service.jobs()).jobs == ()
    await until(lambda: keys(jobs, "done/anonymous/succeeded/") == [])


# ---- a stop, for those who wait


async def test_a_waiter_elsewhere_hears_of_its_own_process_s_stop(tmp_path: Path) -> None:
    async with process(tmp_path, started=False) as owner:
        record = await running(owner)
        with open_jobs(tmp_path) as other:
            waiting = asyncio.create_task(other.service.wait(record.job_id))
            await asyncio.sleep(0.05)
            await other.service.drain(PATIENCE_S)
            with pytest.raises(ShuttingDown):
                await waiting
