"""API keys over HTTP: who gets in, who owns what, and the limits of a key. Pages of other origins."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from answers import assert_nothing_of_the_inside, problem_of
from api_under_test import Api, open_api
from support import LogLines

from schemas.errors import Problem
from serve_graph.api.auth import Authenticator
from serve_graph.api_keys import ApiKeys, Principal, Role, new_key

ALICE, ALICE_LINE = new_key("alice")
BOB, BOB_LINE = new_key("bob", max_waiting_jobs=1, requests_per_minute=5)
MONITOR, MONITOR_LINE = new_key("monitor", Role.MONITOR)
KEYS = ApiKeys(f"{ALICE_LINE} {BOB_LINE} {MONITOR_LINE}")
BODY = {"prompt": "an otter on a bicycle"}
ASYNC = {"Prefer": "respond-async"}
PROTECTED = [
    ("POST", "/generate"),
    ("GET", "/jobs/job_" + "0" * 32),
    ("GET", "/outputs/clip_" + "0" * 32),
    ("HEAD", "/outputs/clip_" + "0" * 32),
    ("GET", "/models"),
    ("GET", "/nowhere"),
    ("DELETE", "/generate"),
]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
async def api(tmp_path: Path, log: LogLines) -> AsyncIterator[Api]:
    """The API with three keys."""
    async with open_api(tmp_path / "store", log, authenticator=Authenticator(KEYS, protect_monitoring=False)) as opened:
        yield opened


@pytest.mark.parametrize(("method", "path"), PROTECTED)
async def test_without_a_key_there_is_a_401_that_asks_for_one(api: Api, method: str, path: str) -> None:
    answer = await api.http.request(method, path)

    if method != "HEAD":
        problem_of(answer, 401, "unauthorized")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="wan-serve"'


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "Bearer wan_wrong", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x", f"Bearer {ALICE[:-1]}"],
    ids=["empty", "no key", "empty key", "wrong", "another scheme", "no scheme", "one more", "one less"],
)
async def test_a_wrong_key_is_a_401_that_says_so(api: Api, authorization: str) -> None:
    answer = await api.http.post("/generate", json=BODY, headers={"Authorization": authorization})

    problem_of(answer, 401, "unauthorized")
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    assert api.jobs.job_records() == []


async def test_a_stranger_s_body_is_not_read(api: Api) -> None:
    problem_of(await api.http.post("/generate", content=b"x" * 100_000), 401, "unauthorized")
    problem_of(await api.http.post("/generate", content=b"not json"), 401, "unauthorized")


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_a_key_makes_clips(api: Api, scheme: str) -> None:
    answer = await api.http.post("/generate", json=BODY, headers={"Authorization": f"{scheme} {ALICE}"})

    assert answer.status_code == 200
    clip = answer.json()
    assert api.jobs.record(clip["job_id"]).principal == "alice"
    assert (await api.http.get(clip["output_url"])).status_code == 200  # the URL is enough


async def test_another_s_job_and_clip_are_404s_like_none(api: Api) -> None:
    clip = (await api.http.post("/generate", json=BODY, headers=bearer(ALICE))).json()
    paths = {f"/jobs/{clip['job_id']}": "job-not-found", f"/outputs/{clip['clip_id']}": "clip-not-found"}

    for path, name in paths.items():
        assert (await api.http.get(path, headers=bearer(ALICE))).status_code in {200, 307}
        answer = await api.http.get(path, headers=bearer(BOB))
        other = await api.http.get(path[:-4] + "0000", headers=bearer(BOB))
        assert _without_id(problem_of(answer, 404, name)) == _without_id(problem_of(other, 404, name))
        assert_nothing_of_the_inside(answer, "alice")


async def test_a_running_job_of_another_is_a_404(api: Api) -> None:
    api.jobs.worker.gates["prepare"].close()
    job = (await api.http.post("/generate", json=BODY, headers=bearer(ALICE) | ASYNC)).json()

    problem_of(await api.http.get(f"/jobs/{job['job_id']}", headers=bearer(BOB)), 404, "job-not-found")
    api.jobs.worker.gates["prepare"].open()
    await api.jobs.service.wait(job["job_id"], Principal("alice"))


async def test_a_monitor_s_key_reads_and_makes_nothing(api: Api) -> None:
    for path in ("/health", "/metrics", "/models", "/health/live"):
        assert (await api.http.get(path, headers=bearer(MONITOR))).status_code == 200
    problem_of(await api.http.post("/generate", json=BODY, headers=bearer(MONITOR)), 403, "forbidden")
    problem_of(await api.http.get(PROTECTED[1][1], headers=bearer(MONITOR)), 403, "forbidden")
    assert api.jobs.job_records() == []


async def test_a_key_s_waiting_jobs_are_limited_and_no_one_else_s(api: Api) -> None:
    api.jobs.worker.gates["prepare"].close()
    first = await api.http.post("/generate", json=BODY, headers=bearer(BOB) | ASYNC)
    refused = await api.http.post("/generate", json=BODY, headers=bearer(BOB) | ASYNC)
    other = await api.http.post("/generate", json=BODY, headers=bearer(ALICE) | ASYNC)

    assert (first.status_code, other.status_code) == (202, 202)
    assert problem_of(refused, 429, "quota-exceeded").retry_after_s is not None
    api.jobs.worker.gates["prepare"].open()
    for answer, name in ((first, "bob"), (other, "alice")):
        await api.jobs.service.wait(answer.json()["job_id"], Principal(name))
    assert (await api.http.post("/generate", json=BODY, headers=bearer(BOB))).status_code == 200


async def test_a_key_s_requests_per_minute_are_limited_and_no_one_else_s(api: Api) -> None:
    statuses = [(await api.http.get("/models", headers=bearer(BOB))).status_code for _ in range(5)]
    refused = await api.http.get("/models", headers=bearer(BOB))

    assert statuses == [200] * 5
    problem = problem_of(refused, 429, "rate-limited")
    assert problem.retry_after_s is not None
    assert 1 <= problem.retry_after_s <= 60
    assert (await api.http.get("/models", headers=bearer(ALICE))).status_code == 200


async def test_health_and_metrics_are_open_until_they_are_protected(tmp_path: Path, log: LogLines, api: Api) -> None:
    for path in ("/health", "/metrics", "/health/live", "/health/ready", "/openapi.json", "/docs"):
        assert (await api.http.get(path)).status_code == 200
    closed = Authenticator(KEYS, protect_monitoring=True)
    async with open_api(tmp_path / "other", log, authenticator=closed) as protected:
        for path in ("/health", "/metrics"):
            problem_of(await protected.http.get(path), 401, "unauthorized")
            assert (await protected.http.get(path, headers=bearer(MONITOR))).status_code == 200
        for path in ("/health/live", "/health/ready"):
            assert (await protected.http.get(path)).status_code == 200


async def test_no_key_is_in_a_log_line_a_metric_or_a_record(api: Api) -> None:
    for key in (ALICE, "wan_wrong"):
        await api.http.post("/generate", json=BODY, headers=bearer(key))
    metrics = (await api.http.get("/metrics")).text
    records = "".join(api.jobs.store.get(key).body.decode() for key in api.jobs.job_records())

    assert '"principal": "alice"' in api.log.text
    for text in (api.log.text, metrics, records):
        assert ALICE not in text
        assert "wan_wrong" not in text
        assert ALICE_LINE.split(":")[1] not in text


# ---- pages of other origins

PAGE = "https://app.example.com"


async def test_no_page_of_another_origin_may_read_by_default(api: Api) -> None:
    answer = await api.http.get("/health", headers={"Origin": PAGE})

    assert "access-control-allow-origin" not in answer.headers


async def test_a_configured_origin_may_call_and_read_errors(tmp_path: Path, log: LogLines) -> None:
    closed = Authenticator(KEYS, protect_monitoring=False)
    async with open_api(tmp_path / "store", log, authenticator=closed, cors_origins=[PAGE]) as opened:
        asking = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,prefer",
        }
        preflight = await opened.http.options("/generate", headers=asking)
        refused = await opened.http.post("/generate", json=BODY, headers={"Origin": PAGE})
        other = await opened.http.get("/health", headers={"Origin": "https://evil.example.com"})

    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE
    assert "retry-after" in refused.headers["access-control-expose-headers"].lower()
    assert "access-control-allow-origin" not in other.headers


def _without_id(problem: Problem) -> Problem:
    return problem.model_copy(update={"request_id": None, "job_id": None})


async def test_the_document_asks_for_a_key_where_the_service_does(tmp_path: Path, log: LogLines, api: Api) -> None:
    def asking(document: dict[str, Any]) -> set[str]:
        paths = document["paths"].items()
        return {path for path, item in paths for operation in item.values() if "security" in operation}

    jobs = {"/generate", "/jobs", "/jobs/{job_id}", "/jobs/{job_id}/events", "/jobs/{job_id}/cancel"}
    videos = {"/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content"}
    batches = {"/batches", "/batches/{batch_id}", "/batches/{batch_id}/results", "/batches/{batch_id}/cancel"}
    made = {*jobs, *batches, *videos, "/outputs/{clip_id}", "/models"}
    assert asking((await api.http.get("/openapi.json")).json()) == made
    closed = Authenticator(KEYS, protect_monitoring=True)
    async with open_api(tmp_path / "closed", log, authenticator=closed) as protected:
        assert asking((await protected.http.get("/openapi.json")).json()) == made | {"/health", "/metrics"}
    async with open_api(tmp_path / "open", log) as without:
        assert asking((await without.http.get("/openapi.json")).json()) == set()
