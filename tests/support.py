"""For the tests of the job service and the API: a scripted worker, a store that can be held or broken."""

import asyncio
import hashlib
import io
import json
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from random_wan import RANDOM_WAN

from schemas.clips import Timings
from schemas.errors import StoreUnavailable
from schemas.handoff import PreparedPrompt, RenderEvent, RenderTask, Started, TextEmbedding
from schemas.health import GeneratorHealth, ModelHealth
from schemas.jobs import JobRecord, JobState, Progress, RenderedClip
from schemas.model_profile import ModelProfile
from schemas.requests import GenerationParameters
from serve_graph.jobs import JobService, Patiences, QueueLimits
from serve_graph.jobs.platform import Platform
from serve_graph.metrics import IngressMetrics, new_registry
from serve_graph.service_plan import ServicePlan
from serve_graph.webhooks.policy import WebhookPolicy
from serve_graph.webhooks.sender import WebhookSender
from storage.job_records import JobRecords
from storage.local import LocalStore
from storage.signing import LocalPresigner
from storage.store import ObjectStat, ObjectStore

PUBLIC_URL = "http://wan.test:8000"
CLIP_BYTES = b"\0\0\0\x20ftypisom" + bytes(range(256)) * 4
"""What the scripted worker "renders"."""

PROGRESS = Progress(stage="denoise", step=1, steps=2, seconds_left=0.5)
STAGES_S = Timings(denoise=0.3, decode=0.2, encode=0.1, upload=0.05, total=0.65)
PATIENCE_S = 20.0
"""How long a test waits for what must happen; only a failing test ever waits so long."""


class Gate:
    """A place where the worker stops until the test lets it on. Open until it is closed."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._reached = asyncio.Event()

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        """Wait until somebody has come to the gate."""
        async with asyncio.timeout(PATIENCE_S):
            await self._reached.wait()

    async def pass_through(self) -> None:
        self._reached.set()
        await self._open.wait()


class ScriptedWorker:
    """A `serve_graph.jobs.Worker` that makes no video: it writes `CLIP_BYTES` under the task's key.

    Each stage stops at its gate and then raises the exception in `failures`, where there is one for it:
    `check`, `prepare`, `queued` (handed over, not started), `running` (after the first progress). `passing`
    holds exceptions that are raised once each, before those. `health` is such a stage, too.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.gates = {stage: Gate() for stage in ("check", "prepare", "queued", "running", "health")}
        self.failures: dict[str, Exception] = {}
        self.passing: dict[str, list[Exception]] = {}
        self.tasks: list[RenderTask] = []
        self.rendering: set[str] = set()
        self.rendered: list[str] = []
        self.ends_without_clip = False
        self.device_s = 0.0, 0.0
        """What a clip takes of the device to denoise and to decode."""

    async def check(self, parameters: GenerationParameters) -> None:
        await self._stage("check")

    async def prepare(self, parameters: GenerationParameters) -> PreparedPrompt:
        await self._stage("prepare")
        row = TextEmbedding(np.zeros((1, 1), np.float32), "float32", solo=True)
        return PreparedPrompt(positive=row, negative=row)

    async def render(self, task: RenderTask, prompt: PreparedPrompt) -> AsyncGenerator[RenderEvent, None]:
        self.tasks.append(task)
        self.rendering.add(task.job_id)
        try:
            await self._stage("queued")
            yield Started()
            yield PROGRESS
            await self._stage("running")
            if self.ends_without_clip:
                return
            self._store.put(task.clip_key, CLIP_BYTES, if_none_match=True)
            self.rendered.append(task.job_id)
            digest = hashlib.sha256(CLIP_BYTES).hexdigest()
            denoise_s, decode_s = self.device_s
            yield RenderedClip(
                key=task.clip_key,
                size_bytes=len(CLIP_BYTES),
                sha256=digest,
                timings=STAGES_S,
                denoise_device_s=denoise_s,
                decode_device_s=decode_s,
            )
        finally:
            self.rendering.discard(task.job_id)

    async def health(self) -> GeneratorHealth:
        await self._stage("health")
        model = ModelHealth(profile="wan-random", revision=None, loaded=True, dtype="float32", device="cpu")
        return GeneratorHealth(model=model, gpu=None)

    async def _stage(self, stage: str) -> None:
        await self.gates[stage].pass_through()
        if self.passing.get(stage):
            raise self.passing[stage].pop(0)
        if stage in self.failures:
            raise self.failures[stage]


