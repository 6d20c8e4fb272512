"""Everything under /jobs over HTTP, and what `POST /generate` makes of `Prefer: wait=N` and `Idempotency-Key`."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from answers import problem_of
from api_under_test import Api
from support import PATIENCE_S

from schemas.clips import Clip
from schemas.jobs import Job, JobPage, JobState
from serve_graph.api import job_routes
from serve_graph.api.job_routes import MAX_RETRY_AFTER_S

BODY = {"prompt": "a red circle moving left", "seed": 7}
ASYNC = {"prefer": "respond-async"}


async def submit(api: Api, headers: dict[str, str] = ASYNC) -> Job:
    answer = await api.http.post("/generate", json=BODY, headers=headers)
    assert answer.status_code == 202, answer.text
    return Job.model_validate_json(answer.content)


async def running(api: Api) -> Job:
    """A job that runs until the gate is opened."""
    gate = api.jobs.worker.gates["running"]
    gate.close()
    job = await submit(api)
    await gate.reached()
    return job


async def ended(api: Api) -> Job:
    """A job that succeeded and is filed."""
    answer = await api.http.post("/generate", json=BODY)
    job_id = answer.json()["job_id"]
    async with asyncio.timeout(PATIENCE_S):
        while not api.jobs.store.list("done/").stats:  # noqa: ASYNC110  # what is waited for is in a store
            await asyncio.sleep(0.01)
    return Job.model_validate_json((await api.http.get(f"/jobs/{job_id}")).content)


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The jobs that a stream of events held."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in answer.text.split("\n\n") if block and not block.startswith(":")]
    for block in blocks:
        assert block.startswith("event: job\ndata: ")
    return [json.loads(block.partition("data: ")[2]) for block in blocks]


# ---- status


async def test_a_job_that_has_not_ended_says_when_to_look_again(api: Api) -> None:
    job = await running(api)
    answer = await api.http.get(f"/jobs/{job.job_id}")
    assert 1 <= int(answer.headers["retry-after"]) <= MAX_RETRY_AFTER_S
    api.jobs.worker.gates["running"].open()
    await api.jobs.service.wait(job.job_id)

    answer = await api.http.get(f"/jobs/{job.job_id}")
    assert "retry-after" not in answer.headers
    assert answer.json()["state"] == "succeeded"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")],
)
async def test_an_unknown_job_is_a_404(api: Api, method: str, path: str) -> None:
    for job_id in ("job_" + "0" * 32, "job_x", "clip_" + "0" * 32):
        problem_of(await api.http.request(method, f"/jobs/{job_id}{path}"), 404, "job-not-found")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")],
)
async def test_a_deleted_job_is_a_410(api: Api, method: str, path: str) -> None:
    job = await ended(api)
    answer = await api.http.delete(f"/jobs/{job.job_id}")
    assert (answer.status_code, answer.content) == (204, b"")

    problem_of(await api.http.request(method, f"/jobs/{job.job_id}{path}"), 410, "job-gone")
    problem_of(await api.http.get(f"/outputs/{job.job_id.replace('job_', 'clip_')}"), 410, "clip-gone")


# ---- lists


async def test_a_list_is_read_page_by_page(api: Api) -> None:
    made = [(await ended(api)).job_id for _ in range(3)]
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = JobPage.model_validate_json((await api.http.get("/jobs", params={"limit": "2", **after})).content)
        seen += [job.job_id for job in page.jobs]
        if page.next_cursor is None:
            break
        after = {"after": page.next_cursor}

    assert seen == made[::-1]
    page = JobPage.model_validate_json((await api.http.get("/jobs?state=failed")).content)
    assert page.jobs == ()


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("after=x", "after"),
        *((query, "query." + query.partition("=")[0]) for query in ("limit=0", "limit=101", "limit=x", "state=x")),
    ],
)
async def test_a_list_refuses_what_it_can_not_read(api: Api, query: str, field: str) -> None:
    problem = problem_of(await api.http.get(f"/jobs?{query}"), 422, "invalid-request")
    assert problem.errors is not None
    assert [error.field for error in problem.errors] == [field]


# ---- cancel and delete


async def test_cancel_is_a_200_that_says_how_the_job_ended(api: Api) -> None:
    job = await running(api)
    for _ in range(2):
        answer = await api.http.post(f"/jobs/{job.job_id}/cancel")
        assert answer.status_code == 200
        assert answer.json()["state"] == "cancelled"
    api.jobs.worker.gates["running"].open()

    done = await ended(api)
    answer = await api.http.post(f"/jobs/{done.job_id}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")


async def test_delete_of_a_running_job_is_a_409(api: Api) -> None:
    job = await running(api)
    problem_of(await api.http.delete(f"/jobs/{job.job_id}"), 409, "job-not-ended")
    api.jobs.worker.gates["running"].open()
    await api.jobs.service.wait(job.job_id)


# ---- events


async def test_events_tell_of_the_state_at_once_and_of_one_end(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_routes, "HEARTBEAT_S", 0.02)
    job = await running(api)
    asking = asyncio.create_task(api.http.get(f"/jobs/{job.job_id}/events"))
    await asyncio.sleep(0.1)
    api.jobs.worker.gates["running"].open()
    answer = await asking

    seen = [Job.model_validate(event) for event in events_of(answer)]
    assert seen[0].state is JobState.RUNNING
    assert [event.state for event in seen].count(JobState.SUCCEEDED) == 1
    assert seen[-1].clip is not None
    assert any(line.startswith(":") for line in answer.text.splitlines())  # a heartbeat
    assert answer.headers["cache-control"] == "no-store"


async def test_events_of_a_service_that_stopped_are_a_503(api: Api) -> None:
    """It ended in a RuntimeError."""
    job = await ended(api)
    await api.jobs.service.drain(PATIENCE_S)

    problem_of(await api.http.get(f"/jobs/{job.job_id}/events"), 503, "shutting-down")


async def test_events_end_when_the_job_is_deleted_meanwhile(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an answer was cut off, with a failure in the log."""
    monkeypatch.setattr("serve_graph.jobs.following.LOOK_INTERVAL_S", 0.2)
    job = await running(api)
    await api.jobs.service.drain(0)
    stored, etag = api.jobs.records.get(job.job_id)
    stored, etag = api.jobs.records.transition(stored, etag, JobState.PREPARING)
    api.jobs.service._running.drained.clear()
    asking = asyncio.create_task(api.http.get(f"/jobs/{job.job_id}/events"))
    await asyncio.sleep(0.1)
    stored, etag = api.jobs.records.transition(stored, etag, JobState.CANCELLED)
    api.jobs.records.delete(stored, etag)

    assert [event["state"] for event in events_of(await asking)] == ["preparing"]
    assert api.log.of("request_failed") == []


