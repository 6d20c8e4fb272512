"""What each process of a platform says of itself, left in the store for the others: its health and its metrics.

A front that wakes no GPU reads there what the containers with one have said, and one scrape of it tells about all.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from datetime import timedelta
from secrets import token_hex

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.errors import WanError
from schemas.health import GeneratorHealth
from serve_graph.logs import log_event, log_failure
from storage.keys import INSTANCES, instance_key
from storage.store import ObjectNotFound, ObjectStore

FRESH = timedelta(seconds=60)
"""A report that is older is left out: its process has ended, or is frozen."""

FORGOTTEN = timedelta(hours=1)


class InstanceReport(BaseModel):
    """generator: of a process that has the model. metrics: its exposition. ended: it has said its last word."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    instance: str
    generator: GeneratorHealth | None
    metrics: str
    ended: bool = False


class Instances:
    """Reports of all processes, this one's among them. Methods block, but for `report`."""

    def __init__(self, store: ObjectStore) -> None:
        self.own = token_hex(8)
        self._store = store

    def leave(self, report: InstanceReport) -> None:
        """Put this process's report in the place of its last one. Raises StoreUnavailable, StoreFull."""
        self._store.put(instance_key(self.own), report.model_dump_json().encode())

    def others(self) -> list[InstanceReport]:
        """The fresh reports of the others, by the store's own clock; forgotten ones are deleted.

        Raises StoreUnavailable, StoreFull.
        """
        now = self._store.put(f"{INSTANCES}clock", b"").last_modified
        found = []
        for stat in self._store.list(INSTANCES).stats:
            if stat.key in {instance_key(self.own), f"{INSTANCES}clock"}:
                continue
            if now - stat.last_modified > FORGOTTEN:
                self._store.delete(stat.key)
            elif now - stat.last_modified <= FRESH:
                report = self._read(stat.key)
                if report is not None and not report.ended:
                    found.append(report)
        return found

    def _read(self, key: str) -> InstanceReport | None:
        try:
            return InstanceReport.model_validate_json(self._store.get(key).body)
        except ObjectNotFound:
            return None
        except ValidationError:  # another version's
            log_event("report_unreadable", level=logging.WARNING)
            return None


class Reporter:
    """Leaves this process's report again and again. generator: None where this process has no model."""

    def __init__(
        self,
        instances: Instances,
        executor: Executor,
        *,
        metrics: Callable[[], Awaitable[bytes]],
        generator: Callable[[], Awaitable[GeneratorHealth]] | None,
        interval_s: float,
    ) -> None:
        self._instances = instances
        self._executor = executor
        self._metrics = metrics
        self._generator = generator
        self._interval_s = interval_s

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await self.report()
            await asyncio.sleep(self._interval_s)

    async def report(self, *, ended: bool = False) -> None:
        """Report once; a store that is away is tried at the next turn."""
        try:
            report = InstanceReport(
                instance=self._instances.own,
                generator=None if ended else await self._generator_health(),
                metrics=(await self._metrics()).decode(),
                ended=ended,
            )
            await asyncio.get_running_loop().run_in_executor(self._executor, self._instances.leave, report)
        except WanError as failure:
            log_failure("report_failed", failure)

    async def _generator_health(self) -> GeneratorHealth | None:
        """None where there is no generator, and while a lost one is being replaced."""
        if self._generator is None:
            return None
        try:
            return await self._generator()
        except WanError:  # the jobs that wait for it tell
            return None
