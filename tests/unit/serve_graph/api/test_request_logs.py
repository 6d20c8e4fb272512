"""The log and the metrics of requests: one line each, and what may never be in one."""

from urllib.parse import urlsplit

import pytest
from answers import problem_of
from api_under_test import Api
from prometheus_client.parser import text_string_to_metric_families

from schemas.clips import Clip
from schemas.errors import OutOfMemory

PROMPT = "a secret otter in a red boat"
NEGATIVE = "blurry walrus"
QUERY = "token=hunter2"


async def sample(api: Api, name: str, **labels: str) -> float | None:
    """The value of one sample of /metrics, as a Prometheus would read it."""
    text = (await api.http.get("/metrics")).text
    for family in text_string_to_metric_families(text):
        for found in family.samples:
            if found.name == name and labels.items() <= found.labels.items():
                return found.value
    return None


async def test_generate_logs_one_request_and_one_job_line(api: Api) -> None:
    answer = await api.http.post("/generate", json={"prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": 7})
    clip = Clip.model_validate_json(answer.content)

    (request,), (job,) = api.log.of("request"), api.log.of("job")
    assert (
        request.items()
        >= {
            "level": "info",
            "request_id": clip.request_id,
            "job_id": clip.job_id,
            "method": "POST",
            "route": "/generate",
            "status": 200,
        }.items()
    )
    assert request["time"]
    assert request["duration_s"] >= 0
    assert request["prompt_hash"] == job["prompt_hash"] == api.jobs.record(clip.job_id).prompt_hash
    assert request["parameters"]["seed"] == 7
    assert job["job_id"] == clip.job_id
    assert job["state"] == "succeeded"


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/health/live", "/health/live", 200),
        ("GET", "/jobs/job_" + "0" * 32, "/jobs/{job_id}", 404),
        ("GET", "/outputs/clip_" + "0" * 32, "/outputs/{clip_id}", 404),
        ("GET", "/outputs/clip_" + "0" * 32 + "/x.mp4", "/outputs/{clip_id}/{name}", 403),
        ("GET", "/nothing/" + "otter", "unmatched", 404),
        ("DELETE", "/generate", "/generate", 405),
        ("POST", "/generate", "/generate", 422),
        ("GET", "/docs", "/docs", 200),
        ("GET", "/health/", "unmatched", 404),
    ],
)
async def test_every_request_logs_one_line_with_its_route(
    api: Api, method: str, path: str, route: str, status: int
) -> None:
    answer = await api.http.request(method, f"{path}?{QUERY}")

    assert answer.status_code == status
    (line,) = api.log.of("request")
    assert (line["method"], line["route"], line["status"]) == (method, route, status)
    assert "hunter2" not in api.log.text
    assert "otter" not in api.log.text


async def test_a_refused_request_logs_its_problem(api: Api) -> None:
    await api.http.post("/generate", json={"prompt": PROMPT, "num_frames": 80})

    (line,) = api.log.of("request")
    assert (line["status"], line["error"], line["level"]) == (422, "invalid-request", "info")


async def test_a_failed_job_logs_its_problem_in_both_lines(api: Api) -> None:
    api.jobs.worker.failures["running"] = OutOfMemory()
    answer = await api.http.post("/generate", json={"prompt": PROMPT})

    problem = problem_of(answer, 500, "out-of-memory")
    (request,), (job,) = api.log.of("request"), api.log.of("job")
    assert (request["error"], request["level"], request["job_id"]) == ("out-of-memory", "error", problem.job_id)
    assert (job["error"], job["state"]) == ("out-of-memory", "failed")


async def test_a_large_body_is_logged_under_its_problem(api: Api) -> None:
    await api.http.post("/generate", content=b" " * 70_000)

    (line,) = api.log.of("request")
    assert (line["status"], line["error"]) == (413, "body-too-large")


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("POST", "/generate", "/generate"),
        ("POST", "/jobs/job_" + "0" * 32, "/jobs/{job_id}"),  # the method is none of its own
        ("HEAD", "/outputs/clip_" + "0" * 32, "/outputs/{clip_id}"),
        ("GET", "/outputs/clip_" + "0" * 32 + "/x.mp4", "/outputs/{clip_id}/{name}"),
        ("GET", "/openapi.json", "/openapi.json"),
        ("GET", "/docs", "/docs"),
        ("POST", "/nothing", "unmatched"),
    ],
)
async def test_a_large_body_is_logged_and_counted_under_its_route(api: Api, method: str, path: str, route: str) -> None:
    answer = await api.http.request(method, path, content=b" " * 70_000)

    assert answer.status_code == 413
    (line,) = api.log.of("request")
    assert line["route"] == route
    assert await sample(api, "wan_http_requests_total", route=route, method=method, status="413") == 1


async def test_logs_never_hold_a_prompt_or_a_signature(api: Api, capfd: pytest.CaptureFixture[str]) -> None:
    body = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    clip = Clip.model_validate_json((await api.http.post("/generate", json=body)).content)
    signature = dict(pair.split("=") for pair in urlsplit(clip.output_url).query.split("&"))["signature"]
    await api.http.get(clip.output_url)
    await api.http.get(clip.output_url.replace(signature, signature[::-1]))
    await api.http.post("/generate", json={**body, "num_frames": 80})
    await api.http.post("/generate", json={"prompt": [PROMPT], PROMPT: 1})
    await api.http.post("/generate", content=f'{{"prompt": "{PROMPT}"'.encode())
    api.jobs.worker.failures["prepare"] = RuntimeError(PROMPT)
    await api.http.post("/generate", json=body)

    captured = capfd.readouterr()
    everything = api.log.text + captured.out + captured.err
    assert len(api.log.of("request")) == 7
    for word in ("otter", "walrus", signature, signature[::-1], "signature", "expires", str(api.jobs.store.folder)):
        assert word not in everything, word


async def test_metrics_parse_as_prometheus_text(api: Api) -> None:
    await api.http.post("/generate", json={"prompt": PROMPT})
    answer = await api.http.get("/metrics")

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {"wan_http_requests", "wan_jobs", "wan_jobs_waiting"} <= families.keys()
    for family in families.values():
        assert all({"deployment", "replica"} <= found.labels.keys() for found in family.samples)
    assert "otter" not in answer.text


async def test_metrics_count_requests_by_route_method_and_status(api: Api) -> None:
    await api.http.post("/generate", json={"prompt": PROMPT})
    await api.http.post("/generate", json={"prompt": PROMPT, "num_frames": 80})
    for n in range(3):
        await api.http.get(f"/nothing/{n}")

    count = "wan_http_requests_total"
    assert await sample(api, count, route="/generate", method="POST", status="200") == 1
    assert await sample(api, count, route="/generate", method="POST", status="422") == 1
    assert await sample(api, count, route="unmatched", method="GET", status="404") == 3
    assert await sample(api, "wan_http_request_duration_seconds_count", route="/generate") == 2
