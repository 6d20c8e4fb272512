"""For the tests of batches: services over one folder that can be dropped, and a worker that counts what it renders."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from random_wan import RANDOM_WAN
from support import PUBLIC_URL, Clock, ScriptedWorker

from schemas.batches import Batch, BatchResult
from schemas.handoff import PreparedPrompt, RenderEvent, RenderTask
from schemas.jobs import JobState
from schemas.requests import GenerateRequest
from serve_graph.api_keys import NOBODY, Principal
from serve_graph.jobs import JobService, Patiences, QueueLimits
from serve_graph.jobs.batch_intake import Sent
from serve_graph.metrics import IngressMetrics, new_registry
from serve_graph.webhooks.policy import WebhookPolicy
from storage.job_records import JobRecords
from storage.local import LocalStore
from storage.signing import LocalPresigner
from storage.store import ObjectStat

PATIENCE_S = 60.0
LEASE_S = 0.6
ALICE, BOB = Principal("alice"), Principal("bob")


class QuickStore(LocalStore):
    """A local store that counts the commits of clips, and the requests of each kind."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.commits: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def put(
        self, key: str, body: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        self.calls["put " + key.split("/")[0]] += 1
        stat = super().put(key, body, if_none_match=if_none_match, if_match=if_match)
        if key.startswith("jobs/") and isinstance(body, bytes) and json.loads(body)["state"] == JobState.SUCCEEDED:
            self.commits[key] += 1
        return stat

    def get(self, key: str) -> Any:
        self.calls["get " + key.split("/")[0]] += 1
        return super().get(key)

    def stat(self, key: str) -> ObjectStat:
        self.calls["stat " + key.split("/")[0]] += 1
        return super().stat(key)


class CountingWorker(ScriptedWorker):
    """Notes which jobs were begun, in their order. checked: how many prompts had their tokens counted."""

    def __init__(self, store: LocalStore) -> None:
        super().__init__(store)
        self.begun: list[str] = []
        self.checked = 0
        self.step_s = 0.0

    async def check(self, parameters: Any) -> None:
        self.checked += 1
        await super().check(parameters)

    async def render(self, task: RenderTask, prompt: PreparedPrompt) -> AsyncGenerator[RenderEvent, None]:
        self.begun.append(task.job_id)
        await asyncio.sleep(self.step_s)
        async for event in super().render(task, prompt):
            yield event


@dataclass(frozen=True)
class Served:
    """A service on a folder, and what is behind it."""

    service: JobService
    worker: CountingWorker
    store: QuickStore
    records: JobRecords

    def keys(self, prefix: str) -> list[str]:
        return [stat.key for stat in self.store.list(prefix).stats]

    async def ended(self, batch_id: str, principal: Principal = NOBODY) -> Batch:
        """The batch, once it has ended."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                batch = await self.service.batches.reading.batch(batch_id, principal)
                if batch.state == "ended":
                    return batch
                await asyncio.sleep(0.02)

    async def results(self, batch_id: str, principal: Principal = NOBODY) -> list[BatchResult]:
        return [result async for result in self.service.batches.reading.results(batch_id, principal)]

    def drop(self) -> None:
        """As if the process were killed: nothing is written any more."""
        for task in [*self.service._running._tending, *self.service._running._filing, *self.service._running._tasks()]:
            task.cancel()


@contextmanager
def served(
    folder: Path,
    *,
    max_waiting_jobs: int = 8,
    max_dispatched_jobs: int = 4,
    max_batches: int = 64,
    lease_s: float = LEASE_S,
) -> Iterator[Served]:
    store = QuickStore(folder)
    worker, records = CountingWorker(store), JobRecords(store)
    with ThreadPoolExecutor(max_workers=8) as executor:
        service = JobService(
            profile=RANDOM_WAN,
            worker=worker,
            records=records,
            presigner=LocalPresigner(PUBLIC_URL, b"s" * 32, now=Clock()),
            limits=QueueLimits(max_waiting_jobs, max_dispatched_jobs, max_batches=max_batches),
            patiences=Patiences(worker_s=0.0, store_s=0.0, lease_s=lease_s),
            default_url_ttl=timedelta(seconds=600),
            hash_secret=b"h" * 32,
            metrics=IngressMetrics(new_registry()),
            executor=executor,
            webhook_policy=WebhookPolicy(),
        )
        yield Served(service, worker, store, records)


def prompts(count: int) -> list[GenerateRequest]:
    return [GenerateRequest(prompt=f"a red circle, number {index}") for index in range(count)]


async def sent(requests: Iterable[Sent]) -> AsyncIterator[Sent]:
    for request in requests:
        yield request


async def submit(served: Served, requests: Iterable[Sent], principal: Principal = NOBODY, **more: Any) -> Batch:
    return await served.service.submit_batch(sent(requests), "request-1", principal, **more)


async def until(holds: Callable[[], object]) -> None:
    """Wait for something that nothing tells of."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110  # see above
            await asyncio.sleep(0.005)
