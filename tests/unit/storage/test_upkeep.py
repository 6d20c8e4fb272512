"""Retention and garbage, over real records in a real local store; only the clock is ours."""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from random_wan import RANDOM_WAN

from schemas.batches import BatchCounts, BatchItem, BatchManifest, BatchSummary
from schemas.clips import Timings
from schemas.errors import JobNotFound
from schemas.jobs import JobRecord, JobState, Lease, RenderedClip, item_id, new_batch_id, new_job_id
from schemas.requests import GenerateRequest
from schemas.webhooks import WebhookDelivery
from storage.batch_records import BatchDeleted, BatchRecords
from storage.job_records import Deleted, JobRecords
from storage.keys import clip_key, thumbnail_key
from storage.local import LocalStore
from storage.upkeep import GARBAGE_AGE, TOMBSTONES_KEPT, Upkeep

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
KEPT = timedelta(days=7)
REQUEST = GenerateRequest(prompt="a red circle", seed=7)


class Clock:
    now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


@pytest.fixture
def jobs(store: LocalStore, clock: Clock) -> JobRecords:
    return JobRecords(store, now=clock)


@pytest.fixture
def batches(store: LocalStore, clock: Clock) -> BatchRecords:
    return BatchRecords(store, now=clock)


@pytest.fixture
def upkeep(store: LocalStore, jobs: JobRecords, batches: BatchRecords, clock: Clock) -> Upkeep:
    return Upkeep(store, jobs, batches, now=clock)


Ended = Callable[..., JobRecord]


@pytest.fixture
def ended(jobs: JobRecords, store: LocalStore) -> Ended:
    """A job that succeeded `ago`, with its clip and thumbnail, filed."""

    def make(ago: timedelta, **changes: Any) -> JobRecord:
        job_id, at = new_job_id(), NOW - ago
        key = clip_key("clip_" + job_id.removeprefix("job_"), "token")
        fields: dict[str, Any] = {
            "job_id": job_id,
            "request_id": "request-1",
            "state": JobState.SUCCEEDED,
            "created_at": at,
            "at": dict.fromkeys((JobState.QUEUED, JobState.PREPARING, JobState.RUNNING, JobState.SUCCEEDED), at),
            "attempt_token": "token",
            "request": REQUEST,
            "parameters": RANDOM_WAN.resolve(REQUEST),
            "model": "wan-random",
            "prompt_hash": "hash",
            "result": RenderedClip(key=key, size_bytes=1, sha256="0" * 64, timings=Timings()),
        }
        record = JobRecord(**(fields | changes))
        jobs.create(record)
        store.put(key, b"clip")
        store.put(thumbnail_key(key), b"thumbnail")
        if record.state.is_terminal:
            jobs.file_as_done(record)
        return record

    return make


def keys(store: LocalStore, prefix: str) -> list[str]:
    return [stat.key for stat in store.list(prefix).stats]


def test_jobs_that_ended_long_ago_are_deleted_with_their_clips_and_others_are_not(
    upkeep: Upkeep, ended: Ended, jobs: JobRecords, store: LocalStore
) -> None:
    old = [
        ended(KEPT + timedelta(hours=n + 1), principal=name) for n, name in enumerate(["a", "a-b", "a.b", "anonymous"])
    ]
    young = ended(KEPT - timedelta(hours=1))

    assert upkeep.delete_expired_jobs(KEPT) == 4
    for record in old:
        with pytest.raises(Deleted):
            jobs.get(record.job_id)
    assert jobs.get(young.job_id)[0] == young
    assert {key.split("/")[1] for key in keys(store, "clips/")} == {young.clip_id}
    assert upkeep.delete_expired_jobs(KEPT) == 0


def test_a_job_that_ran_for_long_is_kept_from_its_end_on(upkeep: Upkeep, ended: Ended) -> None:
    ended(KEPT + timedelta(hours=1), at={JobState.QUEUED: NOW, JobState.SUCCEEDED: NOW - timedelta(hours=1)})
    assert upkeep.delete_expired_jobs(KEPT) == 0


def test_a_job_whose_webhook_waits_is_kept(upkeep: Upkeep, ended: Ended) -> None:
    ended(KEPT * 2, webhook=WebhookDelivery(url="https://example.com/"))
    assert upkeep.delete_expired_jobs(KEPT) == 0


def test_at_most_so_many_are_deleted_in_one_round(upkeep: Upkeep, ended: Ended) -> None:
    for _ in range(5):
        ended(KEPT * 2)
    assert [upkeep.delete_expired_jobs(KEPT, limit=2) for _ in range(4)] == [2, 2, 1, 0]


def test_a_tombstone_is_forgotten_after_its_time(
    upkeep: Upkeep, ended: Ended, jobs: JobRecords, clock: Clock, store: LocalStore
) -> None:
    record = ended(timedelta(days=1))
    jobs.delete(*jobs.get(record.job_id))
    clock.now += TOMBSTONES_KEPT - timedelta(hours=1)
    assert upkeep.forget_tombstones() == 0
    with pytest.raises(Deleted):
        jobs.get(record.job_id)

    clock.now += timedelta(hours=2)
    assert upkeep.forget_tombstones() == 1
    with pytest.raises(JobNotFound):
        jobs.get(record.job_id)
    assert keys(store, "done/") == []
    assert keys(store, "jobs/") == []


