"""The sweeper over real records, with a clock of the test's; and the janitor beside it, in a service."""

import asyncio
from pathlib import Path

import pytest
from processes import keys, problem_of, process, recorded, running, until
from support import PATIENCE_S, Jobs, open_jobs

from schemas.errors import ClipGone, JobGone, StoreUnavailable
from schemas.jobs import JobRecord, JobState, Lease
from serve_graph.jobs.limits import Patiences
from serve_graph.jobs.takeover import Sweeper
from storage.job_records import entry_of
from storage.keys import active_key, entry_id, entry_of_key

LEASE_S = 0.3


class Seen:
    """What the sweeper tells the job service: all of it is taken, none of it is run."""

    def __init__(self, jobs: Jobs) -> None:
        self.adopted: list[str] = []
        self._jobs = jobs

    def is_live(self, job_id: str) -> bool:
        return job_id in self.adopted

    def room(self) -> int:
        return 8

    def adopt(self, record: JobRecord, etag: str) -> None:
        self.adopted.append(record.job_id)

    def webhook_due_in_s(self, record: JobRecord) -> float | None:
        return None

    async def file(self, record: JobRecord, etag: str) -> None:
        self._jobs.records.file_as_done(record)


class Clocked:
    """A sweeper, its clock, and what it told."""

    def __init__(self, jobs: Jobs) -> None:
        self.seconds = 0.0
        self.told = Seen(jobs)
        service = jobs.service
        self.sweeper = Sweeper(
            service._recorder,
            Patiences(worker_s=0, store_s=0, lease_s=LEASE_S),
            model="wan-random",
            jobs=self.told,
            batches=service.batches,
            monotonic=lambda: self.seconds,
        )


@pytest.fixture
def clocked(jobs: Jobs) -> Clocked:
    return Clocked(jobs)


async def test_a_process_that_was_frozen_watches_anew_before_it_takes_anything(jobs: Jobs, clocked: Clocked) -> None:
    """It was thawed together with the owner, and took the job away before that could renew its lease."""
    job_id = recorded(jobs, JobState.RUNNING, 0)
    sweeping = asyncio.create_task(clocked.sweeper.run())
    for _ in range(3):
        await asyncio.sleep(LEASE_S / 2)
        clocked.seconds += 1_000
    assert jobs.record(job_id).state is JobState.RUNNING

    async with asyncio.timeout(PATIENCE_S):
        while not clocked.told.adopted:
            clocked.seconds += LEASE_S / 4
            await asyncio.sleep(LEASE_S / 3)
    assert jobs.record(job_id).state is JobState.QUEUED
    sweeping.cancel()


async def test_a_renewed_lease_is_watched_anew(jobs: Jobs, clocked: Clocked) -> None:
    job_id = recorded(jobs, JobState.RUNNING, 0)
    for renewal in range(5):
        await clocked.sweeper.sweep()
        record, etag = jobs.records.get(job_id)
        jobs.records.write(jobs.records.amended(record, lease=Lease(owner="another", renewal=renewal)), etag)
        clocked.seconds += LEASE_S
    await clocked.sweeper.sweep()

    assert jobs.record(job_id).state is JobState.RUNNING
    assert clocked.told.adopted == []


async def test_a_second_entry_of_a_job_is_forgotten_whichever_is_seen_first(jobs: Jobs, clocked: Clocked) -> None:
    """It was told apart at the first look only, and filed again by every sweep."""
    job_id = recorded(jobs, JobState.RUNNING, 10)
    record = jobs.record(job_id)
    own = active_key(record.principal, entry_of(record))
    for shift in (-5, 5):
        jobs.store.put(active_key(record.principal, f"{int(entry_of(record)[:11], 16) + shift:011x}-{job_id}"), b"")
    for _ in range(3):
        await clocked.sweeper.sweep()

    assert keys(jobs, "active/") == [own]


