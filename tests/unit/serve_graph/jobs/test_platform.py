"""A front that records jobs, and containers that run them by call: who begins what, and what is lost on the way."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import REQUEST, process, until, until_stored
from support import PATIENCE_S, Jobs

from schemas.errors import QueueFull, ShuttingDown
from schemas.jobs import JobRecord, JobState
from schemas.requests import GenerateRequest
from serve_graph.api_keys import NOBODY
from serve_graph.jobs.platform import PlatformUnavailable

pytestmark = pytest.mark.usefixtures("quick_looks")

SHORT_LEASE_S = 0.3


class Calls:
    """A platform that takes calls and leaves it to the test which of them are answered, and when."""

    max_turns = 4

    def __init__(self) -> None:
        self.made: list[str] = []
        self.lost: set[str] = set()
        self.unavailable = False

    def call(self, work_id: str) -> str:
        if self.unavailable:
            raise PlatformUnavailable("it takes no calls")
        self.made.append(work_id)
        return f"call-{len(self.made)}"

    def is_pending(self, call_id: str) -> bool:
        return call_id not in self.lost

    def is_idle(self) -> bool:
        return len(self.lost) == len(self.made)

    def lose_all(self) -> None:
        self.lost = {f"call-{number + 1}" for number in range(len(self.made))}


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
async def front(tmp_path: Path, calls: Calls) -> AsyncIterator[Jobs]:
    async with process(tmp_path, started=False, platform=calls, lease_s=SHORT_LEASE_S) as opened:
        yield opened


@asynccontextmanager
async def container(folder: Path, **options: Any) -> AsyncIterator[Jobs]:
    async with process(folder, by_call=True, **{"lease_s": SHORT_LEASE_S, **options}) as opened:
        yield opened


@asynccontextmanager
async def frozen(folder: Path) -> AsyncIterator[Jobs]:
    """A container whose leases run out: to itself they are long."""
    async with process(folder, by_call=True, lease_s=600.0) as opened:
        yield opened


async def submitted(front: Jobs, prompt: str = "an otter", **fields: Any) -> JobRecord:
    return await front.service.submit(GenerateRequest(prompt=prompt, seed=7, **fields), "request-1")


async def in_time(work: Any) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        return await work


async def sent(requests: Iterable[GenerateRequest]) -> AsyncIterator[GenerateRequest]:
    for request in requests:
        yield request


async def test_a_front_calls_for_a_job_and_gives_the_clip_that_a_container_made(
    tmp_path: Path, front: Jobs, calls: Calls
) -> None:
    record = await submitted(front)

    assert calls.made == [record.job_id]
    assert front.record(record.job_id).call_id == "call-1"
    waiting = asyncio.create_task(front.service.wait(record.job_id))
    async with container(tmp_path) as made_for:
        await in_time(made_for.service.work_on(record.job_id))
        clip = await in_time(waiting)
    assert clip.job_id == record.job_id
    assert made_for.worker.rendered == [record.job_id]
    assert front.worker.tasks == []
    assert front.record(record.job_id).call_id == "call-1"


async def test_nothing_begins_without_a_turn(tmp_path: Path) -> None:
    async with container(tmp_path) as idle:
        record = await submitted(idle)
        await asyncio.sleep(3 * SHORT_LEASE_S)  # time for several sweeps
        assert idle.worker.tasks == []
        assert idle.record(record.job_id).state is JobState.QUEUED

        await in_time(idle.service.wait(record.job_id))  # a request that waits is a turn, too
        assert idle.worker.rendered == [record.job_id]


async def test_a_turn_takes_what_is_next_in_line_and_not_what_was_called_first(
    tmp_path: Path, front: Jobs, calls: Calls
) -> None:
    """Priorities hold although the platform's own queue knows none."""
    low, high = await submitted(front, priority="low"), await submitted(front, "a fox", priority="high")
    async with container(tmp_path, max_dispatched_jobs=4) as working:
        first = asyncio.create_task(working.service.work_on(low.job_id))
        await in_time(first)
        assert working.worker.rendered == [high.job_id, low.job_id]
        await in_time(working.service.work_on(high.job_id))  # its own call comes late, and finds it done
        assert working.worker.rendered == [high.job_id, low.job_id]


