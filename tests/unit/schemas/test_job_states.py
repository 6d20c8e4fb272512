"""Job states, ids and records."""

import json
import re
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError
from random_wan import RANDOM_WAN

from schemas.jobs import TRANSITIONS, JobRecord, JobState, clip_id_of, job_id_of, new_job_id
from schemas.requests import GenerateRequest

TERMINAL = {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DELETED}


def test_transitions_cover_every_state() -> None:
    assert set(TRANSITIONS) == set(JobState)


@pytest.mark.parametrize("state", JobState)
def test_an_ended_job_can_only_be_deleted(state: JobState) -> None:
    assert state.is_terminal == (state in TERMINAL)
    assert state.is_terminal == (TRANSITIONS[state] <= {JobState.DELETED})


@pytest.mark.parametrize("state", sorted(set(JobState) - TERMINAL))
def test_a_job_may_fail_or_be_cancelled_from_every_state_before_its_end(state: JobState) -> None:
    assert {JobState.FAILED, JobState.CANCELLED} <= TRANSITIONS[state]


def test_a_job_succeeds_only_after_it_was_queued_prepared_and_run() -> None:
    assert leads_to(JobState.SUCCEEDED) == {JobState.RUNNING}
    assert leads_to(JobState.RUNNING) == {JobState.PREPARING}


def test_another_attempt_is_prepared_and_run_as_the_first_one_was() -> None:
    assert leads_to(JobState.PREPARING) == {JobState.QUEUED, JobState.PREPARING, JobState.RUNNING}


def leads_to(wanted: JobState) -> set[JobState]:
    return {state for state, following in TRANSITIONS.items() if wanted in following}


def test_only_a_job_that_somebody_owned_goes_back_in_line() -> None:
    assert leads_to(JobState.QUEUED) == {state for state in JobState if state.is_owned}


def test_new_job_id_is_128_random_bits() -> None:
    ids = {new_job_id() for _ in range(100)}

    assert len(ids) == 100
    assert all(re.fullmatch(r"job_[0-9a-f]{32}", job_id) for job_id in ids)


def test_clip_id_names_its_job() -> None:
    job_id = new_job_id()

    assert re.fullmatch(r"clip_[0-9a-f]{32}", clip_id_of(job_id))
    assert job_id_of(clip_id_of(job_id)) == job_id


def test_job_record_round_trips_through_json() -> None:
    record = _record()

    assert JobRecord.model_validate_json(record.model_dump_json()) == record


def test_job_record_refuses_an_unknown_field() -> None:
    document = json.loads(_record().model_dump_json()) | {"surprise": 1}

    with pytest.raises(ValidationError, match="surprise"):
        JobRecord.model_validate_json(json.dumps(document))


def _record() -> JobRecord:
    request = GenerateRequest(prompt="a red circle", duration=1.0, guidance_scale=1.5)
    return JobRecord(
        job_id=new_job_id(),
        request_id="request-1",
        state=JobState.QUEUED,
        created_at=datetime(2026, 11, 5, tzinfo=UTC),
        at={JobState.QUEUED: datetime(2026, 11, 5, tzinfo=UTC)},
        attempt_token="0123456789abcdef",
        request=request,
        parameters=RANDOM_WAN.resolve(request),
        model="wan-random",
        prompt_hash="0" * 16,
    )
