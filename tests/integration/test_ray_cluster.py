"""Two Ray nodes on this machine with the graph of configs/cluster.yaml, on an S3 server: a node goes, a node is lost.

Only what a laptop lacks is changed, by the environment: the model is the tiny one on the CPU, the GPUs are numbers.
"""

import json
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from polling import until
from prometheus_client.parser import text_string_to_metric_families
from random_wan import model_variables
from ray_cluster.control import RayCluster
from s3_servers.ministack import BUCKETS
from s3_servers.process import S3Server

from schemas.batches import Batch, BatchResult
from schemas.jobs import Job, JobState
from serve_graph.api_keys import new_key

TOTAL = 40
LEASE_S = 5.0
DRAIN_S = 3_900
"""As in configs/rayservice.yaml's preStop hook."""

pytestmark = pytest.mark.timeout(900)

TITLE = "two Ray nodes"

Tell = Callable[[str, str], None]


class Client:
    """One caller, through either node's proxy."""

    def __init__(self, key: str) -> None:
        self._http = httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def close(self) -> None:
        self._http.close()

    def get(self, url: str) -> httpx.Response:
        answer = self._http.get(url)
        assert answer.status_code == 200, answer.text
        return answer

    def submit_batch(self, base: str, num_inference_steps: int = 50, num_frames: int = 33) -> str:
        common = {"num_inference_steps": num_inference_steps, "num_frames": num_frames}
        lines = "".join(
            json.dumps({"prompt": f"number {index}", "seed": index, **common}) + "\n" for index in range(TOTAL)
        )
        media_type = {"content-type": "application/x-ndjson"}
        answer = self._http.post(base + "/batches", content=lines.encode(), headers=media_type)
        assert answer.status_code == 202, answer.text
        return Batch.model_validate_json(answer.content).batch_id

    def submit(self, base: str, prompt: str) -> str:
        body = {"prompt": prompt, "num_inference_steps": 50, "width": 128, "height": 128, "num_frames": 81}
        answer = self._http.post(base + "/generate", json=body, headers={"Prefer": "respond-async"})
        assert answer.status_code == 202, answer.text
        return Job.model_validate_json(answer.content).job_id

    def batch(self, base: str, batch_id: str) -> Batch:
        return Batch.model_validate_json(self.get(f"{base}/batches/{batch_id}").content)

    def job(self, base: str, job_id: str) -> Job:
        return Job.model_validate_json(self.get(f"{base}/jobs/{job_id}").content)

    def batch_jobs(self, base: str, batch_id: str) -> list[Job]:
        answer = self.get(f"{base}/jobs?batch={batch_id}&limit=100").json()
        return [Job.model_validate(job) for job in answer["jobs"]]

    def results(self, base: str, batch_id: str) -> list[BatchResult]:
        lines = self.get(f"{base}/batches/{batch_id}/results").text.splitlines()
        return [BatchResult.model_validate_json(line) for line in lines]


@pytest.fixture(scope="module")
def api_key() -> tuple[str, str]:
    return new_key("alice")


