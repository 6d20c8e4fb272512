"""A batch from its submission to its end, over the real store and records."""

import asyncio
from pathlib import Path

import pytest
from batch_support import ALICE, BOB, Served, prompts, served, submit

from schemas.errors import (
    BatchGone,
    BatchNotFound,
    FieldError,
    IdempotencyMismatch,
    InvalidRequest,
    JobGone,
    JobNotEnded,
    JobNotFound,
    OutOfMemory,
    PromptTooLong,
    QuotaExceeded,
    StoreUnavailable,
)
from schemas.jobs import JobState, clip_id_of, item_id
from schemas.requests import GenerateRequest
from serve_graph.api_keys import NOBODY
from storage.batch_records import BatchRecords


async def test_a_batch_ends_with_all_results_in_the_order_of_submission(batches: Served) -> None:
    batch = await submit(batches, prompts(40))
    assert (batch.state, batch.total) == ("running", 40)
    ended = await batches.ended(batch.batch_id)
    assert (ended.counts.succeeded, ended.counts.queued, ended.counts.running) == (40, 0, 0)
    assert ended.ended_at is not None
    results = await batches.results(batch.batch_id)
    assert [result.index for result in results] == list(range(40))
    assert [result.clip.prompt for result in results if result.clip] == [r.prompt for r in prompts(40)]
    assert set(batches.store.commits.values()) == {1}
    assert batches.keys("active/") == []
    assert len(batches.keys("batch-index/")) == 1


async def test_a_seed_is_drawn_once_at_the_submission(batches: Served) -> None:
    batches.worker.gates["running"].close()
    batch = await submit(batches, prompts(6))
    before = await batches.service.jobs(batch_id=batch.batch_id)
    batches.worker.gates["running"].open()
    await batches.ended(batch.batch_id)
    after = await batches.service.jobs(batch_id=batch.batch_id)
    assert [job.parameters for job in before.jobs] == [job.parameters for job in after.jobs]


async def test_every_bad_request_is_listed_and_nothing_exists(batches: Served) -> None:
    requests: list[object] = list(prompts(30))
    requests[3] = GenerateRequest(prompt="x", num_frames=80)
    requests[7] = [FieldError(field="prompt", message="is missing")]
    requests[29] = [FieldError(field="body", message="is not valid JSON")]
    requests[12] = GenerateRequest(prompt="ein Käuzchen")
    batches.worker.failures["check"] = PromptTooLong("prompt", 600, 512)
    with pytest.raises(InvalidRequest) as refused:
        await submit(batches, requests)  # type: ignore[arg-type]  # a list of both kinds
    fields = [error.field for error in refused.value.errors]
    assert fields == ["requests.3.num_frames", "requests.7.prompt", "requests.12.prompt", "requests.29"]
    for prefix in ("batches/", "active/", "batch-index/", "jobs/", "clips/"):
        assert batches.keys(prefix) == []


@pytest.mark.parametrize("count", [0, 10_001])
async def test_a_batch_of_an_illegal_length_is_refused(batches: Served, count: int) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await submit(batches, prompts(1) * count)
    assert [error.field for error in refused.value.errors] == ["requests"]
    assert batches.keys("batches/") == []


async def test_a_worker_that_is_away_at_the_check_leaves_no_batch(batches: Served) -> None:
    batches.worker.failures["check"] = StoreUnavailable("away")
    with pytest.raises(StoreUnavailable):
        await submit(batches, [GenerateRequest(prompt="ein Käuzchen")] * 20)
    assert batches.keys("batches/") == []


async def test_the_same_key_gives_the_same_batch_and_other_requests_are_refused(batches: Served) -> None:
    batches.worker.gates["running"].close()
    first = await submit(batches, prompts(3), idempotency_key="k")
    assert (await submit(batches, prompts(3), idempotency_key="k")).batch_id == first.batch_id
    with pytest.raises(IdempotencyMismatch):
        await submit(batches, prompts(4), idempotency_key="k")
    with pytest.raises(IdempotencyMismatch):
        await submit(batches, prompts(3), idempotency_key="k", webhook_url="https://example.com/")
    assert (await submit(batches, prompts(3), ALICE, idempotency_key="k")).batch_id != first.batch_id
    batches.worker.gates["running"].open()
    await batches.ended(first.batch_id)
    assert (await submit(batches, prompts(3), idempotency_key="k")).state == "ended"


