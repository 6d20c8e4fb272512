"""The whole graph on real Ray, over HTTP, as a client sees it."""

import concurrent.futures
import contextlib
import hashlib
import selectors
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import av
import httpx
import pytest
from async_jobs import events
from prometheus_client.parser import text_string_to_metric_families

from schemas.clips import Clip
from schemas.jobs import Job, JobState
from tests.integration.service import RunningService

PROMPT = "a red circle moving left"
LONG = {"num_frames": 81, "num_inference_steps": 100, "guidance_scale": 2.0}


def generate(service: RunningService, **fields: Any) -> Clip:
    with service.client() as http:
        answer = http.post("/generate", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 200, answer.text
    return Clip.model_validate_json(answer.content)


def fetch(url: str) -> httpx.Response:
    return httpx.get(url, timeout=30)


def test_generate_answers_a_clip_whose_url_gives_its_bytes(service: RunningService) -> None:
    clip = generate(service, seed=11, duration=0.5, fps=8, resolution="64p", aspect_ratio="16:9")
    answer = fetch(clip.output_url)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "video/mp4"
    assert hashlib.sha256(answer.content).hexdigest() == clip.sha256
    assert len(answer.content) == clip.size_bytes
    assert (clip.seed, clip.num_frames, clip.duration, clip.prompt) == (11, 5, 0.5, PROMPT)
    with av.open(BytesIO(answer.content)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 8
    assert [frame.shape for frame in frames] == [(64, 112, 3)] * 5
    timings = clip.timings
    assert timings.total >= timings.denoise + timings.decode > 0
    assert PROMPT.encode() not in answer.content


def test_generate_draws_and_reports_a_seed_that_makes_the_same_clip_again(service: RunningService) -> None:
    drawn = generate(service, reproducible=True)
    assert generate(service, reproducible=True, seed=drawn.seed).sha256 == drawn.sha256
    assert generate(service, reproducible=True, seed=drawn.seed + 1).sha256 != drawn.sha256


def test_each_preset_is_told_with_what_it_took(service: RunningService) -> None:
    exact, balanced, fast = (generate(service, preset=preset, seed=3) for preset in ("exact", "balanced", "fast"))

    assert [clip.preset for clip in (exact, balanced, fast)] == ["exact", "balanced", "fast"]
    assert exact.reproducible
    assert exact.sha256 == generate(service, reproducible=True, seed=3).sha256
    forwards = [clip.effort.forwards for clip in (exact, balanced, fast) if clip.effort is not None]
    assert forwards[0] == 2 * exact.num_inference_steps
    assert forwards[0] > forwards[1] > forwards[2]


def test_output_url_expires_and_a_new_one_works(service: RunningService) -> None:
    clip = generate(service, url_ttl_s=2)
    assert fetch(clip.output_url).status_code == 200
    while time.time() < clip.expires_at.timestamp():
        time.sleep(0.05)  # the clock is what expires it
    late = fetch(clip.output_url)
    assert (late.status_code, late.json()["type"]) == (403, "urn:wan-serve:problem:url-expired")
    renewed = httpx.get(f"{service.base}/outputs/{clip.clip_id}", follow_redirects=False, timeout=30)
    assert renewed.status_code == 307
    assert fetch(renewed.headers["location"]).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.split("?")[0],
        lambda url: url.replace("expires=", "expires=9"),
        lambda url: url[:-1] + ("0" if url[-1] != "0" else "1"),
        lambda url: url.replace(".mp4?", "0.mp4?"),
    ],
    ids=["query stripped", "expiry changed", "signature changed", "key changed"],
)
def test_output_url_is_refused_when_it_was_changed(service: RunningService, change: Any) -> None:
    answer = fetch(change(generate(service).output_url))
    assert (answer.status_code, answer.json()["type"]) == (403, "urn:wan-serve:problem:url-invalid")


def test_reproducible_clip_is_the_same_alone_and_among_seven_strangers(service: RunningService) -> None:
    wanted = {"seed": 5, "reproducible": True, "num_inference_steps": 30}
    alone = generate(service, **wanted)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        strangers = [pool.submit(generate, service, seed=100 + i, num_inference_steps=30) for i in range(7)]
        among = pool.submit(generate, service, **wanted)
        assert among.result().sha256 == alone.sha256
        assert len({future.result().sha256 for future in strangers}) == 7


