"""Each process of the service is killed in the middle of twenty requests. `-s` shows the figures."""

import concurrent.futures
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from polling import until

from schemas.errors import PROBLEM_MEDIA_TYPE, Problem
from storage.job_records import JobRecords
from storage.local import LocalStore
from tests.integration.load import Outcome, report, run, send, wait_running
from tests.integration.service import HASTY, RunningService

SLOW_STEPS = {"prompt": "an otter", "num_frames": 81, "resolution": "128p", "num_inference_steps": 100}
ADDRESS = re.compile(r"\b\d{1,3}(\.\d{1,3}){3}\b")
Tell = Callable[[str, str], None]


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    service = RunningService(tmp_path_factory.mktemp("victim"), deployments=[HASTY]).wait_ready()
    yield service
    service.stop()


@pytest.fixture(scope="module")
def usual(victim: RunningService) -> list[Outcome]:
    """The same requests with nothing in their way."""
    return run(victim)


def records(service: RunningService) -> JobRecords:
    return JobRecords(LocalStore(service.folder / "store"))


def proxy(service: RunningService) -> psutil.Process:
    (found,) = [p for p in service.family() if "ProxyActor" in " ".join(p.cmdline())]
    return found


def left_over(service: RunningService) -> str:
    store = LocalStore(service.folder / "store")
    found = [JobRecords(store).get(stat.key[5:-5])[0] for stat in store.list("jobs/").stats]
    named = {record.result.key for record in found if record.result is not None}
    orphans = {stat.key for stat in store.list("clips/").stats} - named
    return f"{Counter(record.state.value for record in found)}, {len(orphans)} orphans"


@pytest.mark.parametrize("deployment", ["Generator", "Preprocessor"])
def test_killed_worker_costs_no_job(victim: RunningService, usual: list[Outcome], deployment: str, tell: Tell) -> None:
    outcomes = run(victim, victim.replica(deployment).kill)
    recorded = [records(victim).get(outcome.clip["job_id"])[0] for outcome in outcomes]
    begun_anew = sum(record.attempts - 1 for record in recorded)
    tell("faults", f"{report(deployment, outcomes, usual)}; attempts begun anew {begun_anew}")

    assert [outcome.clip["sha256"] for outcome in outcomes] == [outcome.clip["sha256"] for outcome in usual]
    assert {refusal for outcome in outcomes for refusal in outcome.refusals} <= {"model-not-ready", "worker-lost"}
    assert all(record.result is not None for record in recorded)
    for outcome in outcomes:
        assert httpx.get(outcome.clip["output_url"], timeout=30).status_code == 200
    assert {line["state"] for line in victim.log("job")} == {"succeeded"}
    assert begun_anew >= (deployment == "Generator")  # text is encoded too quickly to be sure of a hit
    assert list((victim.folder / "data" / "spool").rglob("job_*")) == []


@pytest.mark.parametrize("part", ["Ingress", "Proxy"])
def test_killed_front_serves_the_next_request(
    victim: RunningService, usual: list[Outcome], part: str, tell: Tell
) -> None:
    process = proxy(victim) if part == "Proxy" else victim.replica(part)
    outcomes = run(victim, process.kill)
    tell("faults", f"{report(part, outcomes, usual)}; {left_over(victim)}")

    assert [outcome.clip["sha256"] for outcome in outcomes] == [outcome.clip["sha256"] for outcome in usual]


def assert_tells_nothing(answer: httpx.Response) -> None:
    for word in ("pid", "ActorDied", "actor", "ray", "Traceback", "Path '"):
        assert word not in answer.text, answer.text
    assert ADDRESS.search(answer.text) is None, answer.text


def test_what_a_client_reads_when_the_ingress_is_lost_says_nothing_of_the_inside(victim: RunningService) -> None:
    def post() -> httpx.Response:
        with victim.client(timeout_s=120) as http:
            return http.post("/generate", json=SLOW_STEPS, headers={"X-Request-ID": "lost-1"})

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post)
        while httpx.get(victim.base + "/health", timeout=30).json()["queue"]["running"] == 0:
            pass
        victim.replica("Ingress").kill()
        lost = waiting.result()
    assert (lost.status_code, lost.headers["content-type"]) == (503, PROBLEM_MEDIA_TYPE)
    assert int(lost.headers["retry-after"]) >= 1
    problem = Problem.model_validate_json(lost.content)
    assert problem.type == "urn:wan-serve:problem:worker-lost"
    assert lost.headers.get_list("x-request-id") == [problem.request_id] == ["lost-1"]
    assert_tells_nothing(lost)
    with victim.client() as http:
        while (ready := http.get("/health/ready")).status_code != 200:
            assert (ready.status_code, ready.headers["content-type"]) == (503, PROBLEM_MEDIA_TYPE)
            assert_tells_nothing(ready)
            video = http.get("/v1/videos")  # the proxy answers while there is no ingress, in OpenAI's form here
            assert video.status_code == 200 or video.json()["error"]["type"] == "server_error"
        assert http.post("/generate", json={"prompt": "again"}).status_code == 200


def test_hung_generator_is_replaced_and_its_job_tried_again(victim: RunningService, tell: Tell) -> None:
    hung = victim.replica("Generator")  # looked for now, since the job may be short
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, victim, 7)
        wait_running(victim)
        hung.suspend()
        outcome = sent.result()
    tell("faults", f"hung generator: answered after {outcome.seconds:.1f} s; refusals {outcome.refusals}")
    assert outcome.clip["seed"] == 7
    assert outcome.refusals == []
    assert victim.wait_log("job_retried", job_id=outcome.clip["job_id"])["error"] == "worker-lost"
    assert httpx.get(victim.base + "/health", timeout=30).json()["last_error"]["error"] == "worker-lost"
    assert psutil.wait_procs([hung], timeout=30)[1] == []
    assert victim.replica("Generator").pid != hung.pid


def test_hung_device_thread_is_noticed_and_its_process_replaced(tmp_path: Path, tell: Tell) -> None:
    """Every step takes longer than a hang is allowed to; the process itself answers all the time."""
    service = RunningService(tmp_path, deployments=[HASTY], engine={"hang_timeout_s": 0.005}).wait_ready()
    try:
        before = service.replica("Generator")
        began = time.monotonic()
        with service.client() as http:
            requests = [SLOW_STEPS] * 8  # work for longer than Serve takes to notice
            batch = http.post("/batches", json={"requests": requests}).json()["batch_id"]
            retried = service.wait_log("job_retried")
            tell("faults", f"hung device thread: attempt begun anew after {time.monotonic() - began:.1f} s")
            assert retried["error"] == "worker-lost"
            assert psutil.wait_procs([before], timeout=10)[1] == []
            until(lambda: len(service.log("model_loaded")) == 2, "another generator")
            assert http.post(f"/batches/{batch}/cancel").status_code in (200, 202)
    finally:
        service.stop()
