"""Leases: who keeps a job, who loses it, and what is left of the loser's work."""

import asyncio
from pathlib import Path

import pytest
from processes import REQUEST, keys, problem_of, process, running, until, until_stored
from support import PATIENCE_S, Jobs, open_jobs

from schemas.errors import JobCancelled, JobGone, StoreUnavailable, WorkerLost
from schemas.jobs import JobState, Lease
from schemas.webhooks import WebhookDelivery
from serve_graph.jobs.attempts import _Turns
from storage.keys import clip_key

pytestmark = pytest.mark.usefixtures("quick_looks")

LOST = WorkerLost("the process went away", 1)


async def test_a_job_of_a_frozen_owner_is_taken_over_and_its_late_clip_discarded(tmp_path: Path) -> None:
    async with process(tmp_path, started=False) as frozen, process(tmp_path, lease_s=0.3) as other:
        record = await running(frozen)
        waiting = asyncio.create_task(frozen.service.wait(record.job_id))
        stored = await until_stored(other, record.job_id, JobState.SUCCEEDED)
        frozen.worker.gates["running"].open()  # thawed

        clip = await waiting
        assert frozen.worker.rendered == other.worker.rendered == [record.job_id]
        assert (stored.attempts, stored.crashes) == (2, 0)
        assert stored.attempt_token in clip.output_url
        assert keys(other, "clips/") == [clip_key(stored.clip_id, stored.attempt_token)]
        assert JobState.SUCCEEDED not in frozen.store.recorded
        assert (frozen.service.queue().waiting, frozen.service.queue().running) == (0, 0)


async def test_an_owner_that_renews_keeps_its_job(tmp_path: Path) -> None:
    async with process(tmp_path, lease_s=1.0) as owner, process(tmp_path, lease_s=1.0) as other:
        record = await running(owner)
        await asyncio.sleep(2.5)
        stored = owner.record(record.job_id)
        assert stored.state is JobState.RUNNING
        assert stored.lease is not None
        assert stored.lease.renewal >= 2
        owner.worker.gates["running"].open()
        await owner.service.wait(record.job_id)
        assert other.worker.tasks == []


async def test_a_worker_that_says_nothing_loses_its_lease(tmp_path: Path) -> None:
    """A hung device must not renew for ever."""
    async with process(tmp_path, lease_s=0.3, stall_s=0.1) as hung, process(tmp_path, lease_s=0.3) as other:
        record = await running(hung)
        stored = await until_stored(other, record.job_id, JobState.SUCCEEDED)

        assert other.worker.rendered == [record.job_id]
        assert stored.attempts == 2


async def test_an_idle_worker_is_not_a_stalled_one(tmp_path: Path) -> None:
    """It had said nothing for longer than the stall time before the job came, and no lease was renewed."""
    async with process(tmp_path, lease_s=0.15, stall_s=1.0) as jobs:
        jobs.service._running._attempts.last_advance -= 3_600
        jobs.worker.gates["prepare"].close()
        record = await jobs.service.submit(REQUEST, "request-1")

        def renewed() -> bool:
            lease = jobs.record(record.job_id).lease
            return lease is not None and lease.renewal > 0

        await until(renewed)
        jobs.worker.gates["prepare"].open()
        await jobs.service.wait(record.job_id)


async def test_a_job_that_runs_for_too_long_fails(tmp_path: Path) -> None:
    async with process(tmp_path, started=False, run_s=0.05) as jobs:
        record = await running(jobs)
        problem = await problem_of(jobs, record.job_id)

        assert (problem.name, problem.status) == ("run-time-exceeded", 504)
        assert jobs.worker.rendering == set()
        assert len(jobs.worker.tasks) == 1


async def test_the_wait_for_a_slot_is_no_run_time(tmp_path: Path) -> None:
    async with process(tmp_path, started=False, run_s=0.05) as jobs:
        jobs.worker.gates["queued"].close()
        record = await jobs.service.submit(REQUEST, "request-1")
        await jobs.worker.gates["queued"].reached()
        await asyncio.sleep(0.2)
        jobs.worker.gates["queued"].open()

        assert (await jobs.service.wait(record.job_id)).job_id == record.job_id


