"""The deployed service on a Modal on loopback: Modal's real container entry points, a real Ray graph, a real bucket.

Containers stand side by side on this machine, so the Volumes are folders and the GPU is none.

The tests follow one another, since a container's start costs most of what they take: a container that one of them
leaves behind serves the next, and each loss of one has the next take over what it did. `warm` starts one where a test
finds none, so that each can run alone, and after any other's failure.
"""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
import modal
import psutil
import pytest
from modal_loopback import Container, Finished, Loopback
from modal_loopback.calls import Call
from polling import until
from prometheus_client.parser import text_string_to_metric_families
from random_wan import RANDOM_WAN, model_variables
from s3_servers.ministack import BUCKETS
from s3_servers.process import S3Server

from schemas.jobs import Job, JobState
from schemas.model_profile import Resolution
from schemas.requests import GenerateRequest
from serve_graph.api_keys import new_key
from serve_graph.client.wan_client import WanClient

ROOT = Path(__file__).parents[2]
START_S = 300.0
LEASE_S = 3.0
PROMPT = "a red circle moving left"
PROFILE = RANDOM_WAN.model_copy(
    update={
        "resolutions": (
            Resolution(name="64p", aspect_ratio="1:1", width=64, height=64),
            Resolution(name="128p", aspect_ratio="1:1", width=128, height=128),
            Resolution(name="480p", aspect_ratio="1:1", width=96, height=96),
        )
    }
)
"""With a size of the name that `record_480p` asks for, and no more than are asked for, as each start warms them up."""
LONG = {"num_frames": 81, "num_inference_steps": 100, "resolution": "128p"}
"""A render that something else is to happen in."""
SOME_S = {**LONG, "num_inference_steps": 30}
"""Eight of them last for the hundreds of polls that a percentile wants."""

pytestmark = pytest.mark.timeout(600)
Tell = Callable[[str, str], None]


@dataclass(frozen=True)
class Service:
    """A deployed service: its Modal, its front's URL, a key for it, and the deployer's environment."""

    modal: Loopback
    url: str
    key: str
    env: dict[str, str]

    def client(self) -> WanClient:
        return WanClient(self.url, api_key=self.key, patience_s=START_S)

    def http(self, url: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=url or self.url, headers=headers, timeout=START_S, trust_env=False)

    def run(self, command: str, *arguments: str, cwd: Path = ROOT) -> Finished:
        """`modal run` of one of the app's commands. cwd: where it writes."""
        entry_point = ("run", "-m", f"serve_graph.modal_app::{command}", *arguments)
        env = {**self.env, "WAN_API_KEY": self.key, "PYTHONPATH": str(ROOT)}
        return self.modal.cli(*entry_point, env=env, cwd=cwd, timeout_s=START_S)

    def records(self, name: str) -> list[Path]:
        """What a command has put into the Volume."""
        return sorted((self.modal.volume("wan-outputs").folder / "records").glob(f"{name}-*.json"))

    def generators(self) -> list[Container]:
        return self.modal.containers("wan-serve", "Generator")

    def calls(self, work_id: str) -> list[Call]:
        """Those that were made for a job or batch."""
        made = [c for c in self.modal.calls if c.function.name == "Generator" and not c.is_web]
        return [c for c in made if [item.arguments for item in c.inputs] == [((work_id,), {})]]

    def graph_url(self) -> str:
        """Of a container's own ingress."""
        return self.modal.web_url("wan-serve", "Generator", "graph")

    def lose_call(self, work_id: str) -> None:
        """End the call that was made for a job, which waits for a container."""
        (call,) = self.calls(work_id)
        modal.FunctionCall.from_id(call.call_id, client=self.modal.client).cancel()

    def metric(self, name: str, **labels: str) -> float:
        """A sum over all instances, from the front's page."""
        with self.http() as http:
            page = http.get("/metrics").text
        samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