async def test_no_more_jobs_are_under_way_than_calls_are_open(tmp_path: Path, front: Jobs) -> None:
    records = [await submitted(front, f"otter {number}") for number in range(4)]
    async with container(tmp_path, max_dispatched_jobs=4) as working:
        working.worker.gates["running"].close()
        turns = [asyncio.create_task(working.service.work_on(record.job_id)) for record in records[:2]]
        await until(lambda: len(working.worker.rendering) == 2)
        await asyncio.sleep(2 * SHORT_LEASE_S)
        assert len(working.worker.rendering) == 2

        working.worker.gates["running"].open()
        await in_time(asyncio.gather(*turns))


async def test_a_call_for_a_job_that_was_cancelled_renders_nothing(tmp_path: Path, front: Jobs) -> None:
    record = await submitted(front)
    cancelled = await front.service.cancel(record.job_id)

    assert cancelled.state is JobState.CANCELLED
    async with container(tmp_path) as working:
        await in_time(working.service.work_on(record.job_id))
        assert working.worker.tasks == []


async def test_a_cancel_at_the_front_reaches_the_container_that_renders(tmp_path: Path, front: Jobs) -> None:
    record = await submitted(front)
    async with container(tmp_path) as working:
        working.worker.gates["running"].close()
        turn = asyncio.create_task(working.service.work_on(record.job_id))
        await working.worker.gates["running"].reached()
        await in_time(front.service.cancel(record.job_id))
        await in_time(turn)
        assert working.worker.rendered == []
    assert front.record(record.job_id).state is JobState.CANCELLED


async def test_a_client_that_leaves_the_front_cancels_its_job(front: Jobs) -> None:
    record = await submitted(front)

    front.service.abandon(record.job_id)

    await until_stored(front, record.job_id, JobState.CANCELLED)


async def test_a_platform_that_takes_no_calls_loses_no_job(tmp_path: Path, calls: Calls) -> None:
    calls.unavailable = True
    async with process(tmp_path, started=False, platform=calls) as front:
        record = await submitted(front)
        assert (front.record(record.job_id).state, front.record(record.job_id).call_id) == (JobState.QUEUED, None)
    calls.unavailable = False

    async with process(tmp_path, platform=calls):  # the scheduled sweeper
        await until(lambda: calls.made == [record.job_id])


async def test_a_sweep_calls_again_for_a_job_whose_call_is_lost_and_for_no_other(
    tmp_path: Path, front: Jobs, calls: Calls
) -> None:
    lost, pending = await submitted(front), await submitted(front, "a fox")
    calls.lost.add("call-1")

    async with process(tmp_path, platform=calls, lease_s=SHORT_LEASE_S) as sweeper:
        await until(lambda: len(calls.made) > 2)
        await until(lambda: sweeper.record(lost.job_id).call_id == "call-3")
        await asyncio.sleep(3 * SHORT_LEASE_S)
    assert calls.made == [lost.job_id, pending.job_id, lost.job_id]


async def test_a_sweep_calls_again_for_a_job_whose_container_is_lost(tmp_path: Path, front: Jobs, calls: Calls) -> None:
    record = await submitted(front)
    async with frozen(tmp_path) as dead:
        dead.worker.gates["running"].close()
        turn = asyncio.create_task(dead.service.work_on(record.job_id))
        await dead.worker.gates["running"].reached()
        calls.lose_all()
        async with process(tmp_path, platform=calls, lease_s=SHORT_LEASE_S):
            await until(lambda: calls.made == [record.job_id] * 2)
        async with container(tmp_path) as other:
            await in_time(other.service.work_on(record.job_id))
            assert other.worker.rendered == [record.job_id]
        turn.cancel()
        await asyncio.gather(turn, return_exceptions=True)


async def test_a_retried_call_waits_for_the_lost_owner_s_lease_and_renders(tmp_path: Path, front: Jobs) -> None:
    """The platform gives a lost container's call to another one at once, before the lease has run out."""
    record = await submitted(front)
    async with frozen(tmp_path) as dead:
        dead.worker.gates["running"].close()
        turn = asyncio.create_task(dead.service.work_on(record.job_id))
        await dead.worker.gates["running"].reached()
        async with container(tmp_path) as other:
            await in_time(other.service.work_on(record.job_id))
            assert other.worker.rendered == [record.job_id]
        turn.cancel()
        await asyncio.gather(turn, return_exceptions=True)
    assert front.record(record.job_id).attempts == 2


