"""What a client reads when the ingress itself is lost: Serve's proxy answers, and says nothing of the inside."""

import concurrent.futures
import re
from pathlib import Path

import httpx

from schemas.errors import PROBLEM_MEDIA_TYPE, Problem
from tests.integration.service import RunningService

JOB = {"prompt": "a blue square", "num_frames": 81, "num_inference_steps": 100, "resolution": "128p"}
ADDRESS = re.compile(r"\b\d{1,3}(\.\d{1,3}){3}\b")


def post(service: RunningService) -> httpx.Response:
    with service.client(timeout_s=120) as http:
        return http.post("/generate", json=JOB, headers={"X-Request-ID": "lost-1"})


def assert_tells_nothing(answer: httpx.Response) -> None:
    for word in ("pid", "ActorDied", "actor", "ray", "Traceback", "Path '"):
        assert word not in answer.text, answer.text
    assert ADDRESS.search(answer.text) is None, answer.text


def test_killed_ingress_is_a_problem_and_the_next_request_works(tmp_path: Path) -> None:
    service = RunningService(tmp_path).wait_ready()
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post, service)
            while httpx.get(service.base + "/health", timeout=30).json()["queue"]["running"] == 0:
                pass
            service.replica("Ingress").kill()
            lost = waiting.result()
        assert (lost.status_code, lost.headers["content-type"]) == (503, PROBLEM_MEDIA_TYPE)
        assert int(lost.headers["retry-after"]) >= 1
        problem = Problem.model_validate_json(lost.content)
        assert problem.type == "urn:wan-serve:problem:worker-lost"
        assert lost.headers.get_list("x-request-id") == [problem.request_id] == ["lost-1"]
        assert_tells_nothing(lost)
        with service.client() as http:
            while (ready := http.get("/health/ready")).status_code != 200:
                assert (ready.status_code, ready.headers["content-type"]) == (503, PROBLEM_MEDIA_TYPE)
                assert_tells_nothing(ready)
                video = http.get("/v1/videos")  # the proxy answers while there is no ingress, in OpenAI's form here
                assert video.status_code == 200 or video.json()["error"]["type"] == "server_error"
            assert http.post("/generate", json={"prompt": "again"}).status_code == 200
    finally:
        service.stop()