def test_clip_shared_with_strangers_stays_within_the_parity_bound(service: RunningService) -> None:
    alone = frames_of(generate(service, seed=6, num_inference_steps=30))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        shared = [pool.submit(generate, service, seed=6, num_inference_steps=30) for _ in range(8)]
        for future in shared:
            frames = frames_of(future.result())
            # float32 noise of 1e-6 can tip a pixel's rounding; x264 spreads that over a few levels
            assert abs(frames.astype(int) - alone.astype(int)).mean() < 0.5


def frames_of(clip: Clip) -> Any:
    import numpy as np

    with av.open(BytesIO(fetch(clip.output_url).content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_concurrent_requests_share_forwards(service: RunningService) -> None:
    before = samples(service)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: generate(service, seed=seed, num_inference_steps=50), range(8)))
    after = samples(service)
    forwards = after["wan_forwards_total", "cond"] - before["wan_forwards_total", "cond"]
    assert forwards < 8 * 50


def samples(service: RunningService) -> dict[tuple[str, str], float]:
    text = httpx.get(service.base + "/metrics", timeout=30).text
    families = text_string_to_metric_families(text)
    return {(s.name, s.labels.get("kind", "")): s.value for family in families for s in family.samples}


def test_respond_async_answers_the_job_and_reports_its_progress(service: RunningService) -> None:
    with service.client() as http:
        answer = http.post("/generate", json={"prompt": PROMPT, **LONG}, headers={"Prefer": "respond-async"})
        assert answer.status_code == 202
        assert answer.headers["preference-applied"] == "respond-async"
        job = Job.model_validate_json(http.get(answer.headers["location"]).content)
        seen = list(events(http, job.job_id))
    assert seen[-1].state is JobState.SUCCEEDED
    assert seen[-1].clip is not None
    assert fetch(seen[-1].clip.output_url).status_code == 200
    steps = [job.progress.step for job in seen if job.progress is not None and job.progress.stage == "denoise"]
    assert steps == sorted(steps)
    assert len(set(steps)) > 1  # how many depends on how often the events are told
    assert any(job.progress is not None and job.progress.seconds_left is not None for job in seen)


