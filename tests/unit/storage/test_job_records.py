"""Job records: their life in a store, and what is refused."""

import json
import pickle
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from random_wan import RANDOM_WAN

from schemas.clips import Timings
from schemas.errors import JobNotFound, RenderFailed
from schemas.jobs import TRANSITIONS, JobRecord, JobState, RenderedClip, new_job_id
from schemas.requests import GenerateRequest
from storage.job_records import IllegalTransition, JobRecords, RecordUnreadable
from storage.keys import clip_key, job_key
from storage.local import LocalStore
from storage.store import PreconditionFailed

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
PROMPT = "a secret prompt — mit Ümläuten 🎬"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def records(store: LocalStore) -> JobRecords:
    return JobRecords(store, now=lambda: NOW + timedelta(seconds=1))


def new_record(state: JobState = JobState.QUEUED, **changes: Any) -> JobRecord:
    request = GenerateRequest(prompt=PROMPT, duration=1.0, seed=7)
    fields = {
        "job_id": new_job_id(),
        "request_id": "request",
        "state": state,
        "created_at": NOW,
        "at": {JobState.QUEUED: NOW},
        "attempt_token": "token",
        "request": request,
        "parameters": RANDOM_WAN.resolve(request),
        "model": RANDOM_WAN.name,
        "prompt_hash": "hash",
    }
    return JobRecord(**(fields | changes))


def rendered(record: JobRecord) -> RenderedClip:
    key = clip_key(record.clip_id, record.attempt_token)
    return RenderedClip(key=key, size_bytes=3, sha256="0" * 64, timings=Timings(total=1.5))


def test_get_returns_what_was_created(records: JobRecords) -> None:
    record = new_record()
    etag = records.create(record)
    assert records.get(record.job_id) == (record, etag)


def test_create_refuses_a_second_record(records: JobRecords) -> None:
    record = new_record()
    records.create(record)
    with pytest.raises(PreconditionFailed):
        records.create(record.model_copy(update={"request_id": "second"}))
    assert records.get(record.job_id)[0].request_id == "request"


@pytest.mark.parametrize("job_id", ["job_" + "0" * 32, "", "../../etc/passwd", "job_\x00", "clip_" + "0" * 32])
def test_get_finds_no_job_where_there_is_none(records: JobRecords, job_id: str) -> None:
    with pytest.raises(JobNotFound):
        records.get(job_id)


def test_transition_walks_a_job_to_its_end(records: JobRecords) -> None:
    record = new_record()
    etag = records.create(record)
    for state in (JobState.PREPARING, JobState.RUNNING):
        record, etag = records.transition(record, etag, state)
    record, etag = records.transition(record, etag, JobState.SUCCEEDED, result=rendered(record))
    assert records.get(record.job_id) == (record, etag)
    assert record.result == rendered(record)
    assert record.at == {
        JobState.QUEUED: NOW,
        **dict.fromkeys((JobState.PREPARING, JobState.RUNNING, JobState.SUCCEEDED), NOW + timedelta(seconds=1)),
    }


def test_transition_keeps_the_problem_of_a_failure(records: JobRecords) -> None:
    record = new_record()
    problem = RenderFailed("the encoder failed").problem(job_id=record.job_id)
    records.transition(record, records.create(record), JobState.FAILED, error=problem)
    assert records.get(record.job_id)[0].error == problem


@pytest.mark.parametrize(
    ("from_state", "to_state"), [(a, b) for a in JobState if a is not JobState.DELETED for b in JobState]
)
def test_transition_goes_where_the_table_leads(records: JobRecords, from_state: JobState, to_state: JobState) -> None:
    record = new_record(from_state)
    etag = records.create(record)
    if to_state in TRANSITIONS[from_state] - {JobState.DELETED}:
        assert records.transition(record, etag, to_state)[0].state == to_state
    else:
        with pytest.raises(IllegalTransition, match=f"from {from_state} to {to_state}"):
            records.transition(record, etag, to_state)
        assert records.get(record.job_id) == (record, etag)