async def test_what_was_handed_back_goes_on_at_the_next_start(jobs: Jobs) -> None:
    record = await running(jobs)
    await jobs.service.drain(0)
    assert jobs.record(record.job_id).state is JobState.QUEUED

    async with process(jobs.store.folder) as later:
        stored = await until_stored(later, record.job_id, JobState.SUCCEEDED)
    assert stored.attempts == 2
    assert keys(later, "clips/") == [clip_key(stored.clip_id, stored.attempt_token)]
    assert keys(later, "active/") == []


async def test_a_job_in_line_that_another_process_ended_is_let_go(tmp_path: Path) -> None:
    """It was shown as queued, and its waiters waited, until its turn came here."""
    async with process(tmp_path, max_dispatched_jobs=1, lease_s=0.3) as busy:
        await running(busy)
        queued = await busy.service.submit(REQUEST, "request-2")
        waiting = asyncio.create_task(busy.service.wait(queued.job_id))
        async with process(tmp_path, lease_s=0.3) as idle:
            clip = await asyncio.wait_for(waiting, PATIENCE_S)
            assert idle.worker.rendered == [queued.job_id]
        assert clip.job_id == queued.job_id
        assert (await busy.service.job(queued.job_id)).state is JobState.SUCCEEDED
        assert busy.service.queue().waiting == 0


async def test_a_job_in_line_that_another_process_ended_is_shown_and_deleted_as_it_is(tmp_path: Path) -> None:
    """It was `queued`, in no list of ended jobs and not to be deleted, until this process looked at its line again."""
    async with process(tmp_path, max_dispatched_jobs=1, lease_s=3_600) as busy:
        await running(busy)
        queued = await busy.service.submit(REQUEST, "request-2")
        async with process(tmp_path, lease_s=1.0) as idle:
            await until_stored(idle, queued.job_id, JobState.SUCCEEDED)
        shown = await busy.service.job(queued.job_id)
        assert (shown.state, shown.position) == (JobState.SUCCEEDED, None)
        assert busy.service.queue().waiting == 1  # it is in line here still
        listed = await busy.service.jobs(state=JobState.SUCCEEDED)
        assert queued.job_id in {job.job_id for job in listed.jobs}
        await busy.service.delete(queued.job_id)
        with pytest.raises(JobGone):
            await busy.service.job(queued.job_id)


async def test_a_job_in_line_is_shown_while_the_store_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with process(tmp_path, max_dispatched_jobs=1) as jobs:
        await running(jobs)
        queued = await jobs.service.submit(REQUEST, "request-2")

        def away(job_id: str) -> None:
            raise StoreUnavailable("away")

        with monkeypatch.context() as while_away:
            while_away.setattr(jobs.records, "get", away)
            shown = await jobs.service.job(queued.job_id)
        assert shown.state is JobState.QUEUED
        assert shown.position is not None


# ---- suspects


async def test_jobs_that_lost_a_worker_together_run_alone_and_none_is_blamed(tmp_path: Path) -> None:
    async with process(tmp_path, started=False, worker_patience_s=PATIENCE_S) as jobs:
        gate = jobs.worker.gates["running"]
        gate.close()
        jobs.worker.passing["running"] = [LOST] * 3
        records = [await jobs.service.submit(REQUEST, f"request-{n}") for n in range(3)]
        await until(lambda: len(jobs.worker.rendering) == 3)
        most: list[int] = []
        render = jobs.worker.render

        def watched(*args):
            most.append(len(jobs.worker.rendering) + 1)
            return render(*args)

        jobs.worker.render = watched
        gate.open()
        await asyncio.gather(*(jobs.service.wait(record.job_id) for record in records))

        assert most == [1, 1, 1]
        for record in records:
            stored = jobs.record(record.job_id)
            assert (stored.suspect, stored.crashes, stored.attempts) == (True, 0, 2)