async def test_ten_submissions_with_one_key_at_once_make_one_batch(batches: Served) -> None:
    made = await asyncio.gather(*(submit(batches, prompts(5), idempotency_key="k") for _ in range(10)))
    assert len({batch.batch_id for batch in made}) == 1
    await batches.ended(made[0].batch_id)
    assert len(batches.keys("batch-index/")) == 1
    assert batches.keys("active/") == []
    assert sum(batches.store.commits.values()) == 5


async def test_a_failed_job_does_not_end_its_batch(batches: Served) -> None:
    batches.worker.passing["running"] = [OutOfMemory()]
    batch = await submit(batches, prompts(5))
    counts = (await batches.ended(batch.batch_id)).counts
    assert (counts.succeeded, counts.failed) == (4, 1)
    failed = [result for result in await batches.results(batch.batch_id) if result.error]
    assert [result.error.name for result in failed if result.error] == ["out-of-memory"]


async def test_a_cancel_stops_what_runs_and_begins_nothing_more(batches: Served) -> None:
    batches.worker.gates["running"].close()
    batch = await submit(batches, prompts(500))
    await batches.worker.gates["running"].reached()
    ended = await batches.service.batches.cancel(batch.batch_id, NOBODY)
    assert ended.state == "ended"
    assert ended.counts.cancelled == 500
    assert len(batches.worker.begun) <= 4
    assert len(batches.keys("jobs/")) <= 5  # those and the next in line: no record for each that never began
    page = await batches.service.jobs(batch_id=batch.batch_id, state=JobState.CANCELLED, limit=100)
    assert [job.job_id for job in page.jobs] == [item_id(batch.batch_id, index) for index in range(100)]
    results = await batches.results(batch.batch_id)
    assert {result.state for result in results} == {JobState.CANCELLED}
    assert (await batches.service.batches.cancel(batch.batch_id, NOBODY)).counts == ended.counts


async def test_a_job_that_has_not_begun_has_a_state_events_and_a_cancel(batches: Served) -> None:
    batches.worker.gates["running"].close()
    batch = await submit(batches, prompts(20))
    job_id = item_id(batch.batch_id, 19)
    job = await batches.service.job(job_id)
    assert (job.state, job.batch_id) == (JobState.QUEUED, batch.batch_id)
    with pytest.raises(JobNotEnded):
        await batches.service.delete(job_id)
    changes = batches.service.changes(job_id)
    assert (await anext(changes)).state is JobState.QUEUED
    assert (await batches.service.cancel(job_id)).state is JobState.CANCELLED
    assert [job.state async for job in changes] == [JobState.CANCELLED]
    batches.worker.gates["running"].open()
    counts = (await batches.ended(batch.batch_id)).counts
    assert (counts.succeeded, counts.cancelled) == (19, 1)


async def test_events_of_a_job_that_has_not_begun_go_on_to_its_end(batches: Served) -> None:
    batches.worker.gates["running"].close()
    batch = await submit(batches, prompts(12))
    following = batches.service.changes(item_id(batch.batch_id, 11))
    assert (await anext(following)).state is JobState.QUEUED
    batches.worker.gates["running"].open()
    assert [job.state async for job in following][-1] is JobState.SUCCEEDED


async def test_an_unknown_place_of_a_batch_is_no_job(batches: Served) -> None:
    batch = await submit(batches, prompts(2))
    for job_id in (item_id(batch.batch_id, 2), item_id("batch_" + "0" * 32, 0), "-Infinity", "job_x-1", "-"):
        with pytest.raises(JobNotFound):
            await batches.service.job(job_id)


async def test_another_principal_sees_nothing(batches: Served) -> None:
    batch = await submit(batches, prompts(9), ALICE)
    service = batches.service
    for call in (
        service.batches.reading.batch(batch.batch_id, BOB),
        service.batches.cancel(batch.batch_id, BOB),
        anext(service.batches.reading.results(batch.batch_id, BOB)),
        service.jobs(BOB, batch_id=batch.batch_id),
    ):
        with pytest.raises(BatchNotFound):
            await call
    with pytest.raises(JobNotFound):
        await service.job(item_id(batch.batch_id, 8), BOB)
    assert (await service.batches.reading.batches(BOB, limit=10, after=None)).batches == ()
    assert len((await service.batches.reading.batches(ALICE, limit=10, after=None)).batches) == 1


