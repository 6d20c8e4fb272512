"""Batches without Ray, on one store: processes killed in the middle, in twos. What is acknowledged is done once.

Renders and commits are counted in a log outside the records (`service_core`).
"""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from polling import until
from service_core.control import Core, Nursery, Work, cores, planned

from schemas.batches import Batch, BatchResult
from schemas.jobs import JobState

PATIENCE_S = 90.0
TOTAL = 120
KILLS = 12


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


def submit(core: Core, count: int, key: str) -> Batch:
    """Again and again until it is acknowledged."""
    requests = [{"prompt": f"number {index}", "seed": index} for index in range(count)]
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            answer = httpx.post(
                core.base + "/batches", json={"requests": requests}, headers={"Idempotency-Key": key}, timeout=30
            )
        except httpx.TransportError:
            continue
        if answer.status_code == 202:
            return Batch.model_validate_json(answer.content)
        assert answer.status_code in (429, 503), answer.text
    raise AssertionError("never acknowledged")


def batch_of(core: Core, batch_id: str) -> Batch:
    answer = httpx.get(f"{core.base}/batches/{batch_id}", timeout=30)
    assert answer.status_code == 200, answer.text
    return Batch.model_validate_json(answer.content)


def ended(core: Core, batch_id: str) -> Batch:
    until(lambda: batch_of(core, batch_id).state == "ended", "the batch's end", PATIENCE_S)
    return batch_of(core, batch_id)


def results(core: Core, batch_id: str) -> list[BatchResult]:
    with httpx.stream("GET", f"{core.base}/batches/{batch_id}/results", timeout=30) as answer:
        return [BatchResult.model_validate_json(line) for line in answer.iter_lines()]


def test_a_batch_survives_its_process_killed_again_and_again(
    nursery: Nursery, tmp_path: Path, tell: Callable[[str, str], None]
) -> None:
    luck = random.Random(7)
    with cores(nursery, 1, tmp_path) as (core,):
        core.start()
        made = [submit(core, TOTAL, f"key-{number}") for number in range(2)]
        for _ in range(KILLS):
            time.sleep(luck.uniform(0.05, 0.6))  # the kill comes at a random moment
            core.kill()
            core.start()
        for batch in made:
            assert submit(core, TOTAL, f"key-{made.index(batch)}").batch_id == batch.batch_id
            assert ended(core, batch.batch_id).counts.succeeded == TOTAL
            found = results(core, batch.batch_id)
            assert [result.clip.seed for result in found if result.clip] == list(range(TOTAL))
        work = Work.read(core)
        tell("batches", f"2 of {TOTAL}, {KILLS} kills: {work.renders} renders for {work.commits} commits")
        assert len(work.tried) == 2 * TOTAL
        assert work.commits >= 2 * TOTAL - KILLS  # a kill may come between a commit and its note
        assert work.committed_twice == 0


def test_two_processes_share_batches_while_one_is_killed_again_and_again(
    nursery: Nursery, tmp_path: Path, tell: Callable[[str, str], None]
) -> None:
    luck = random.Random(11)
    with cores(nursery, 2, tmp_path) as (one, other):
        for core in (one, other):
            planned(core).start()
        made = [submit(core, TOTAL, f"key-{number}") for number, core in enumerate((one, other))]
        for _ in range(KILLS):
            time.sleep(luck.uniform(0.05, 0.6))  # the kill comes at a random moment
            other.kill()
            other.start()
        for batch in made:
            for core in (one, other):
                assert ended(core, batch.batch_id).counts.succeeded == TOTAL
            assert {result.state for result in results(one, batch.batch_id)} == {JobState.SUCCEEDED}
        work = Work.read(one)
        tell("batches", f"2 of {TOTAL} on two processes, {KILLS} kills of one: {work.renders} renders")
        assert len(work.tried) == 2 * TOTAL
        assert work.commits >= 2 * TOTAL - KILLS  # a kill may come between a commit and its note
        assert work.committed_twice == 0


def test_a_submission_that_is_killed_exists_wholly_or_not_at_all(nursery: Nursery, tmp_path: Path) -> None:
    """The process is killed around the commit; the same key then gives one batch with all of its jobs."""
    luck = random.Random(3)
    with cores(nursery, 1, tmp_path) as (core,):
        core.start()
        cut_short = 0
        for number in range(12):
            requests = [{"prompt": f"number {index}", "seed": index} for index in range(30)]
            headers = {"Idempotency-Key": f"key-{number}"}
            try:
                wait = httpx.Timeout(5, read=luck.uniform(0.005, 0.06))
                httpx.post(core.base + "/batches", json={"requests": requests}, headers=headers, timeout=wait)
            except httpx.TransportError:
                cut_short += 1
            core.kill()
            core.start()
            listed = httpx.get(core.base + "/batches", params={"limit": 100}, timeout=30).json()["batches"]
            assert {batch["total"] for batch in listed} <= {30}
        assert cut_short
        made = [submit(core, 30, f"key-{number}") for number in range(12)]
        assert [ended(core, batch.batch_id).counts.succeeded for batch in made] == [30] * 12
        listed = httpx.get(core.base + "/batches", params={"limit": 100}, timeout=30).json()["batches"]
        assert {batch["batch_id"] for batch in listed} == {batch.batch_id for batch in made}
        assert len(listed) == 12
        assert Work.read(core).committed_twice == 0
