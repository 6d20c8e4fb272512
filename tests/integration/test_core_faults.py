"""The service core without Ray: killed, frozen, thawed, in twos on one store. What is acknowledged is done once.

Renders and commits are counted in a log outside the records (`service_core`).
"""

import asyncio
import json
import random
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from polling import until
from s3_servers.ministack import BUCKETS, Ministack
from service_core.control import Core, Nursery, Work, cores, ended_jobs, planned, succeeded

KILLS = 50
CLIENTS = 4
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


class Clients:
    """Threads that submit prompts with idempotency keys, again and again until each is acknowledged."""

    def __init__(self, bases: list[str], *, waiting: bool) -> None:
        self.acknowledged: list[str] = []
        self._bases = bases
        self._waiting = waiting
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        sent = 0
        with httpx.Client(timeout=30) as http:
            while not self._stop.is_set():
                self._submit(http, f"{number}-{sent}", asynchronous=sent % 2 == 0 or not self._waiting)
                sent += 1

    def _submit(self, http: httpx.Client, key: str, *, asynchronous: bool) -> None:
        headers = {"Idempotency-Key": key} | ({"Prefer": "respond-async"} if asynchronous else {})
        for attempt in range(10_000):
            base = self._bases[(hash(key) + attempt) % len(self._bases)]
            try:
                answer = http.post(base + "/generate", json={"prompt": f"prompt {key}"}, headers=headers)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code in (200, 202):
                self.acknowledged.append(answer.json()["job_id"])
                return
            assert answer is None or answer.status_code in (429, 503), answer.text
            if self._stop.is_set():
                return
            time.sleep(0.02)  # the service is down or full: the client asks again


def check_all_done_once(core: Core, acknowledged: list[str]) -> Work:
    """Every acknowledged job has its clip, made by exactly one attempt, and nothing else lies in the store."""
    jobs = ended_jobs(core, acknowledged, PATIENCE_S)
    assert succeeded(jobs) == len(jobs), [job.state for job in jobs if job.error]
    work = Work.read(core)
    assert work.committed_twice == 0
    with httpx.Client(timeout=30) as http:
        for job in jobs:
            assert job.clip is not None
            assert job.clip.output_url.split("?")[0].rpartition("/")[2].removesuffix(".mp4") in work.tried[job.job_id]
            body = http.get(job.clip.output_url.replace(job.clip.output_url.split("/outputs/")[0], core.base)).text
            assert body == f"{job.job_id} {job.parameters.seed}"
    return work


def clips(core: Core) -> list[Path]:
    return list(Path(core.plan.settings["storage"]["folder"]).glob("clips/*/*.mp4"))