async def test_an_entry_beside_a_tombstone_is_forgotten(jobs: Jobs, clocked: Clocked) -> None:
    """A submission whose id was deleted at the same moment left it, and every sweep buried the job again."""
    job_id = recorded(jobs, JobState.FAILED, 10)
    entry = entry_of(jobs.record(job_id))
    jobs.records.delete(*jobs.records.get(job_id))
    jobs.store.put(active_key("anonymous", f"{int(entry[:11], 16) - 5:011x}-{job_id}"), b"")
    await clocked.sweeper.sweep()

    assert keys(jobs, "active/") == []


async def test_a_store_that_goes_away_during_a_sweep_is_no_unreadable_record(
    jobs: Jobs, clocked: Clocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(jobs, JobState.RUNNING, 0)

    def away(job_id: str) -> tuple[JobRecord, str]:
        raise StoreUnavailable("it can't be reached")

    monkeypatch.setattr(jobs.records, "get", away)
    with pytest.raises(StoreUnavailable):
        await clocked.sweeper.sweep()


# ---- the janitor


async def test_a_job_past_its_retention_is_gone_with_its_clip(tmp_path: Path) -> None:
    async with process(tmp_path, kept_s=0.3, upkeep_s=0.05) as jobs:
        record = await running(jobs)
        jobs.worker.gates["running"].open()
        await jobs.service.wait(record.job_id)
        await until(lambda: keys(jobs, "clips/") == [])

        with pytest.raises(JobGone):
            await jobs.service.job(record.job_id)
        with pytest.raises(ClipGone):
            await jobs.service.clip_url(record.clip_id)
        assert (await jobs.service.jobs()).jobs == ()


async def test_a_bad_round_of_the_janitor_is_not_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with process(tmp_path, kept_s=0.05, upkeep_s=0.02) as jobs:
        upkeep = jobs.service._running._janitor._upkeep
        delete, rounds = upkeep.delete_expired_jobs, [StoreUnavailable("away"), RuntimeError("a bug")]

        def sometimes(*args):
            if rounds:
                raise rounds.pop()
            return delete(*args)

        monkeypatch.setattr(upkeep, "delete_expired_jobs", sometimes)
        job_id = recorded(jobs, JobState.FAILED, 10)
        await until(lambda: "deleted" in jobs.store.get(f"jobs/{job_id}.json").body.decode())
        assert rounds == []


async def test_several_janitors_at_once_do_no_harm(tmp_path: Path) -> None:
    async with process(tmp_path, kept_s=0.2, upkeep_s=0.01) as one, process(tmp_path, kept_s=0.2, upkeep_s=0.01) as two:
        kept = await running(one)
        old = [recorded(one, JobState.SUCCEEDED, 3_600) for _ in range(20)]
        await until(lambda: keys(two, "done/anonymous/succeeded/") == [])

        assert {entry_id(entry_of_key(key)) for key in keys(one, "done/anonymous/deleted/")} == set(old)
        one.worker.gates["running"].open()
        await one.service.wait(kept.job_id)


async def test_nothing_expires_without_a_retention(tmp_path: Path) -> None:
    async with process(tmp_path, upkeep_s=0.01) as jobs:
        job_id = recorded(jobs, JobState.FAILED, 10_000_000)
        await asyncio.sleep(0.1)
        assert jobs.record(job_id).state is JobState.FAILED


@pytest.mark.usefixtures("quick_looks")
async def test_a_job_that_is_cancelled_and_lost_is_filed_by_who_finds_it(tmp_path: Path) -> None:
    with open_jobs(tmp_path) as lost:
        record = await running(lost)
        stored, etag = lost.records.get(record.job_id)
        lost.records.write(lost.records.amended(stored, cancel_requested=True), etag)
        async with process(tmp_path, lease_s=LEASE_S) as other:
            assert (await problem_of(other, record.job_id)).name == "job-cancelled"
            await until(lambda: keys(other, "active/") == [])
            assert len(keys(other, "done/anonymous/cancelled/")) == 1
        lost.worker.gates["running"].open()
        await lost.service.drain(PATIENCE_S)