class WatchedStore(LocalStore):
    """A `LocalStore` that tells which states were recorded, and can be held or broken at any of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.recorded: list[JobState] = []
        self.failures: dict[JobState, Exception] = {}
        self.passing: dict[JobState, list[Exception]] = {}
        self.lost_answers: set[JobState] = set()
        self._held: dict[JobState, tuple[threading.Event, threading.Event]] = {}

    def hold(self, state: JobState) -> None:
        """Stop the next writer that records `state`, until `release`."""
        self._held[state] = threading.Event(), threading.Event()

    def release(self, state: JobState) -> None:
        self._held[state][1].set()

    async def reached(self, state: JobState) -> None:
        """Wait until a writer is held at `state`."""
        assert await asyncio.to_thread(self._held[state][0].wait, PATIENCE_S)

    def put(
        self, key: str, body: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        if not key.startswith("jobs/") or isinstance(body, Path):
            return super().put(key, body, if_none_match=if_none_match, if_match=if_match)
        state = JobState(json.loads(body)["state"])
        if state in self._held:
            reached, released = self._held[state]
            reached.set()
            assert released.wait(PATIENCE_S)
        if state in self.failures:
            raise self.failures[state]
        if self.passing.get(state):
            raise self.passing[state].pop(0)
        stat = super().put(key, body, if_none_match=if_none_match, if_match=if_match)
        self.recorded.append(state)
        if state in self.lost_answers:
            self.lost_answers.remove(state)
            raise StoreUnavailable("the answer was lost")
        return stat


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 5, 12, 0, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@dataclass(frozen=True)
class Jobs:
    """A job service and everything around it."""

    service: JobService
    worker: ScriptedWorker
    store: WatchedStore
    records: JobRecords
    presigner: LocalPresigner
    registry: CollectorRegistry
    metrics: IngressMetrics
    executor: ThreadPoolExecutor
    clock: Clock

    def record(self, job_id: str) -> JobRecord:
        """What the store has."""
        return self.records.get(job_id)[0]

    def job_records(self) -> list[str]:
        """The keys of all records in the store."""
        return [stat.key for stat in self.store.list("jobs/").stats]


@contextmanager
def open_jobs(
    folder: Path,
    *,
    profile: ModelProfile = RANDOM_WAN,
    webhooks: Callable[[IngressMetrics], WebhookSender] | None = None,
    max_waiting_jobs: int = 8,
    max_dispatched_jobs: int = 4,
    max_clip_pixels: int | None = None,
    clip_retention: timedelta | None = None,
    worker_patience_s: float = 0.0,
    store_patience_s: float = 0.0,
    lease_s: float = 20.0,
    stall_s: float = 600.0,
    run_s: float = 600.0,
    kept_s: float | None = None,
    upkeep_s: float = 300.0,
    by_call: bool = False,
    platform: Platform | None = None,
    plan: ServicePlan | None = None,
) -> Iterator[Jobs]:
    """A job service over the real store and records; only the worker is scripted."""
    clock = Clock()
    store = WatchedStore(folder)
    presigner = LocalPresigner(PUBLIC_URL, b"s" * 32, now=clock)
    records, worker, registry = JobRecords(store), ScriptedWorker(store), new_registry()
    metrics = IngressMetrics(registry)
    with ThreadPoolExecutor(max_workers=4) as executor:
        service = JobService(
            profile=profile,
            worker=worker,
            records=records,
            presigner=presigner,
            limits=QueueLimits(max_waiting_jobs, max_dispatched_jobs, max_clip_pixels, by_call=by_call),
            patiences=Patiences(worker_patience_s, store_patience_s, lease_s, stall_s, run_s, kept_s, upkeep_s),
            default_url_ttl=timedelta(seconds=600),
            hash_secret=b"h" * 32,
            metrics=metrics,
            executor=executor,
            clip_retention=clip_retention,
            webhook_policy=WebhookPolicy(allow_http=True, allow_private_addresses=True),
            webhook_sender=None if webhooks is None else webhooks(metrics),
            platform=platform,
            plan=plan,
        )
        yield Jobs(service, worker, store, records, presigner, registry, metrics, executor, clock)


class LogLines(io.StringIO):
    """What the service has logged so far: the stream that it logs to. Written and read in the event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._written = asyncio.Event()

    def write(self, text: str) -> int:
        self._written.set()
        return super().write(text)

    @property
    def text(self) -> str:
        return self.getvalue()

    async def wait_for(self, event: str) -> dict[str, Any]:
        """The one line of an event, once it is there."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.of(event):
                self._written.clear()
                await self._written.wait()
        (line,) = self.of(event)
        return line

    def of(self, event: str) -> list[dict[str, Any]]:
        """The lines of one event, in their order."""
        lines = [json.loads(line) for line in self.text.splitlines()]
        return [line for line in lines if line["event"] == event]