def wait_for(what: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    until(what, "what the other process was to do", timeout_s)


def unfiled(core: Core) -> list[Path]:
    """Entries of the active index. One whose job was never recorded stays for a while, as it may yet be."""
    store = Path(core.plan.settings["storage"]["folder"])
    return [e for e in store.glob("active/*/*") if (store / "jobs" / f"{e.name.partition('-')[2]}.json").exists()]


def test_killed_at_random_moments(nursery: Nursery, tmp_path: Path, tell: Callable[[str, str], None]) -> None:
    dice = random.Random(7)  # no secret
    with cores(nursery, 1, tmp_path) as (core,):
        core.start()
        with Clients([core.base], waiting=True) as clients:
            for kill in range(KILLS):  # now and then it lives long enough to take over what its predecessors left
                time.sleep(dice.uniform(0.02, 0.35) if kill % 5 else 1.5)  # the kill comes at a random moment
                core.kill()
                core.start()
        acknowledged = sorted(set(clients.acknowledged))
        work = check_all_done_once(core, acknowledged)
        wait_for(lambda: not unfiled(core))
        made = len(work.tried.keys() | work.committed.keys())
        assert len(clips(core)) == made
    tell(
        "faults",
        f"service core, SIGKILL: {KILLS} kills, {len(acknowledged)} jobs acknowledged, {work.renders} renders begun, "
        f"{work.commits} commits seen, lost 0, committed twice {work.committed_twice}",
    )
    assert len(acknowledged) > KILLS


def test_two_services_on_one_store(nursery: Nursery, tmp_path: Path, tell: Callable[[str, str], None]) -> None:
    """Both take clients; one is killed again and again, the other takes over what it leaves."""
    dice = random.Random(8)  # no secret
    with cores(nursery, 2, tmp_path) as (first, second):
        first.start()
        second.start()
        with Clients([first.base, second.base], waiting=True) as clients:
            for _ in range(8):
                time.sleep(dice.uniform(0.1, 0.4))  # a random moment
                first.kill()
                time.sleep(dice.uniform(0.0, 0.8))  # a random moment
                first.start()
        acknowledged = sorted(set(clients.acknowledged))
        work = check_all_done_once(second, acknowledged)
        wait_for(lambda: not unfiled(second))
        assert len(clips(second)) == len(work.tried.keys() | work.committed.keys())
    tell(
        "faults",
        f"two service cores on one store: {first.kills} kills, {len(acknowledged)} jobs acknowledged, "
        f"{work.renders} renders begun, lost 0, committed twice {work.committed_twice}",
    )


def test_a_frozen_owner_loses_its_jobs_and_writes_nothing_once_thawed(nursery: Nursery, tmp_path: Path) -> None:
    with cores(nursery, 2, tmp_path) as (frozen, other):
        planned(frozen, step_s=0.2).start()
        other.start()
        headers = {"Prefer": "respond-async"}
        job_ids = [
            httpx.post(frozen.base + "/generate", json={"prompt": f"{n}"}, headers=headers, timeout=30).json()["job_id"]
            for n in range(4)
        ]
        wait_for(lambda: len(Work.read(frozen).steps) == 4)
        frozen.freeze()
        jobs = ended_jobs(other, job_ids, PATIENCE_S)
        assert succeeded(jobs) == 4
        frozen.thaw()
        again = ended_jobs(frozen, job_ids, PATIENCE_S)
        assert [job.at for job in again] == [job.at for job in jobs]
        work = check_all_done_once(other, job_ids)
        assert work.renders == 8
        wait_for(lambda: len(clips(other)) == 4)


def test_a_wall_clock_that_jumps_decides_nothing(nursery: Nursery, tmp_path: Path) -> None:
    """Neither a lease nor whose job it is: two processes whose clocks jump by days make each clip once."""
    with cores(nursery, 2, tmp_path) as services:
        for core in services:
            planned(core, jumping_clock=True, step_s=0.1).start()
        job_ids = [submit(services[n % 2], f"{n}") for n in range(16)]
        jobs = ended_jobs(services[0], job_ids, PATIENCE_S)
        assert succeeded(jobs) == 16
        work = Work.read(services[0])
        assert (work.renders, work.committed_twice) == (16, 0)


def test_a_stop_hands_back_what_it_can_not_end(nursery: Nursery, tmp_path: Path) -> None:
    """The next start goes on at once: it need not wait for a lease."""
    with cores(nursery, 1, tmp_path) as (core,):
        planned(core, step_s=2.0, drain_s=0.1, lease_s=60.0, max_dispatched_jobs=2).start()
        headers = {"Prefer": "respond-async"}
        answers = [
            httpx.post(core.base + "/generate", json={"prompt": f"{n}"}, headers=headers, timeout=30).json()
            for n in range(5)
        ]
        wait_for(lambda: Work.read(core).renders == 2)
        core.stop()
        planned(core, step_s=0.01).start()
        jobs = ended_jobs(core, [answer["job_id"] for answer in answers], PATIENCE_S)
        assert succeeded(jobs) == 5
        assert [job.parameters.model_dump(mode="json") for job in jobs] == [answer["parameters"] for answer in answers]
        assert sorted(job.attempts for job in jobs) == [1, 1, 1, 2, 2]


LEASE_S = 0.4


@pytest.mark.parametrize("count", [1, 2])
def test_the_bucket_is_away_for_more_than_three_leases(
    nursery: Nursery, tmp_path: Path, count: int, tell: Callable[[str, str], None]
) -> None:
    """Whatever state a job is in. Nobody could renew, so nobody has lost anything: no clip is made twice."""
    with Ministack(tmp_path / "s3") as server, cores(nursery, count, tmp_path, on_bucket(server, tmp_path)) as services:
        keys = {"WAN_S3_ACCESS_KEY": server.info.access_key, "WAN_S3_SECRET_KEY": server.info.secret_key}
        for core in services:
            planned(core, environment=keys, step_s=0.05, lease_s=LEASE_S, max_dispatched_jobs=3).start()
        job_ids = [submit(services[0], f"{n}") for n in range(10)]
        wait_for(lambda: Work.read(services[0]).commits >= 2)
        server.freeze()
        time.sleep(4 * LEASE_S)  # the outage is what the test is about
        server.thaw()
        jobs = ended_jobs(services[-1], job_ids, PATIENCE_S)
        assert succeeded(jobs) == len(jobs)
        work = Work.read(services[0])
        assert work.committed_twice == 0
        for core in services:
            core.stop()
    tell("faults", f"bucket away for four leases, {count} core(s): 10 jobs, {work.renders} renders begun, lost 0")
    assert work.renders == 10


def submit(core: Core, prompt: str) -> str:
    answer = httpx.post(
        core.base + "/generate", json={"prompt": prompt}, headers={"Prefer": "respond-async"}, timeout=30
    )
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["job_id"]
    return job_id


def on_bucket(server: Ministack, folder: Path) -> dict[str, object]:
    bucket = {"endpoint": server.info.endpoint, "bucket": f"{BUCKETS}core", "read_timeout_s": 0.5}
    return {"storage": {"kind": "s3", "folder": str(folder / "secret"), "create_bucket": True, "s3": bucket}}


def num_waiting(core: Core) -> int:
    waiting: int = httpx.get(core.base + "/health", timeout=30).json()["queue"]["waiting"]
    return waiting


async def submit_jobs(port: int, count: int, num_connections: int = 32) -> None:
    """Single requests, each acknowledged. By hand, since httpx takes as long for each as the service."""
    numbers = iter(range(count))

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            body = json.dumps({"prompt": f"{number}"})
            writer.write(
                f"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                f"prefer: respond-async\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
            )
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            answer = await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
            assert head.startswith("http/1.1 202 "), answer
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(connection() for _ in range(num_connections)))


