"""One such process: the real API, job service and store; only the worker makes no video and takes its time.

Run as `python -m service_core.process`, it imports everything once and then forks a child per line on its standard
input (a JSON object of `Plan`), so that a start takes milliseconds; for each it prints the child's process id.
"""

import asyncio
import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import uvicorn
from random_wan import RANDOM_WAN

from schemas.clips import Timings
from schemas.errors import StoreUnavailable
from schemas.handoff import PreparedPrompt, RenderEvent, RenderTask, Started, TextEmbedding
from schemas.health import GeneratorHealth, ModelHealth
from schemas.jobs import Progress, RenderedClip
from schemas.requests import GenerationParameters
from serve_graph.api.app import create_api
from serve_graph.api.auth import Authenticator
from serve_graph.api.clip_files import SignedClips
from serve_graph.api.routes import Service
from serve_graph.health import HealthMonitor
from serve_graph.jobs import JobService, Patiences, QueueLimits
from serve_graph.logs import configure_logging
from serve_graph.metrics import IngressMetrics, merge, new_registry, snapshot
from serve_graph.patience import Patience
from serve_graph.settings import Settings
from serve_graph.stores import SignedStore, open_signed_store, prepare_store
from storage.job_records import JobRecords
from storage.store import PreconditionFailed

STEPS = 4
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Plan:
    """What a process serves, and how. settings: of the service. log: where work is counted, outside the records."""

    port: int
    settings: dict[str, Any]
    log: str
    output: str
    step_s: float = 0.01
    lease_s: float = 0.4
    store_patience_s: float = 30.0
    drain_s: float = 5.0
    max_waiting_jobs: int = 256
    max_dispatched_jobs: int = 4
    jumping_clock: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


class WorkLog:
    """Lines that survive the process: each is one `write` to a file opened for appending."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, event: str, job_id: str, token: str) -> None:
        os.write(self._file, f"{event} {job_id} {token} {os.getpid()}\n".encode())


class CountingRecords(JobRecords):
    """Notes every commit: before it is tried, and once the store has it."""

    def __init__(self, opened: SignedStore, log: WorkLog, *, jumping_clock: bool) -> None:
        super().__init__(opened.store, now=_jumping_now if jumping_clock else _now)
        self._log = log

    def write(self, changed: Any, etag: str, *, again: bool = False) -> str:
        commits = getattr(changed, "result", None) is not None
        if commits:
            self._log.note("committing", changed.job_id, changed.attempt_token)
        written = super().write(changed, etag, again=again)
        if commits:
            self._log.note("committed", changed.job_id, changed.attempt_token)
        return written


class SlowWorker:
    """Takes `STEPS` steps per clip. Its "clip" names the job and its seed, so that equal jobs give equal bytes."""

    def __init__(self, opened: SignedStore, log: WorkLog, step_s: float, executor: ThreadPoolExecutor) -> None:
        self._store = opened.store
        self._log = log
        self._step_s = step_s
        self._executor = executor

    async def check(self, parameters: GenerationParameters) -> None:
        pass

    async def prepare(self, parameters: GenerationParameters) -> PreparedPrompt:
        row = TextEmbedding(np.zeros((1, 1), np.float32), "float32", solo=True)
        return PreparedPrompt(positive=row, negative=row)

    async def render(self, task: RenderTask, prompt: PreparedPrompt) -> AsyncGenerator[RenderEvent, None]:
        token = task.clip_key.rpartition("/")[2].removesuffix(".mp4")
        self._log.note("begun", task.job_id, token)
        yield Started()
        for step in range(STEPS):
            await asyncio.sleep(self._step_s)
            self._log.note("step", task.job_id, token)
            yield Progress(stage="denoise", step=step + 1, steps=STEPS, seconds_left=self._step_s * (STEPS - step))
        body = f"{task.job_id} {task.parameters.seed}".encode()
        await self._upload(task.clip_key, body)
        self._log.note("rendered", task.job_id, token)
        digest = hashlib.sha256(body).hexdigest()
        yield RenderedClip(key=task.clip_key, size_bytes=len(body), sha256=digest, timings=Timings(total=1.0))

    async def _upload(self, key: str, body: bytes) -> None:
        """Again and again while the store is away, as the renderer does it."""
        patience, again = Patience(PATIENCE_S), False
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(
                    self._executor, lambda: self._store.put(key, body, if_none_match=True)
                )
            except StoreUnavailable:
                again = True
                if not await patience.pause():
                    raise
            except PreconditionFailed:
                if again:  # the lost answer was a yes
                    return
                raise
            else:
                return

    async def health(self) -> GeneratorHealth:
        model = ModelHealth(profile="wan-random", revision=None, loaded=True, dtype="float32", device="cpu")
        return GeneratorHealth(model=model, gpu=None)


def _now() -> datetime:
    return datetime.now(UTC)


def _jumping_now() -> datetime:
    """Days before or behind what it was a moment ago, as after a thaw or once somebody has set the clock."""
    return _now() + timedelta(days=random.uniform(-3, 3))  # no secret


def serve(plan: Plan) -> None:
    """Serve until SIGTERM."""
    os.environ.update(plan.environment)
    output = os.open(plan.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    configure_logging()
    settings, _ = prepare_store(Settings(**plan.settings))
    executor = ThreadPoolExecutor(max_workers=16)
    opened, log, registry = open_signed_store(settings), WorkLog(plan.log), new_registry()
    metrics, worker = IngressMetrics(registry), SlowWorker(opened, log, plan.step_s, executor)
    jobs = JobService(
        profile=RANDOM_WAN,
        worker=worker,
        records=CountingRecords(opened, log, jumping_clock=plan.jumping_clock),
        presigner=opened.presigner,
        limits=QueueLimits(plan.max_waiting_jobs, plan.max_dispatched_jobs),
        patiences=Patiences(worker_s=10.0, store_s=plan.store_patience_s, lease_s=plan.lease_s),
        default_url_ttl=timedelta(seconds=600),
        hash_secret=opened.hash_secret,
        metrics=metrics,
        executor=executor,
    )
    monitor = HealthMonitor(settings, worker, opened.store, jobs, executor)

    async def exposition() -> bytes:
        return merge([("Ingress", "core", snapshot(registry))])

    @asynccontextmanager
    async def running() -> AsyncIterator[None]:
        jobs.start()
        yield
        monitor.draining = True
        await jobs.drain(plan.drain_s)

    app = create_api(
        Service(jobs, monitor, exposition),
        profile=RANDOM_WAN,
        metrics=metrics,
        max_body_bytes=64 * 1024,
        authenticator=Authenticator(None, protect_monitoring=False),
        signed_clips=None if opened.local is None else SignedClips(opened.local, executor),
        while_running=running,
    )
    uvicorn.run(app, host="127.0.0.1", port=plan.port, log_level="warning", timeout_graceful_shutdown=2, backlog=4096)


def main() -> None:
    """Fork a child per line until standard input ends; children that end are reaped by the kernel."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.stdin.close()
            serve(Plan(**json.loads(line)))
            os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    main()
