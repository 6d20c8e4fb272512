"""One data folder through five deaths of the whole service and an orderly stop: what clients and jobs make of it.

The tests follow one another: each takes the service as the one before has left it.
"""

import concurrent.futures
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from async_jobs import PROMPT, events, submit
from load import wait_running
from polling import until
from service import RunningService

from schemas.jobs import Job, JobState
from schemas.requests import GenerateRequest
from serve_graph.client import WanClient
from serve_graph.open_ports import free_port

PROMPTS = 200
KILLS = 4
"""After the first."""
QUEUE = {"lease_s": 3.0, "drain_timeout_s": 0.5}
LONG = {"num_inference_steps": 60, "num_frames": 81}

pytestmark = pytest.mark.timeout(600)
Tell = Callable[[str, str], None]


class Lasting:
    """A service at one address with one folder, however often it is started. kills: how often it was killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.kills = folder, free_port(), 0
        self.start()

    def start(self) -> None:
        self.service = RunningService(self.folder, port=self.port, queue=QUEUE).wait_ready()

    def kill(self) -> None:
        """SIGKILL to the service and to all of Ray, at once."""
        parent = psutil.Process(self.service.process.pid)
        family = [parent, *parent.children(recursive=True)]
        for process in family:
            process.suspend()
        for process in family:
            process.kill()
        psutil.wait_procs(family, 20)
        self.service.stop(signal.SIGKILL)
        self.kills += 1


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lasting]:
    made = Lasting(tmp_path_factory.mktemp("lasting"))
    yield made
    made.service.stop()


def start_batch(folder: Path, base: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serve_graph.cli", "batch", "prompts.jsonl", "-o", "out", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "WAN_URL": base}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def succeeded(service: RunningService) -> list[str]:
    """Jobs, by the service's log."""
    return [line["job_id"] for line in service.log("job") if line["state"] == "succeeded"]


def test_a_batch_whose_client_and_service_are_killed_half_way_makes_every_clip_once(
    lasting: Lasting, tmp_path: Path, tell: Tell
) -> None:
    """A client that waits for a single job meanwhile hears of nothing."""
    lines = [json.dumps({"prompt": f"circle {n}", "seed": n, "num_frames": 5}) for n in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    client = start_batch(tmp_path, lasting.service.base)
    while len(list((tmp_path / "out").glob("*.mp4"))) < PROMPTS // 2:
        assert client.poll() is None, client.communicate()
    with concurrent.futures.ThreadPoolExecutor(1) as pool, WanClient(lasting.service.base, patience_s=120) as waiting:
        seen: list[Job] = []
        running = threading.Event()

        def look(job: Job) -> None:
            seen.append(job)
            if job.progress is not None:
                running.set()

        job = waiting.submit(GenerateRequest(prompt="a long one", priority="high", seed=1, **LONG))
        followed = pool.submit(waiting.wait, job.job_id, look)
        assert running.wait(60)
        client.kill()
        client.communicate()
        lasting.kill()
        before = succeeded(lasting.service)
        fetched = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.mp4")}

        client = start_batch(tmp_path, lasting.service.base)  # it waits for the service
        lasting.start()
        printed, errors = client.communicate(timeout=300)
        ended = followed.result(90)
    after = succeeded(lasting.service)

    assert (ended.state, seen[-1]) == (JobState.SUCCEEDED, ended)
    assert client.returncode == 0, errors
    assert json.loads(printed)["clips"] == PROMPTS
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == [f"{n:05d}.mp4" for n in range(PROMPTS)]
    assert {path: path.stat().st_ino for path in fetched} == fetched  # none of them was fetched again
    assert max(Counter(before + after).values()) == 1
    assert len(clips(lasting)) == PROMPTS + 1
    tell("batch of 200, both ends killed", f"{len(fetched)} clips fetched before, {PROMPTS - len(fetched)} after")


def clips(lasting: Lasting) -> set[Path]:
    return set((lasting.folder / "store" / "clips").rglob("*.mp4"))


def test_each_job_gets_its_clip_through_kills_of_the_whole_service(lasting: Lasting, tell: Tell) -> None:
    """The clip that it would have got without the kills, and no more than that lies in the store."""
    dice = random.Random(5)  # no secret
    acknowledged: dict[str, Job] = {}
    there = clips(lasting)
    with lasting.service.client() as http:
        wanted = http.post("/generate", json={"prompt": PROMPT, "seed": 11, "reproducible": True}).json()["sha256"]
    for kill in range(KILLS):
        with lasting.service.client() as http:
            for number in range(4):
                fields = {"seed": 11, "reproducible": True} if number == 0 else LONG
                job = submit(http, f"{kill}-{number}", **fields)
                acknowledged[job.job_id] = job
        wait_running(lasting.service)
        time.sleep(dice.uniform(0.0, 0.4))  # the kill comes at a random moment
        lasting.kill()
        lasting.start()
    with lasting.service.client() as http:
        ended = {job_id: list(events(http, job_id))[-1] for job_id in acknowledged}
    assert {job.state for job in ended.values()} == {JobState.SUCCEEDED}
    assert all(ended[job_id].parameters == job.parameters for job_id, job in acknowledged.items())
    same = [job.clip.sha256 for job in ended.values() if job.clip and job.parameters.reproducible]
    assert same == [wanted] * KILLS
    attempts = sum(job.attempts for job in ended.values())
    until(lambda: not list((lasting.folder / "store").glob("active/*/*")), "an empty index of active jobs", 30)
    assert len(clips(lasting) - there) == len(ended) + 1
    assert list((lasting.folder / "data" / "spool").rglob("*.mp4")) == []
    tell(
        "faults",
        f"whole service, SIGKILL: {lasting.kills} kills, {PROMPTS} jobs of a batch and {len(ended) + 1} others "
        f"acknowledged, lost 0, committed twice 0; {attempts} attempts for {len(ended)} of them, "
        f"{len(same)} reproducible ones with the same bytes",
    )


def test_a_stop_hands_over_to_the_next_start(lasting: Lasting) -> None:
    """Its drain is short; whoever waits for a job is told, with its id."""
    with lasting.service.client(timeout_s=120) as http, concurrent.futures.ThreadPoolExecutor(3) as pool:
        clip = http.post("/generate", json={"prompt": "kept"}).json()
        job = submit(http, resolution="128p", **LONG)
        posted = [
            pool.submit(http.post, "/generate", json={"prompt": PROMPT, "resolution": "128p", **LONG}) for _ in range(3)
        ]
        wait_running(lasting.service, 4)
        family = lasting.service.family()
        assert lasting.service.stop() == 0
        answers = [answer.result() for answer in posted]
    record = json.loads((lasting.folder / "store" / "jobs" / f"{job.job_id}.json").read_text())
    assert (record["state"], record["lease"]) == ("queued", None)
    assert [answer.status_code for answer in answers] == [503] * 3
    assert {answer.json()["type"] for answer in answers} == {"urn:wan-serve:problem:shutting-down"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
    assert len(lasting.service.log("job_handed_back")) == 4
    assert psutil.wait_procs(family, timeout=10)[1] == []

    lasting.start()
    with lasting.service.client() as http:
        last = list(events(http, job.job_id))[-1]
    assert (last.state, last.attempts) == (JobState.SUCCEEDED, 2)
    kept = httpx.get(f"{lasting.service.base}/outputs/{clip['clip_id']}", follow_redirects=True, timeout=30)
    assert (kept.status_code, len(kept.content)) == (200, clip["size_bytes"])
