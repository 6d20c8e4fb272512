"""Following a job: the state at once, every change, an end; here and in another process; nothing left behind."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from processes import REQUEST, process, running, until
from support import PATIENCE_S, PROGRESS, Jobs, open_jobs

from schemas.errors import JobGone, JobNotFound
from schemas.jobs import Job, JobState
from serve_graph.api_keys import Principal


async def followed(jobs: Jobs, job_id: str, seen: list[Job]) -> None:
    async with asyncio.timeout(PATIENCE_S), aclosing(jobs.service.changes(job_id)) as changes:
        async for job in changes:
            seen.append(job)


async def test_events_are_the_state_at_once_each_change_and_one_end(jobs: Jobs) -> None:
    gate = jobs.worker.gates["prepare"]
    gate.close()
    record = await jobs.service.submit(REQUEST, "request-1")
    await gate.reached()
    seen: list[Job] = []
    following = asyncio.create_task(followed(jobs, record.job_id, seen))
    await until(lambda: seen != [])
    gate.open()
    await following

    states = [job.state for job in seen]
    assert states == sorted(states, key=list(JobState).index)
    assert states[0] in (JobState.QUEUED, JobState.PREPARING)
    assert states.count(JobState.SUCCEEDED) == 1
    assert seen[-1].clip is not None
    assert PROGRESS in [job.progress for job in seen]


async def test_events_of_an_ended_job_are_its_end(jobs: Jobs) -> None:
    record = await jobs.service.submit(REQUEST, "request-1")
    await jobs.service.wait(record.job_id)
    seen: list[Job] = []
    await followed(jobs, record.job_id, seen)

    assert [job.state for job in seen] == [JobState.SUCCEEDED]


async def test_events_of_an_unknown_or_another_s_job_are_none(jobs: Jobs) -> None:
    record = await running(jobs)
    for job_id, principal in (("job_" + "0" * 32, Principal("alice")), (record.job_id, Principal("alice"))):
        with pytest.raises(JobNotFound):
            await anext(jobs.service.changes(job_id, principal))
    with open_jobs(jobs.store.folder) as other, pytest.raises(JobNotFound):
        await anext(other.service.changes(record.job_id, Principal("alice")))
    jobs.worker.gates["running"].open()
    await jobs.service.wait(record.job_id)


@pytest.mark.usefixtures("quick_looks")
async def test_events_follow_a_job_of_another_process_with_its_progress(tmp_path: Path) -> None:
    async with process(tmp_path, lease_s=0.3) as owner, process(tmp_path, started=False) as other:
        record = await running(owner)
        seen: list[Job] = []
        following = [asyncio.create_task(followed(other, record.job_id, seen)) for _ in range(2)]
        await until(lambda: any(job.progress == PROGRESS for job in seen))  # on a renewal of the lease
        owner.worker.gates["running"].open()
        await asyncio.gather(*following)

        ends = [job for job in seen if job.state.is_terminal]
        assert [job.state for job in ends] == [JobState.SUCCEEDED] * 2
        assert all(job.clip is not None for job in ends)


async def test_events_end_at_a_stop_with_the_state_that_is_handed_back(jobs: Jobs) -> None:
    record = await running(jobs)
    seen: list[Job] = []
    following = asyncio.create_task(followed(jobs, record.job_id, seen))
    await until(lambda: seen != [])
    await jobs.service.drain(0)
    await following

    assert seen[-1].state is JobState.QUEUED


async def test_a_follower_here_that_goes_away_leaves_nothing(jobs: Jobs) -> None:
    record = await running(jobs)
    (live,) = jobs.service._live.values()
    for _ in range(3):
        changes = jobs.service.changes(record.job_id)
        await anext(changes)
        assert len(live.listeners) == 1
        await changes.aclose()
        assert live.listeners == set()
    jobs.worker.gates["running"].open()
    await jobs.service.wait(record.job_id)


async def test_a_follower_elsewhere_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    async with process(tmp_path, started=False) as owner, process(tmp_path, started=False) as other:
        record = await running(owner)
        before = asyncio.all_tasks()
        for ways_out in ("closed", "cancelled"):
            seen: list[Job] = []
            following = asyncio.create_task(followed(other, record.job_id, seen))
            await until(lambda seen=seen: seen != [])
            if ways_out == "closed":
                changes = other.service.changes(record.job_id)
                await anext(changes)
                await changes.aclose()
            following.cancel()
            await asyncio.wait([following])
            await until(lambda: asyncio.all_tasks() <= before)
            assert other.service._followers._followed == {}


@pytest.mark.usefixtures("quick_looks")
async def test_a_followed_job_that_is_deleted_ends_its_followers(tmp_path: Path) -> None:
    async with process(tmp_path, started=False) as owner, process(tmp_path, started=False) as other:
        record = await running(owner)
        following = asyncio.create_task(followed(other, record.job_id, []))
        await asyncio.sleep(0.05)
        stored, etag = owner.records.get(record.job_id)
        ended, etag = owner.records.transition(stored, etag, JobState.CANCELLED, lease=None)
        owner.records.delete(ended, etag)

        with pytest.raises(JobGone):
            await following


async def test_a_follower_whose_first_look_is_slow_while_the_job_is_taken_up_here(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended in an UnboundLocalError."""
    with open_jobs(jobs.store.folder) as earlier:
        record = await running(earlier)
        await earlier.service.drain(0)
    stored, etag = jobs.records.get(record.job_id)
    looks = jobs.service._followers.changes

    async def slow(job_id: str):
        await asyncio.sleep(2)
        async for change in looks(job_id):
            yield change

    monkeypatch.setattr(jobs.service._followers, "changes", slow)
    seen: list[Job] = []
    following = asyncio.create_task(followed(jobs, record.job_id, seen))
    await asyncio.sleep(0)
    jobs.service.adopt(stored, etag)
    jobs.worker.gates["running"].close()
    await until(lambda: seen != [])
    jobs.worker.gates["running"].open()
    await following

    assert seen[-1].state is JobState.SUCCEEDED
