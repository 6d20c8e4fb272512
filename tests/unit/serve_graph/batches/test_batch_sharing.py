"""Batches across processes and restarts, beside other jobs, and at their largest."""

import asyncio
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from batch_support import ALICE, BOB, LEASE_S, PATIENCE_S, Served, prompts, sent, served, submit

from schemas.batches import MAX_BATCH_REQUESTS
from schemas.errors import StoreUnavailable
from schemas.jobs import JobState, item_id, item_of
from schemas.requests import GenerateRequest
from serve_graph.api_keys import NOBODY
from serve_graph.jobs.batch_intake import SLICE_S


async def test_a_batch_whose_process_died_is_ended_by_the_next_one(tmp_path: Path) -> None:
    with served(tmp_path) as first:
        first.service.start()
        batch = await submit(first, prompts(30))
        while len(first.worker.rendered) < 8:
            await asyncio.sleep(0.005)
        first.worker.gates["running"].close()
        await asyncio.sleep(0.05)
        first.drop()
        await asyncio.sleep(0.05)
        with served(tmp_path) as second:
            second.service.start()
            ended = await second.ended(batch.batch_id)
            assert ended.counts.succeeded == 30
            commits = first.store.commits + second.store.commits
            assert len(commits) == 30
            assert set(commits.values()) == {1}
            assert second.keys("active/") == []
            results = await second.results(batch.batch_id)
            assert all(result.clip for result in results)
            assert len(second.keys("clips/")) == 30
            await second.service.drain(5.0)


async def test_a_batch_that_was_stopped_goes_on_at_the_next_start(tmp_path: Path) -> None:
    with served(tmp_path) as first:
        first.service.start()
        first.worker.gates["running"].close()
        batch = await submit(first, prompts(10))
        await first.worker.gates["running"].reached()
        await first.service.drain(0.0)
    with served(tmp_path) as second:
        second.service.start()
        assert (await second.ended(batch.batch_id)).counts.succeeded == 10
        tokens = [key.split("/")[2] for key in second.keys("clips/")]
        assert len(set(tokens)) == 10
        await second.service.drain(5.0)


async def test_two_services_share_a_batch_and_commit_each_job_once(tmp_path: Path) -> None:
    with served(tmp_path) as first, served(tmp_path) as second:
        for one in (first, second):
            one.worker.step_s = 0.05
            one.service.start()
        batch = await submit(first, prompts(80))
        assert (await first.ended(batch.batch_id)).counts.succeeded == 80
        assert (await second.ended(batch.batch_id)).counts.succeeded == 80
        assert first.worker.rendered
        assert second.worker.rendered
        assert set((first.store.commits + second.store.commits).values()) == {1}
        assert len(set(first.worker.rendered) | set(second.worker.rendered)) == 80
        assert not set(first.worker.rendered) & set(second.worker.rendered)
        for one in (first, second):
            await one.service.drain(5.0)


async def test_a_cancel_reaches_the_other_process(tmp_path: Path) -> None:
    with served(tmp_path) as first, served(tmp_path) as second:
        for one in (first, second):
            one.worker.step_s = 0.02
            one.service.start()
        batch = await submit(first, prompts(2_000))
        while not second.worker.begun:
            await asyncio.sleep(0.01)
        await second.service.batches.cancel(batch.batch_id, NOBODY)
        ended = await first.ended(batch.batch_id)
        begun = len(first.worker.begun) + len(second.worker.begun)
        await asyncio.sleep(3 * LEASE_S)
        assert len(first.worker.begun) + len(second.worker.begun) == begun  # nothing begins after the end
        results = await second.results(batch.batch_id)
        states = [result.state for result in results]
        assert states.count(JobState.SUCCEEDED) == ended.counts.succeeded
        assert states.count(JobState.CANCELLED) == ended.counts.cancelled
        assert ended.counts.succeeded + ended.counts.cancelled == 2_000
        for one in (first, second):
            await one.service.drain(5.0)


async def test_an_end_that_could_not_be_filed_is_filed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path) as opened:
        opened.service.start()
        filing, failed = opened.records.file_item, []

        def fails_once(job_id: str, state: JobState) -> None:
            if job_id not in failed:
                failed.append(job_id)
                raise StoreUnavailable("away")
            filing(job_id, state)

        monkeypatch.setattr(opened.records, "file_item", fails_once)
        batch = await submit(opened, prompts(6))
        assert (await opened.ended(batch.batch_id)).counts.succeeded == 6
        assert len(failed) == 6
        assert set(opened.store.commits.values()) == {1}
        await opened.service.drain(5.0)