@pytest.fixture(scope="module")
def cluster(
    ministack: S3Server, api_key: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RayCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    environment = {
        "WAN_DATA_DIR": str(folder / "data"),
        **model_variables(),
        "WAN_MODEL__DEVICE": "cpu",
        "WAN_MODEL__TEXT_DTYPE": "auto",
        "WAN_TEXT__NUM_THREADS": "1",
        "WAN_QUEUE__LEASE_S": str(LEASE_S),
        "WAN_STORAGE__CREATE_BUCKET": "true",
        "WAN_STORAGE__S3__ENDPOINT": ministack.endpoint,
        "WAN_STORAGE__S3__BUCKET": f"{BUCKETS}cluster",
        "WAN_S3_ACCESS_KEY": ministack.access_key,
        "WAN_S3_SECRET_KEY": ministack.secret_key,
        "WAN_SIGNING_SECRET": "the same on every machine",
        "WAN_API_KEYS": api_key[1],
    }
    running = RayCluster(folder, environment)
    try:
        running.wait_ready()
        yield running
    finally:
        running.end()


@pytest.fixture(scope="module")
def client(api_key: tuple[str, str]) -> Iterator[Client]:
    made = Client(api_key[0])
    yield made
    made.close()


def has_replicas_on(cluster: RayCluster, nodes: list[int]) -> bool:
    return cluster.tell("replicas") == {"Ingress": nodes, "Preprocessor": nodes, "Generator": nodes}


def test_every_node_answers_for_the_whole_service(cluster: RayCluster, client: Client) -> None:
    until(lambda: has_replicas_on(cluster, [0, 1]), "one replica of each deployment on each node")
    for base in (cluster.base, cluster.other_base):
        assert httpx.get(base + "/health/ready", timeout=30).status_code == 200
        assert httpx.get(base + "/-/healthz", timeout=30).text == "success"
        assert httpx.get(base + "/jobs", timeout=30).status_code == 401
        families = text_string_to_metric_families(client.get(base + "/metrics").text)
        seen = {(sample.labels["deployment"], sample.labels["replica"]) for f in families for sample in f.samples}
        assert sorted(deployment for deployment, _ in seen) == [
            name for name in ("Generator", "Ingress", "Preprocessor") for _ in range(2)
        ]


def test_a_node_that_is_drained_ends_its_jobs_and_another_takes_its_place(
    cluster: RayCluster, client: Client, tell: Tell
) -> None:
    """What a pod's preStop hook does, before its end. The batch is short, so that Serve asks for no third generator."""
    assert cluster.tell("add") == {"added": 2}
    batch_id = client.submit_batch(cluster.base, num_inference_steps=40, num_frames=17)
    until(lambda: client.batch(cluster.base, batch_id).counts.succeeded >= 5, "five jobs of the batch")

    drained = cluster.tell("drain", 1, DRAIN_S)
    cluster.tell("kill", 1)

    seconds_of(client, cluster.base, batch_id)
    until(lambda: has_replicas_on(cluster, [0, 2]), "replicas on the node that stays")
    jobs = client.batch_jobs(cluster.base, batch_id)
    assert [job.state for job in jobs] == [JobState.SUCCEEDED] * TOTAL
    assert {job.attempts for job in jobs} == {1}
    assert not cluster.log("job_retried")
    assert not cluster.log("job_taken_over")
    tell(TITLE, f"a node that was drained had no replica left after {drained['drained_s']:g} s, no job begun anew")


def test_a_batch_and_single_jobs_survive_the_loss_of_a_node(cluster: RayCluster, client: Client, tell: Tell) -> None:
    undisturbed_s = seconds_of(client, cluster.base, client.submit_batch(cluster.other_base))
    batch_id = client.submit_batch(cluster.other_base)
    began = time.time()
    until(lambda: client.batch(cluster.base, batch_id).counts.succeeded >= 3, "three jobs of the batch")
    singles = [client.submit(cluster.other_base, f"single {number}") for number in range(4)]
    until(lambda: running_of(client, cluster.base, singles) >= 2, "two single jobs at work")

    killed = cluster.tell("kill", 2)
    total_s = seconds_of(client, cluster.base, batch_id, began)
    until(lambda: not open_of(client, cluster.base, singles), "the end of the single jobs")

    jobs = client.batch_jobs(cluster.base, batch_id)
    assert [job.state for job in jobs] == [JobState.SUCCEEDED] * TOTAL
    assert len({job.job_id for job in jobs}) == TOTAL
    alone = [client.job(cluster.base, job_id) for job_id in singles]
    assert [job.state for job in alone] == [JobState.SUCCEEDED] * len(singles)
    results = client.results(cluster.base, batch_id)
    assert [result.clip.seed for result in results if result.clip] == list(range(TOTAL))
    clips = [result.clip for result in results] + [job.clip for job in alone]
    assert all(clip is not None and httpx.get(clip.output_url, timeout=30).content[4:8] == b"ftyp" for clip in clips)

    ends = sorted(job.at[JobState.SUCCEEDED].timestamp() - killed["at"] for job in [*jobs, *alone])
    after = [end for end in ends if end > 0]
    taken_over = {line["job_id"] for line in cluster.log("job_taken_over")}
    anew = [job for job in [*jobs, *alone] if job.attempts > 1]
    assert taken_over
    assert {job.job_id for job in alone} & {job.job_id for job in anew}
    tell(
        TITLE, f"batch of {TOTAL}: {undisturbed_s:.1f} s undisturbed, {total_s:.1f} s with a kill (lease {LEASE_S:g} s)"
    )
    tell(TITLE, f"{killed['killed']} processes killed with {len(after)} of {len(ends)} jobs to go")
    tell(TITLE, f"the first job ended {after[0]:.1f} s after the kill, the last {after[-1]:.1f} s")
    tell(TITLE, f"{len(taken_over)} jobs taken over, {len(anew)} begun anew, none lost")

    began = time.time()
    assert cluster.tell("add") == {"added": 3}
    until(lambda: has_replicas_on(cluster, [0, 3]), "replicas on a new node")
    tell(TITLE, f"a new node's replicas were there after {time.time() - began:.1f} s")


def seconds_of(client: Client, base: str, batch_id: str, began: float | None = None) -> float:
    """How long a batch takes from `began`, or from now, to its end."""
    began = began or time.time()
    until(lambda: client.batch(base, batch_id).state == "ended", "the batch's end")
    batch = client.batch(base, batch_id)
    assert batch.counts.succeeded == TOTAL, batch
    return time.time() - began


def running_of(client: Client, base: str, job_ids: list[str]) -> int:
    return sum(client.job(base, job_id).state is JobState.RUNNING for job_id in job_ids)


def open_of(client: Client, base: str, job_ids: list[str]) -> int:
    return sum(not client.job(base, job_id).state.is_terminal for job_id in job_ids)