@pytest.fixture(scope="module")
def service(ministack: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("modal")
    key, line = new_key("alice")
    secrets = {
        "wan-s3": {
            "WAN_STORAGE__S3__ENDPOINT": ministack.endpoint,
            "WAN_STORAGE__S3__BUCKET": f"{BUCKETS}modal",
            "WAN_S3_ACCESS_KEY": ministack.access_key,
            "WAN_S3_SECRET_KEY": ministack.secret_key,
        },
        "wan-signing": {"WAN_SIGNING_SECRET": "s" * 64},
        "wan-api-keys": {"WAN_API_KEYS": line},
    }
    env = {
        **model_variables(PROFILE),
        "WAN_DATA_DIR": str(folder / "data"),
        "WAN_WEIGHTS_DIR": str(folder / "weights"),
        "WAN_OUTPUTS_DIR": str(folder / "outputs"),
        "WAN_QUEUE__LEASE_S": str(LEASE_S),
        "WAN_QUEUE__DRAIN_TIMEOUT_S": "1",
    }
    with Loopback(secrets=secrets) as modal:
        done = modal.cli("deploy", "-m", "serve_graph.modal_app", env=env, cwd=ROOT)
        assert done.exit_code == 0, done.output
        yield Service(modal, modal.web_url("wan-serve", "web"), key, env)
        modal.abandon("wan-serve")
        print("".join(text for _, text in modal.app("wan-serve").log))  # shown where a test has failed


@pytest.fixture
def warm(service: Service) -> Service:
    """The service with a generator that is up."""
    if not service.generators():
        service.modal.start("wan-serve", "Generator").wait("ready", START_S)
    return service


def running(client: WanClient, **fields: object) -> Job:
    """A job that denoises just now."""
    job = client.submit(GenerateRequest.model_validate({"prompt": "a long one", **LONG, **fields}))
    until(lambda: client.job(job.job_id).state is JobState.RUNNING, "a job that runs", START_S)
    return job


def processes(container: Container, part: str) -> list[psutil.Process]:
    """The container's processes that have this in their command lines; to be looked for before a job that is short."""
    found = []
    for pid in container.pids():
        with contextlib.suppress(psutil.Error):  # it has ended
            if part in " ".join(psutil.Process(pid).cmdline()):
                found.append(psutil.Process(pid))
    assert found, part
    return found


def check_cancel(client: WanClient) -> None:
    job = running(client)
    ended = client.cancel(job.job_id)
    if not ended.state.is_terminal:
        ended = client.wait(job.job_id)
    assert ended.state is JobState.CANCELLED


def check_batch(client: WanClient) -> None:
    batch = client.submit_batch([GenerateRequest(prompt=PROMPT, seed=number) for number in range(6)])
    until(lambda: client.batch(batch.batch_id).state == "ended", "the batch's end", START_S)
    seen = client.batch(batch.batch_id)
    results = list(client.batch_results(batch.batch_id))
    assert seen.counts.succeeded == 6
    assert [result.clip is not None and result.clip.seed for result in results] == list(range(6))


def test_what_needs_no_model_wakes_no_gpu(service: Service) -> None:
    with service.http() as http:
        health = http.get("/health")
        answers = [http.get(path) for path in ("/health/ready", "/models", "/jobs", "/metrics", "/v1/videos")]

    assert (health.status_code, health.json()["model"]["loaded"]) == (200, False)
    assert {answer.status_code for answer in answers} == {200}
    assert service.generators() == []


def test_coldstart_of_the_real_cli_measures_a_start(service: Service, tmp_path: Path) -> None:
    done = service.run("coldstart", "--count", "1", cwd=tmp_path)

    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out/coldstart.json").read_text())
    assert (record["count"], record["failures"], record["rebuilt"]) == (1, 0, 0)
    assert record["p50_s"] > record["awake_p50_s"] > 0
    assert [json.loads(kept.read_text()) for kept in service.records("coldstart")] == [record]
    assert len(service.generators()) == 1


def test_a_clip(warm: Service) -> None:
    with warm.client() as client:
        clip = client.generate(GenerateRequest(prompt=PROMPT))
        health = client.health()

    assert httpx.get(clip.output_url).content[4:8] == b"ftyp"
    assert (health.model.loaded, health.model.profile) == (True, "wan-random")
    assert len(warm.generators()) == 1


def test_generate_waits_as_long_as_the_front_may_and_then_answers_with_the_job(warm: Service) -> None:
    with warm.http() as http:
        answer = http.post("/generate", json={"prompt": PROMPT, **LONG}, headers={"Prefer": "wait=0"})
        assert answer.status_code == 202
        assert http.get(answer.headers["location"]).json()["job_id"] == answer.json()["job_id"]
        http.post(f"{answer.headers['location']}/cancel").raise_for_status()  # nobody waits for it


def test_a_job_that_runs_is_cancelled_from_the_front(warm: Service) -> None:
    with warm.client() as client:
        check_cancel(client)


def test_a_batch_ends_with_all_of_its_clips(warm: Service) -> None:
    with warm.client() as client:
        check_batch(client)


def test_health_and_polls_answer_beside_four_renders_and_four_waiting_callers(warm: Service, tell: Tell) -> None:
    """Nothing deadlocks with one container at most: who waits does so at the front."""
    with ThreadPoolExecutor(8) as pool, warm.http() as http, warm.client() as client:
        requests = [GenerateRequest.model_validate({"prompt": PROMPT, "seed": seed, **SOME_S}) for seed in range(8)]
        sent = [pool.submit(client.generate, request) for request in requests]
        while http.get("/jobs", params={"state": "running"}).json()["jobs"] == []:
            time.sleep(0.1)  # the pace of a client
        some = http.get("/jobs").json()["jobs"][0]["job_id"]
        seconds: dict[str, list[float]] = {"/health": [], f"/jobs/{some}": []}
        while not all(clip.done() for clip in sent):
            for path, taken in seconds.items():
                began = time.perf_counter()
                assert http.get(path).status_code == 200
                taken.append(time.perf_counter() - began)
        clips = [clip.result() for clip in sent]

    assert sorted(clip.seed for clip in clips) == list(range(8))
    assert len(warm.generators()) == 1
    for path, taken in seconds.items():
        p95 = statistics.quantiles(taken, n=20)[-1]
        name = path.split("/")[1]
        tell(
            "modal",
            f"/{name} beside 4 renders and 4 waiting callers: p95 {1000 * p95:.0f} ms of {len(taken)} (goal 250)",
        )


def test_a_container_s_own_page_and_the_front_s_tell_the_same(warm: Service) -> None:
    with warm.client() as client, warm.http(warm.graph_url()) as own:
        client.generate(GenerateRequest(prompt=PROMPT))
        clip = own.post("/generate", json={"prompt": PROMPT})
        page = own.get("/metrics").text
        assert own.get("/health").json()["model"]["loaded"]

    assert clip.status_code == 200
    rendered = [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "wan_jobs_total" and sample.labels["outcome"] == "succeeded"
    ]
    until(lambda: warm.metric("wan_jobs_total", outcome="succeeded") >= sum(rendered), "the next report", 30)


def test_thaws_answer_soon(warm: Service, tell: Tell) -> None:
    (container,) = warm.generators()
    seconds = []
    with warm.http(warm.graph_url()) as own:
        for _ in range(10):
            container.freeze()
            began = time.perf_counter()
            container.thaw()
            while own.get("/health/ready").status_code != 200:
                time.sleep(0.01)  # the first healthy answer is what is timed
            seconds.append(time.perf_counter() - began)

    tell("modal", f"thaw to the first healthy answer: median {statistics.median(seconds):.2f} s of 10 (goal 1)")


def test_smoke_of_the_real_cli_says_what_works(warm: Service) -> None:
    done = warm.run("smoke", "--url", warm.url)

    assert done.exit_code == 0, done.output
    lines = [line.split(":")[0].split() for line in done.output.splitlines() if line.startswith("ok ")]
    assert lines == [["ok", "health"], ["ok", "generate"], ["ok", "fetch"], ["ok", "expiry"]]


def test_modal_run_makes_clips(warm: Service, tmp_path: Path) -> None:
    """On the deployed service, or with a front and a generator of the run's own."""
    prompts, clips = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text(f"{PROMPT}\na green square moving up\n")
    many = warm.run("batch", "--prompts", str(prompts), "--output", str(clips), "--url", warm.url)
    one = warm.run("main", "--prompt", PROMPT, "--output", str(clips / "one.mp4"))

    assert (many.exit_code, one.exit_code) == (0, 0), many.output + one.output
    made = sorted(clips.glob("*.mp4"))
    assert [clip.name for clip in made] == ["00000.mp4", "00001.mp4", "one.mp4"]
    assert {clip.read_bytes()[4:8] for clip in made} == {b"ftyp"}


def test_record_480p_of_the_real_cli_records_one_clip(warm: Service, tmp_path: Path) -> None:
    done = warm.run("record_480p", cwd=tmp_path)

    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out/record_480p.json").read_text())
    assert (record["num_frames"], record["gpu"], record["floor_fraction"]) == (81, None, None)
    assert record["total_s"] >= record["denoise_s"] > 0
    assert [json.loads(kept.read_text()) for kept in warm.records("record_480p")] == [record]


def test_a_replica_that_is_replaced_is_woken(warm: Service) -> None:
    (container,) = warm.generators()
    with warm.client() as client:
        for replica in ("Generator", "Ingress"):
            (victim,) = processes(container, f"ServeReplica:wan:{replica}")
            job = running(client)
            victim.kill()
            ended = client.wait(job.job_id)
            assert (ended.state, ended.attempts) == (JobState.SUCCEEDED, 2), replica

    assert warm.generators() == [container]


def test_a_container_restored_three_days_later_ends_what_a_stopped_one_hands_back(warm: Service) -> None:
    bob, line = new_key("bob")
    asleep = warm.modal.start("wan-serve", "Generator", asleep=timedelta(days=3)).wait("frozen", START_S)
    with warm.client() as client:
        job = running(client, resolution="64p")
        for container in warm.generators():
            if container is not asleep:
                container.preempt()
                preempted = container
        asleep.thaw(env={"WAN_API_KEYS": line})
        ended = client.wait(job.job_id)
        clip = client.generate(GenerateRequest(prompt=PROMPT))
        check_batch(client)
        check_cancel(client)

    assert ended.state is JobState.SUCCEEDED
    assert httpx.get(clip.output_url).content[4:8] == b"ftyp"
    with warm.http(warm.graph_url()) as own:
        assert own.get("/jobs").status_code == 401
        assert own.get("/jobs", headers={"Authorization": f"Bearer {bob}"}).status_code == 200
    preempted.wait("gone", START_S)
    assert warm.generators() == [asleep]
    assert '"start": "restored"' in asleep.log


def test_a_container_killed_in_a_render_loses_nothing_and_a_broken_restore_is_built_anew(warm: Service) -> None:
    broken = warm.modal.start("wan-serve", "Generator", asleep=timedelta(0)).wait("frozen", START_S)
    for victim in processes(broken, "gcs_server"):
        victim.kill()
    with warm.client() as client:
        job = running(client, resolution="64p")
        for container in warm.generators():
            if container is not broken:
                container.send_kill()
        broken.thaw()
        ended = client.wait(job.job_id)

    assert (ended.state, ended.attempts) == (JobState.SUCCEEDED, 2)
    assert warm.generators() == [broken]
    assert "restore_failed" in broken.log
    until(lambda: warm.metric("wan_container_starts_total", start="rebuilt"), "the count of rebuilt graphs", 30)


def test_a_container_whose_graph_has_died_ends_and_the_sweeper_calls_again_where_calls_are_lost(warm: Service) -> None:
    (container,) = warm.generators()
    with warm.client() as client:
        victims = processes(container, "serve_graph.on_modal.graph_process")
        began = running(client)
        for victim in victims:
            victim.kill()
        container.wait("gone", START_S)
        waiting = client.submit(GenerateRequest(prompt=PROMPT))
        jobs = (began, waiting)
        for job in jobs:
            until(lambda job=job: warm.calls(job.job_id), "its call")  # which the next container would take
            warm.lose_call(job.job_id)
        modal.Function.from_name("wan-serve", "sweep", client=warm.modal.client).spawn()
        ended = [client.wait(job.job_id) for job in jobs]

    assert container.exit_code == 1
    assert [(job.state, job.attempts) for job in ended] == [(JobState.SUCCEEDED, 2), (JobState.SUCCEEDED, 1)]
    assert len(warm.calls(waiting.job_id)) > 1