async def test_singles_go_before_a_batch_and_the_batch_still_moves(tmp_path: Path) -> None:
    with served(tmp_path, max_dispatched_jobs=1, max_waiting_jobs=64) as opened:
        opened.service.start()
        opened.worker.gates["running"].close()
        batch = await submit(opened, prompts(1_000), ALICE)
        await opened.worker.gates["running"].reached()
        singles = [await opened.service.submit(GenerateRequest(prompt="x"), "r", BOB) for _ in range(30)]
        opened.worker.gates["running"].open()
        await asyncio.gather(*(opened.service.wait(job.job_id, BOB) for job in singles))
        order = opened.worker.begun
        last = order.index(singles[-1].job_id)
        batches_jobs = sum(item_of(job_id) is not None for job_id in order[1:last])
        assert 8 <= batches_jobs <= 11  # one of four
        await opened.service.batches.cancel(batch.batch_id, ALICE)
        await opened.service.drain(5.0)


async def test_a_batch_leaves_a_place_under_way_to_single_jobs(tmp_path: Path) -> None:
    with served(tmp_path, max_dispatched_jobs=4) as opened:
        opened.worker.gates["running"].close()
        await submit(opened, prompts(100), ALICE)
        async with asyncio.timeout(PATIENCE_S):
            while len(opened.worker.begun) < 3:
                await asyncio.sleep(0.01)
        single = await opened.service.submit(GenerateRequest(prompt="x"), "r", BOB)
        async with asyncio.timeout(PATIENCE_S):
            while single.job_id not in opened.worker.begun:
                await asyncio.sleep(0.01)
        assert len(opened.worker.begun) == 4
        opened.worker.gates["running"].open()
        await opened.service.drain(0.0)


async def test_batches_share_by_principal_and_then_by_batch(tmp_path: Path) -> None:
    with served(tmp_path, max_dispatched_jobs=1) as opened:
        opened.worker.gates["running"].close()
        first = await submit(opened, prompts(200), ALICE)
        second = await submit(opened, prompts(200), ALICE)
        third = await submit(opened, prompts(200), BOB)
        opened.worker.gates["running"].open()
        async with asyncio.timeout(PATIENCE_S):
            while len(opened.worker.begun) < 81:
                await asyncio.sleep(0.005)
        begun = [(item_of(job_id) or ("", 0))[0] for job_id in opened.worker.begun[1:81]]
        assert 36 <= begun.count(third.batch_id) <= 44
        assert 17 <= begun.count(first.batch_id) <= 23
        assert 17 <= begun.count(second.batch_id) <= 23
        await opened.service.drain(0.0)


async def test_a_batch_of_10000_is_accepted_without_holding_up_the_loop(
    tmp_path: Path, tell: Callable[[str, str], None]
) -> None:
    requests = [GenerateRequest(prompt=f"number {index}: " + "a red circle moving left, " * 30) for index in range(10_000)]
    assert len(requests) == MAX_BATCH_REQUESTS
    with served(tmp_path) as opened:
        opened.worker.gates["running"].close()
        stalls: list[float] = []

        async def watch() -> None:
            last = time.monotonic()
            while True:
                await asyncio.sleep(0)
                now = time.monotonic()
                stalls.append(now - last)
                last = now

        watching = asyncio.create_task(watch())
        began, cpu = time.monotonic(), time.process_time()
        batch = await submit(opened, requests)
        seconds = time.monotonic() - began
        watching.cancel()
        resident = _held_by(opened)
        tell("batches", f"10,000 requests accepted in {seconds:.1f} s ({10_000 / seconds:.0f}/s), "
             f"{time.process_time() - cpu:.1f} s CPU; longest stall {1000 * max(stalls):.0f} ms; holds {resident} bytes")
        assert batch.total == 10_000
        assert resident < 4 * 2**20
        await opened.service.batches.cancel(batch.batch_id, NOBODY)
        await opened.service.drain(5.0)


def _held_by(opened: Served) -> int:
    """Bytes that the unfinished batches take: places and line ends, and the lines at hand."""
    batches = opened.service.batches
    return batches._lines._bytes + sum(
        len(batch._places) + batch.ends.buffer_info()[1] * batch.ends.itemsize for batch in batches._running.values()
    )
