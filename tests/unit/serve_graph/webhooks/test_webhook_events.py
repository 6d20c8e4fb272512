"""What a job that ended says, and what it never says."""

from datetime import UTC, datetime, timedelta

import pytest
from random_wan import RANDOM_WAN

from schemas.jobs import JobRecord, JobState, new_job_id
from schemas.requests import GenerateRequest
from schemas.webhooks import webhook_id
from serve_graph.webhooks.events import job_event

BEGAN = datetime(2026, 11, 25, 12, tzinfo=UTC)
ENDED = BEGAN + timedelta(minutes=1)
PROMPT = "a secret otter"


def record(state: JobState) -> JobRecord:
    request = GenerateRequest(prompt=PROMPT, webhook_url="https://example.com/secret-path")
    return JobRecord(
        job_id=new_job_id(),
        request_id="r1",
        state=state,
        created_at=BEGAN,
        at={JobState.QUEUED: BEGAN, state: ENDED},
        attempt_token="token",
        request=request,
        parameters=RANDOM_WAN.resolve(request),
        model=RANDOM_WAN.name,
        prompt_hash="hash",
    )


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (JobState.SUCCEEDED, "video.completed"),
        (JobState.FAILED, "video.failed"),
        (JobState.CANCELLED, "video.cancelled"),
    ],
)
def test_job_event_says_what_ended_how_and_when(state: JobState, kind: str) -> None:
    ended = record(state)

    assert job_event(ended).model_dump(mode="json") == {
        "type": kind,
        "timestamp": "2026-11-25T12:01:00Z",
        "data": {"id": ended.job_id, "state": state.value, "request_id": "r1"},
    }


def test_job_event_is_the_same_from_the_record_that_was_read_back() -> None:
    ended = record(JobState.FAILED)
    read_back = JobRecord.model_validate_json(ended.model_dump_json())

    assert job_event(read_back).model_dump_json() == job_event(ended).model_dump_json()
    assert webhook_id(read_back.job_id) == webhook_id(ended.job_id) == f"msg_{ended.job_id}"


def test_job_event_holds_no_prompt_and_no_url() -> None:
    assert "secret" not in job_event(record(JobState.SUCCEEDED)).model_dump_json()


@pytest.mark.parametrize("state", [state for state in JobState if not state.is_terminal])
def test_job_event_refuses_a_job_that_goes_on(state: JobState) -> None:
    with pytest.raises(ValueError, match="no event yet"):
        job_event(record(state))