async def test_a_container_that_stops_leaves_its_job_to_another_call(tmp_path: Path, front: Jobs) -> None:
    record = await submitted(front)
    async with container(tmp_path) as stopping:
        stopping.worker.gates["running"].close()
        turn = asyncio.create_task(stopping.service.work_on(record.job_id))
        await stopping.worker.gates["running"].reached()
        await in_time(stopping.service.drain(0))
        with pytest.raises(ShuttingDown):
            await in_time(turn)
    assert front.record(record.job_id).state is JobState.QUEUED


async def test_a_batch_gets_a_turn_for_each_job_as_far_as_there_are(tmp_path: Path, front: Jobs, calls: Calls) -> None:
    prompts = [GenerateRequest(prompt=f"otter {number}", seed=7) for number in range(6)]
    batch = await front.service.submit_batch(sent(prompts), "request-1")

    assert calls.made == [batch.batch_id] * 4
    async with container(tmp_path) as one, container(tmp_path) as two:
        turns = [working.service.work_on(batch.batch_id) for working in (one, one, two, two)]
        await in_time(asyncio.gather(*turns))
        assert len(one.worker.rendered + two.worker.rendered) == 6
    ended = await front.service.batches.reading.batch(batch.batch_id, NOBODY)
    assert (ended.state, ended.counts.succeeded) == ("ended", 6)


async def test_results_of_an_ended_batch_are_not_those_of_a_look_before(tmp_path: Path, front: Jobs) -> None:
    batch = await front.service.submit_batch(sent([REQUEST] * 2), "request-1")
    reading = front.service.batches.reading
    assert {result.state async for result in reading.results(batch.batch_id, NOBODY)} == {JobState.QUEUED}
    async with container(tmp_path) as working:
        await in_time(working.service.work_on(batch.batch_id))

    assert {result.state async for result in reading.results(batch.batch_id, NOBODY)} == {JobState.SUCCEEDED}


async def test_a_sweep_calls_again_for_a_batch_once_nothing_runs(tmp_path: Path, front: Jobs, calls: Calls) -> None:
    batch = await front.service.submit_batch(sent([REQUEST] * 2), "request-1")
    async with process(tmp_path, platform=calls, lease_s=SHORT_LEASE_S):
        await asyncio.sleep(3 * SHORT_LEASE_S)
        assert calls.made == [batch.batch_id] * 2
        calls.lose_all()
        await until(lambda: calls.made[:4] == [batch.batch_id] * 4)


async def test_a_batch_that_nobody_runs_is_cancelled_by_the_sweep(tmp_path: Path, front: Jobs, calls: Calls) -> None:
    batch = await front.service.submit_batch(sent([REQUEST] * 2), "request-1")
    await front.service.batches.cancel(batch.batch_id, NOBODY)
    async with process(tmp_path, platform=calls, lease_s=SHORT_LEASE_S) as sweeper:
        async with asyncio.timeout(PATIENCE_S):
            reading = sweeper.service.batches.reading
            while (await reading.batch(batch.batch_id, NOBODY)).state != "ended":  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(0.01)


async def test_a_front_admits_by_what_the_store_says(tmp_path: Path, calls: Calls) -> None:
    async with process(tmp_path, started=False, platform=calls, max_waiting_jobs=2) as one:
        first = await submitted(one)
        await submitted(one)
        with pytest.raises(QueueFull):
            await submitted(one)
    async with process(tmp_path, started=False, platform=calls, max_waiting_jobs=2) as another:
        with pytest.raises(QueueFull):
            await submitted(another)
        await another.service.cancel(first.job_id)
    assert len(calls.made) == 2


async def test_a_service_of_its_own_takes_no_calls(tmp_path: Path) -> None:
    async with process(tmp_path) as jobs:
        with pytest.raises(RuntimeError):
            await jobs.service.work_on("job_" + "0" * 32)
