"""Starts, kills, freezes and thaws the processes of `service_core.process`, and counts what they have done."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from schemas.jobs import Job, JobState
from serve_graph.open_ports import free_port
from service_core.process import Plan

PROJECT = Path(__file__).parents[2]
START_TIMEOUT_S = 30.0
LOOK_S = 0.02


class Nursery:
    """The process that forks the others. Use it as a context."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "service_core.process"]
        self._process = subprocess.Popen(  # our own module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT,
            env=os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"},
        )

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def fork(self, plan: Plan) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(plan.line())
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@dataclass
class Core:
    """One process, again and again on the same port."""

    nursery: Nursery
    plan: Plan
    pid: int = 0
    kills: int = 0

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.plan.port}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.pid = self.nursery.fork(self.plan)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if httpx.get(self.base + "/health/live", timeout=2).status_code == 200:
                    return
            time.sleep(LOOK_S)  # a start is seen by asking
        raise AssertionError(Path(self.plan.output).read_text()[-2000:])

    def kill(self) -> None:
        self._end(signal.SIGKILL)
        self.kills += 1

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def rss_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _end(self, how: signal.Signals) -> None:
        if not self.pid:
            return
        with suppress(ProcessLookupError):
            os.kill(self.pid, how)
        deadline = time.monotonic() + START_TIMEOUT_S
        while Path(f"/proc/{self.pid}").exists():
            assert time.monotonic() < deadline, f"process {self.pid} does not end"
            time.sleep(LOOK_S)  # no child of this process: its end is seen in /proc only
        self.pid = 0


@contextmanager
def cores(
    nursery: Nursery, count: int, folder: Path, settings: dict[str, object] | None = None
) -> Iterator[list[Core]]:
    """Processes that share one store, not yet started; killed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        port = free_port()
        own = {"storage": {"folder": str(folder / "store")}, "public_url": f"http://127.0.0.1:{port}"} | (
            settings or {}
        )
        plan = Plan(port=port, settings=own, log=str(folder / "work.log"), output=str(folder / f"core-{number}.log"))
        made.append(Core(nursery, plan))
    try:
        yield made
    finally:
        for core in made:
            with suppress(ProcessLookupError):
                if core.pid:
                    core.thaw()
            core._end(signal.SIGKILL)


def planned(core: Core, **changes: object) -> Core:
    """The same process with another plan. It must not have been started yet."""
    core.plan = replace(core.plan, **changes)  # type: ignore[arg-type]  # the fields of Plan
    return core


@dataclass
class Work:
    """What the work log says."""

    renders: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    tried: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    committed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def read(cls, core: Core) -> "Work":
        work = cls()
        log = Path(core.plan.log)
        for line in log.read_text().splitlines() if log.exists() else ():
            event, job_id, token, _ = line.split()
            work.renders += event == "begun"
            if event == "step":
                work.steps[job_id] += 1
            elif event == "committing":
                work.tried[job_id].add(token)
            elif event == "committed":
                work.committed[job_id].append(token)
        return work

    @property
    def commits(self) -> int:
        return sum(map(len, self.committed.values()))

    @property
    def committed_twice(self) -> int:
        return sum(len(tokens) > 1 for tokens in self.committed.values())


def ended_jobs(core: Core, job_ids: list[str], timeout_s: float) -> list[Job]:
    """The jobs, once all have ended; those that have not within the time are as they are then."""
    deadline = time.monotonic() + timeout_s
    jobs: dict[str, Job] = {}
    with httpx.Client(base_url=core.base, timeout=10) as http:
        while time.monotonic() < deadline:
            for job_id in job_ids:
                if job_id not in jobs or not jobs[job_id].state.is_terminal:
                    answer = http.get(f"/jobs/{job_id}")
                    assert answer.status_code == 200, answer.text
                    jobs[job_id] = Job.model_validate_json(answer.content)
            if all(job.state.is_terminal for job in jobs.values()):
                break
            time.sleep(0.1)  # between looks over HTTP
    return [jobs[job_id] for job_id in job_ids]


def succeeded(jobs: list[Job]) -> int:
    return sum(job.state is JobState.SUCCEEDED for job in jobs)