# ---- Prefer: wait=N


async def test_wait_gives_the_clip_when_it_is_there_in_time(api: Api) -> None:
    answer = await api.http.post("/generate", json=BODY, headers={"prefer": "wait=20"})

    assert answer.status_code == 200
    Clip.model_validate_json(answer.content)


@pytest.mark.parametrize("prefer", ["wait=0", "wait=1"])
async def test_wait_gives_the_job_when_the_time_is_over_and_it_goes_on(api: Api, prefer: str) -> None:
    gate = api.jobs.worker.gates["running"]
    gate.close()
    answer = await api.http.post("/generate", json=BODY, headers={"prefer": prefer})
    assert answer.status_code == 202
    job = Job.model_validate_json(answer.content)
    assert answer.headers["location"] == f"/jobs/{job.job_id}"
    assert answer.headers["preference-applied"] == prefer
    gate.open()

    assert (await api.jobs.service.wait(job.job_id)).job_id == job.job_id


# ---- Idempotency-Key


async def test_a_key_gives_the_same_clip_again_and_refuses_another_body(api: Api) -> None:
    headers = {"idempotency-key": "order-66"}
    first, again = [await api.http.post("/generate", json=BODY, headers=headers) for _ in range(2)]
    other = await api.http.post("/generate", json={"prompt": "a heron"}, headers=headers)

    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json()["job_id"] == again.json()["job_id"]
    assert len(api.jobs.worker.tasks) == 1
    problem_of(other, 422, "idempotency-mismatch")


async def test_a_key_of_a_deleted_job_is_a_410(api: Api) -> None:
    headers = {"idempotency-key": "order-66"}
    job = await submit(api, ASYNC | headers)
    await api.jobs.service.wait(job.job_id)
    await api.http.delete(f"/jobs/{job.job_id}")

    problem_of(await api.http.post("/generate", json=BODY, headers=headers), 410, "job-gone")


@pytest.mark.parametrize("key", ["", "with space", "x" * 256, "t\u00e4st"])
async def test_a_key_that_is_none_is_refused(api: Api, key: str) -> None:
    headers = {b"idempotency-key": key.encode("latin-1")}
    problem = problem_of(await api.http.post("/generate", json=BODY, headers=headers), 422, "invalid-request")

    assert problem.errors is not None
    assert problem.errors[0].field == "Idempotency-Key"
    assert api.jobs.job_records() == []


async def test_two_keys_at_once_are_refused(api: Api) -> None:
    headers = [("idempotency-key", "one"), ("idempotency-key", "two")]
    problem_of(await api.http.post("/generate", json=BODY, headers=headers), 422, "invalid-request")