def test_client_that_goes_away_cancels_its_job(service: RunningService) -> None:
    body = b'{"prompt":"gone","num_frames":81,"num_inference_steps":100,"resolution":"128p"}'
    request_id = "the-one-that-goes"
    head = (
        f"POST /generate HTTP/1.1\r\nhost: x\r\nx-request-id: {request_id}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(head.encode() + body)
        while httpx.get(service.base + "/health", timeout=30).json()["queue"]["running"] == 0:
            pass
    job = service.wait_log("job", request_id=request_id)
    assert (job["state"], job["error"]) == ("cancelled", "job-cancelled")
    assert httpx.get(service.base + "/health", timeout=30).json()["queue"]["running"] == 0


@contextlib.contextmanager
def waiting_clients(service: RunningService, count: int) -> Iterator[None]:
    """So many connections, each waiting for a long clip; closing them cancels the jobs."""
    body = b'{"prompt":"wait","num_frames":81,"num_inference_steps":100,"resolution":"128p"}'
    head = (
        f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with contextlib.ExitStack() as connections, selectors.DefaultSelector() as answered:

        def connect() -> None:
            connection = connections.enter_context(socket.create_connection(("127.0.0.1", service.port)))
            connection.sendall(head.encode() + body)
            answered.register(connection, selectors.EVENT_READ)

        def again() -> None:
            """A busy machine may answer some with a 503 that says to try again."""
            for key, _ in answered.select(timeout=0):
                answered.unregister(key.fileobj)
                connect()

        for _ in range(count):
            connect()
        wait_for_jobs(service, count, meanwhile=again)
        yield
    wait_for_jobs(service, 0)


def wait_for_jobs(service: RunningService, count: int, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Until exactly none, or at least `count`, jobs are waiting or running."""
    with service.client() as http:
        while True:
            queue = http.get("/health").json()["queue"]
            jobs = queue["waiting"] + queue["running"]
            if jobs == count or 0 < count <= jobs:
                return
            meanwhile()


def test_health_answers_while_300_clients_wait(service: RunningService) -> None:
    with waiting_clients(service, 300), service.client() as http:
        answers = [http.get("/health") for _ in range(20)]
    assert {answer.json()["status"] for answer in answers} == {"ok"}
    slowest = max(answer.elapsed.total_seconds() for answer in answers)
    print(f"\nslowest of 20 /health answers beside 300 waiting clients: {slowest * 1000:.0f} ms")


def test_request_beyond_the_capacity_gets_429_with_retry_after(service: RunningService) -> None:
    enough = 100  # more than the generator holds and than end meanwhile
    with waiting_clients(service, 320), service.client() as http:
        codes = []
        while 429 not in codes and len(codes) < enough:
            answer = http.post("/generate", json={"prompt": "one more", **LONG}, headers={"Prefer": "respond-async"})
            codes.append(answer.status_code)
    assert codes[-1] == 429, codes
    assert answer.json()["type"] == "urn:wan-serve:problem:queue-full"
    assert int(answer.headers["retry-after"]) == answer.json()["retry_after_s"] >= 1


def test_metrics_pass_promtool_and_tell_about_every_deployment(service: RunningService) -> None:
    generate(service)
    answer = httpx.get(service.base + "/metrics", timeout=30)
    families = list(text_string_to_metric_families(answer.text))
    deployments = {s.labels["deployment"] for family in families for s in family.samples}
    assert deployments == {"Ingress", "Preprocessor", "Generator"}
    promtool = shutil.which("promtool")
    if promtool is not None:
        checked = subprocess.run([promtool, "check", "metrics"], input=answer.text, capture_output=True, text=True)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_log_has_one_line_per_request_and_job_and_no_prompt(service: RunningService) -> None:
    prompt = "an unmistakable zebra prompt"
    with service.client() as http:
        answer = http.post("/generate", json={"prompt": prompt}, headers={"X-Request-ID": "log-test-1"})
    signature = answer.json()["output_url"].split("signature=")[1]
    fetch(answer.json()["output_url"])
    request = service.wait_log("request", request_id="log-test-1")
    job = service.wait_log("job", request_id="log-test-1")
    assert answer.headers.get_list("x-request-id") == ["log-test-1"]
    assert (request["status"], request["route"], request["method"]) == (200, "/generate", "POST")
    assert request["prompt_hash"] == job["prompt_hash"]
    assert job["state"] == "succeeded"
    assert [line["request_id"] for line in service.log("request")].count("log-test-1") == 1
    service.wait_log("request", route="/outputs/{clip_id}/{name}")
    assert prompt not in service.output()
    assert "zebra" not in service.output()
    assert signature not in service.output()


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "problem"),
    [
        ("POST", "/generate", b"{}", 422, "invalid-request"),
        ("POST", "/generate", b"not json", 422, "invalid-request"),
        ("POST", "/generate", b'{"prompt":"' + b"a" * 70_000 + b'"}', 413, "body-too-large"),
        ("POST", "/generate", b'{"prompt":"' + b"zq " * 600 + b'"}', 422, "prompt-too-long"),
        ("GET", "/nothing", b"", 404, "route-not-found"),
        ("PUT", "/generate", b"{}", 405, "method-not-allowed"),
        ("GET", "/outputs/clip_0123456789abcdef0123456789abcdef", b"", 404, "clip-not-found"),
        ("GET", "/outputs/..%2f..%2fetc%2fpasswd", b"", 404, "route-not-found"),
        ("GET", "/jobs/job_0123456789abcdef0123456789abcdef", b"", 404, "job-not-found"),
    ],
)
def test_bad_input_is_a_problem_document_through_the_proxy(
    service: RunningService, method: str, path: str, content: bytes, status: int, problem: str
) -> None:
    with service.client() as http:
        answer = http.request(method, path, content=content, headers={"content-type": "application/json"})
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, answer.json()["type"]) == (status, "urn:wan-serve:problem:" + problem)
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