async def test_a_job_that_loses_its_worker_alone_is_counted(tmp_path: Path) -> None:
    async with process(tmp_path, started=False, worker_patience_s=PATIENCE_S) as jobs:
        jobs.worker.passing["running"] = [LOST, LOST]
        record = await jobs.service.submit(REQUEST, "request-1")
        await jobs.service.wait(record.job_id)

        stored = jobs.record(record.job_id)
        assert (stored.suspect, stored.crashes, stored.attempts) == (True, 2, 3)


async def test_a_suspect_that_is_cancelled_while_it_waits_holds_up_nobody() -> None:
    turns, entered = _Turns(), asyncio.Event()

    async def take(alone: bool) -> None:
        async with turns.taken(alone=alone):
            entered.set()

    async with turns.taken(alone=False):
        suspect = asyncio.create_task(take(True))
        await asyncio.sleep(0)
        other = asyncio.create_task(take(False))
        await asyncio.sleep(0.01)
        assert not entered.is_set()
        suspect.cancel()
        await asyncio.wait_for(entered.wait(), PATIENCE_S)
        await other


async def test_a_suspect_waits_for_its_neighbours_and_they_for_it() -> None:
    turns, order = _Turns(), []
    leave = asyncio.Event()

    async def take(name: str, alone: bool) -> None:
        async with turns.taken(alone=alone):
            order.append(name)
            if name == "first":
                await leave.wait()

    tasks = []
    for name, alone in (("first", False), ("suspect", True), ("later", False), ("other suspect", True)):
        tasks.append(asyncio.create_task(take(name, alone)))
        await asyncio.sleep(0)
    leave.set()
    await asyncio.gather(*tasks)

    assert order == ["first", "suspect", "other suspect", "later"]


# ---- answers that were lost


async def test_a_commit_whose_answer_was_lost_is_known_though_its_webhook_was_told_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for another's, and the clip that the record names was deleted."""
    with open_jobs(tmp_path, store_patience_s=PATIENCE_S) as jobs:
        record = await running(jobs)
        write, first = jobs.records.write, True

        def lost_and_told(changed, etag, *, again=False):
            nonlocal first
            written = write(changed, etag, again=again)
            if first and changed.state is JobState.SUCCEEDED:
                first = False
                told = WebhookDelivery(url="https://example.com/hook")
                write(jobs.records.amended(changed, webhook=told, lease=Lease(owner="another")), written)
                raise StoreUnavailable("the answer was lost")
            return written

        monkeypatch.setattr(jobs.records, "write", lost_and_told)
        jobs.worker.gates["running"].open()

        clip = await jobs.service.wait(record.job_id)
        stored = jobs.record(record.job_id)
        assert clip.job_id == record.job_id
        assert stored.result is not None
        assert keys(jobs, "clips/") == [stored.result.key]


async def test_a_second_claim_whose_answer_was_lost_before_a_cancel_came_is_this_process_s(tmp_path: Path) -> None:
    """Its token is new, so it was taken for another's, and the job stood still until the lease ran out."""
    with open_jobs(tmp_path, store_patience_s=PATIENCE_S, worker_patience_s=PATIENCE_S) as jobs:
        record = await running(jobs)
        jobs.worker.passing["running"] = [LOST]
        write, claims = jobs.records.write, 0

        def lost_and_cancelled(changed, etag, *, again=False):
            nonlocal claims
            written = write(changed, etag, again=again)
            claims += changed.state is JobState.PREPARING
            if claims == 1:
                claims += 1
                write(jobs.records.amended(changed, cancel_requested=True), written)
                raise StoreUnavailable("the answer was lost")
            return written

        jobs.records.write = lost_and_cancelled
        jobs.worker.gates["running"].open()

        assert (await problem_of(jobs, record.job_id)).name == JobCancelled.name
        assert jobs.record(record.job_id).state is JobState.CANCELLED