@pytest.fixture
def folder_in_memory(tmp_path: Path) -> Iterator[Path]:
    """For tests of something else than the disk, on which ten thousand jobs are twenty thousand fsyncs."""
    shm = Path("/dev/shm")  # noqa: S108  # the folder within has a name that nobody can guess
    if not shm.is_dir() or shutil.disk_usage(shm).free < 2**30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


def test_ten_thousand_jobs_wait(nursery: Nursery, folder_in_memory: Path, tell: Callable[[str, str], None]) -> None:
    """In bounded memory, and they all wait still after a kill."""
    count = 10_000
    with cores(nursery, 1, folder_in_memory) as (core,):
        planned(core, step_s=3600.0, max_dispatched_jobs=2, max_waiting_jobs=2 * count, lease_s=5.0).start()
        before = core.rss_bytes()

        began = time.monotonic()
        asyncio.run(submit_jobs(core.plan.port, count))
        accepted_s = time.monotonic() - began
        grown = (core.rss_bytes() - before) / 2**20
        core.kill()
        began = time.monotonic()
        core.start()
        wait_for(lambda: num_waiting(core) >= count - 2)
        resumed_s = time.monotonic() - began
        page = httpx.get(core.base + "/jobs", params={"limit": 100}, timeout=30).json()
        assert len(page["jobs"]) == 100
    tell(
        "faults",
        f"{count} jobs waiting: accepted in {accepted_s:.1f} s, {grown:.0f} MiB, "
        f"all in line again {resumed_s:.1f} s after a kill",
    )
    assert grown < 400


def test_a_thousand_idle_event_streams(nursery: Nursery, tmp_path: Path, tell: Callable[[str, str], None]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),) * 2)
    with cores(nursery, 1, tmp_path) as (core,):
        planned(core, step_s=3600.0, max_dispatched_jobs=1).start()
        job_id = httpx.post(
            core.base + "/generate", json={"prompt": "x"}, headers={"Prefer": "respond-async"}, timeout=30
        ).json()["job_id"]
        wait_for(lambda: Work.read(core).renders == 1)
        before = core.rss_bytes()

        async def follow(count: int) -> tuple[float, int, list[str]]:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(base_url=core.base, timeout=30, limits=limits) as http:

                async def stream() -> str:
                    last = ""
                    async with http.stream("GET", f"/jobs/{job_id}/events") as answer:
                        async for line in answer.aiter_lines():
                            if line.startswith("data: "):
                                opened.release()
                                last = line
                    return last

                opened = asyncio.Semaphore(0)
                streams = [asyncio.create_task(stream()) for _ in range(count)]
                for _ in range(count):
                    await opened.acquire()
                held = core.rss_bytes()
                began = time.monotonic()
                assert (await http.get("/health/live")).status_code == 200
                answered_s = time.monotonic() - began
                assert (await http.post(f"/jobs/{job_id}/cancel")).json()["state"] == "cancelled"
                return answered_s, held, await asyncio.gather(*streams)

        answered_s, held, last = asyncio.run(follow(1000))
        assert all('"state":"cancelled"' in line for line in last)
        grown = (held - before) / 2**20
    tell("faults", f"1,000 idle event streams: {grown:.0f} MiB, health answered in {1000 * answered_s:.0f} ms")
    assert grown < 300