def test_a_tombstone_of_a_batch_s_job_lives_as_long_as_its_batch(
    upkeep: Upkeep, ended: Ended, jobs: JobRecords, clock: Clock
) -> None:
    """The manifest would say that the job has not begun."""
    batch_id = new_batch_id()
    record = ended(timedelta(days=1), job_id=item_id(batch_id, 0), batch_id=batch_id)
    jobs.delete(*jobs.get(record.job_id))
    clock.now += 2 * TOMBSTONES_KEPT

    assert upkeep.forget_tombstones() == 0
    with pytest.raises(Deleted):
        jobs.get(record.job_id)


def test_an_entry_that_a_crash_left_forgets_no_later_tombstone(
    upkeep: Upkeep, ended: Ended, jobs: JobRecords, store: LocalStore, clock: Clock
) -> None:
    """The id was deleted, forgotten, made again under its idempotency key and deleted again."""
    first = ended(timedelta(days=1))
    jobs.delete(*jobs.get(first.job_id))
    (left,) = keys(store, "done/")
    clock.now += TOMBSTONES_KEPT + timedelta(hours=1)
    upkeep.forget_tombstones()
    store.put(left, b"")
    ended(timedelta(0), job_id=first.job_id)
    jobs.delete(*jobs.get(first.job_id))

    assert upkeep.forget_tombstones() == 0
    with pytest.raises(Deleted):
        jobs.get(first.job_id)
    clock.now += TOMBSTONES_KEPT + timedelta(hours=1)
    assert upkeep.forget_tombstones() == 1
    assert keys(store, "done/") == []


def test_objects_of_others_are_not_garbage(upkeep: Upkeep, store: LocalStore, clock: Clock) -> None:
    """A bucket may be shared, and its prefix is empty by default."""
    others = ["clips/holiday.mp4", "clips/holiday/beach.mp4", "clips/clip_" + "1" * 32 + "/notes.txt"]
    for key in others:
        store.put(key, b"not ours")
    clock.now = datetime.now(UTC) + 2 * GARBAGE_AGE

    assert upkeep.collect_garbage(None).deleted == 0
    assert keys(store, "clips/") == sorted(others)


@pytest.mark.parametrize("age", [GARBAGE_AGE * 2, timedelta(0)])
def test_clips_that_no_record_names_are_collected_once_they_are_old(
    upkeep: Upkeep, ended: Ended, jobs: JobRecords, store: LocalStore, tmp_path: Path, clock: Clock, age: timedelta
) -> None:
    kept = ended(timedelta(hours=3))
    running = ended(
        timedelta(hours=3), state=JobState.RUNNING, result=None, attempt_token="now", lease=Lease(owner="someone")
    )
    failed = ended(timedelta(hours=3), state=JobState.FAILED, result=None, at={JobState.FAILED: NOW})
    wanted = {*keys(store, f"clips/{kept.clip_id}/"), clip_key(running.clip_id, "now")}
    garbage = {
        clip_key(kept.clip_id, "lost"),
        clip_key("clip_" + "1" * 32, "orphan"),
        *keys(store, f"clips/{failed.clip_id}/"),
        *keys(store, f"clips/{running.clip_id}/"),
    }
    for key in (wanted | garbage) - set(keys(store, "clips/")):
        store.put(key, b"clip")
    for key in wanted | garbage:
        os.utime(tmp_path / key, ((clock.now - age).timestamp(),) * 2)

    deleted, cursor = 0, None
    while True:
        swept = upkeep.collect_garbage(cursor, limit=2)
        deleted, cursor = deleted + swept.deleted, swept.cursor
        if cursor is None:
            break
    if age:
        assert set(keys(store, "clips/")) == wanted
        assert deleted == len(garbage)
    else:
        assert set(keys(store, "clips/")) == wanted | garbage


def test_batches_that_ended_long_ago_are_deleted_with_all_of_their_jobs(
    upkeep: Upkeep, batches: BatchRecords, store: LocalStore, clock: Clock
) -> None:
    clock.now = NOW - 2 * KEPT
    manifest = BatchManifest(
        batch_id=new_batch_id(),
        request_id="request-1",
        principal="alice",
        created_at=clock.now,
        model="wan-random",
        total=1,
        request_digest="0" * 64,
    )
    item = BatchItem(request=REQUEST, parameters=RANDOM_WAN.resolve(REQUEST))
    batches.create(manifest, item.model_dump_json().encode() + b"\n")
    clock.now = NOW
    assert upkeep.delete_expired_batches(KEPT) == 0  # it has not ended

    counts = BatchCounts(queued=0, running=0, succeeded=1, failed=0, cancelled=0)
    batches.end(manifest, BatchSummary(counts=counts, ended_at=NOW - KEPT - timedelta(hours=1)))
    assert upkeep.delete_expired_batches(KEPT) == 1
    with pytest.raises(BatchDeleted):
        batches.head(manifest.batch_id)
    assert keys(store, "batch-index/") == []
    assert upkeep.delete_expired_batches(KEPT) == 0