async def test_batches_are_listed_newest_first_in_pages(batches: Served) -> None:
    made = []
    for _ in range(5):
        made.append((await submit(batches, prompts(1))).batch_id)
        await asyncio.sleep(0.002)
    found, after = [], None
    while True:
        page = await batches.service.batches.reading.batches(NOBODY, limit=2, after=after)
        found += [batch.batch_id for batch in page.batches]
        after = page.next_cursor
        if after is None:
            break
    assert found == made[::-1]
    with pytest.raises(InvalidRequest):
        await batches.service.batches.reading.batches(NOBODY, limit=2, after="../x")


async def test_jobs_of_a_batch_are_paged_in_the_order_of_submission(batches: Served) -> None:
    batches.worker.passing["running"] = [OutOfMemory(), OutOfMemory()]
    batch = await submit(batches, prompts(7))
    await batches.ended(batch.batch_id)
    found, after = [], None
    while True:
        page = await batches.service.jobs(batch_id=batch.batch_id, state=JobState.SUCCEEDED, limit=2, after=after)
        found += [job.job_id for job in page.jobs]
        after = page.next_cursor
        if after is None:
            break
    assert found == sorted(found)
    assert len(found) == 5
    assert (await batches.service.jobs()).jobs == ()
    with pytest.raises(InvalidRequest):
        await batches.service.jobs(batch_id=batch.batch_id, after="x")


async def test_more_batches_of_one_principal_than_may_be_are_refused(tmp_path: Path) -> None:
    with served(tmp_path, max_batches=2) as opened:
        opened.worker.gates["running"].close()
        await submit(opened, prompts(2), ALICE)
        await submit(opened, prompts(2), ALICE)
        with pytest.raises(QuotaExceeded, match="2 batches"):
            await submit(opened, prompts(2), ALICE)
        await submit(opened, prompts(2), BOB)
        opened.worker.gates["running"].open()
        await opened.service.drain(5.0)


async def test_a_running_batch_is_looked_at_without_reading_its_jobs(batches: Served) -> None:
    batches.worker.gates["running"].close()
    batch = await submit(batches, prompts(1_000))
    await batches.worker.gates["running"].reached()
    batches.store.calls.clear()
    counts = (await batches.service.batches.reading.batch(batch.batch_id, NOBODY)).counts
    assert counts.queued + counts.running == 1_000
    assert batches.store.calls["get jobs"] == 0
    await batches.service.batches.cancel(batch.batch_id, NOBODY)


async def test_results_that_nobody_reads_on_are_not_read_from_the_store(batches: Served) -> None:
    batch = await submit(batches, prompts(200))
    await batches.ended(batch.batch_id)
    batches.store.calls.clear()
    results = batches.service.batches.reading.results(batch.batch_id, NOBODY)
    await anext(results)
    await results.aclose()
    assert batches.store.calls["get jobs"] <= 17


async def test_a_deleted_batch_is_gone_with_all_of_its_jobs(batches: Served) -> None:
    batch = await submit(batches, prompts(3), idempotency_key="k")
    await batches.ended(batch.batch_id)
    await asyncio.to_thread(BatchRecords(batches.store).delete, batch.batch_id)
    assert batches.keys("jobs/") + batches.keys("clips/") + batches.keys("batch-index/") == []
    assert batches.keys("batches/") == [f"batches/{batch.batch_id}/manifest.jsonl"]
    with pytest.raises(BatchGone):
        await batches.service.batches.reading.batch(batch.batch_id, NOBODY)
    with pytest.raises(JobGone):
        await batches.service.job(item_id(batch.batch_id, 1))
    with pytest.raises(BatchGone):
        await submit(batches, prompts(3), idempotency_key="k")
    assert (await batches.service.batches.reading.batches(NOBODY, limit=10, after=None)).batches == ()


async def test_a_clip_of_a_batch_has_urls(batches: Served) -> None:
    batch = await submit(batches, prompts(1))
    await batches.ended(batch.batch_id)
    clip_id = clip_id_of(item_id(batch.batch_id, 0))
    assert clip_id in (await batches.service.clip_url(clip_id)).url