def test_transition_is_lost_by_who_comes_second(records: JobRecords) -> None:
    record = new_record()
    etag = records.create(record)
    winner = records.transition(record, etag, JobState.CANCELLED)
    with pytest.raises(PreconditionFailed):
        records.transition(record, etag, JobState.PREPARING)
    assert records.get(record.job_id) == winner


def test_transition_does_not_revive_a_deleted_record(records: JobRecords, store: LocalStore) -> None:
    record = new_record()
    etag = records.create(record)
    store.delete(job_key(record.job_id))
    with pytest.raises(PreconditionFailed):
        records.transition(record, etag, JobState.PREPARING)


def test_write_again_takes_its_own_earlier_write_for_done(records: JobRecords) -> None:
    record = new_record()
    etag = records.create(record)
    moved = records.moved(record, JobState.PREPARING)
    first = records.write(moved, etag)
    with pytest.raises(PreconditionFailed):
        records.write(moved, etag)
    assert records.write(moved, etag, again=True) == first


def test_write_again_is_lost_where_another_came_first(records: JobRecords, store: LocalStore) -> None:
    record = new_record()
    etag = records.create(record)
    records.transition(record, etag, JobState.CANCELLED)
    with pytest.raises(PreconditionFailed):
        records.write(records.moved(record, JobState.PREPARING), etag, again=True)
    store.delete(job_key(record.job_id))
    with pytest.raises(PreconditionFailed):
        records.write(records.moved(record, JobState.PREPARING), etag, again=True)


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.RUNNING])
def test_get_reads_what_version_1_wrote(records: JobRecords, store: LocalStore, state: JobState) -> None:
    """The files are of the code of that time (commit 342826c)."""
    body = (Path(__file__).parent / "records" / f"version_1_{state}.json").read_bytes()
    job_id = json.loads(body)["job_id"]
    store.put(job_key(job_id), body)
    record, etag = records.get(job_id)

    assert (record.state, record.principal, record.request.seed) == (state, "alice", 7)
    assert record.created_at == record.at[JobState.QUEUED] == datetime(2026, 11, 20, 12, 0, 0, 250_000, tzinfo=UTC)
    assert (record.attempts, record.crashes, record.lease, record.idempotent) == (1, 0, None, False)
    assert (record.result is not None) == (state is JobState.SUCCEEDED)
    assert (record.error is not None) == (state is JobState.FAILED)
    records.write(records.amended(record, cancel_requested=True), etag)
    assert records.get(job_id)[0].version == 2


def damaged_bodies() -> dict[str, bytes]:
    good = new_record().model_dump_json().encode()
    return {
        "empty": b"",
        "cut": good[: len(good) // 2],
        "not JSON": PROMPT.encode(),
        "not UTF-8": b'{"prompt": "\xff"}',
        "another shape": b'{"prompt": "a secret prompt"}',
        "an unknown field": good[:-1] + b', "a secret prompt": 1}',
        "an unknown state": good.replace(b'"state":"queued"', b'"state":"a secret prompt"'),
        "a newer version": good.replace(b'"version":1', b'"version":2'),
        "another job's": good,
    }


@pytest.mark.parametrize("damage", damaged_bodies())
def test_get_refuses_a_damaged_record_without_showing_it(records: JobRecords, store: LocalStore, damage: str) -> None:
    record = new_record()
    store.put(job_key(record.job_id), damaged_bodies()[damage])
    with pytest.raises(RecordUnreadable) as refusal:
        records.get(record.job_id)
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None
    assert "secret" not in str(refusal.value) + refusal.value.problem().model_dump_json()
    assert refusal.value.detail.startswith("the job's record can't be read: ")


@pytest.mark.parametrize(
    "error",
    [
        RecordUnreadable("version 2"),
        IllegalTransition(JobState.QUEUED, JobState.RUNNING),
        PreconditionFailed(),
    ],
)
def test_errors_survive_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  # made one expression before
    assert (type(copy), str(copy), copy.args) == (type(error), str(error), error.args)
