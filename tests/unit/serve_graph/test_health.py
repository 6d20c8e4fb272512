"""The health monitor by itself: how often it asks, and what it makes of the answers."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import PATIENCE_S

from schemas.errors import ModelNotReady, ShuttingDown, StoreFull, StoreUnavailable, WanError, WorkerLost
from schemas.health import GeneratorHealth, LastError, ModelHealth, QueueHealth
from serve_graph import health
from serve_graph.health import MAX_AGE_S, HealthMonitor
from serve_graph.settings import Settings
from storage.local import LocalStore

QUEUE = QueueHealth(waiting=1, running=2, capacity=3)
LAST_ERROR = LastError(error="out-of-memory", job_id=f"job_{0:032x}", at=datetime(2026, 11, 22, tzinfo=UTC))


class KnownJobs:
    """What a job service would tell."""

    last_error: LastError | None = LAST_ERROR

    def queue(self) -> QueueHealth:
        return QUEUE


def generator_health(loaded: bool = True) -> GeneratorHealth:
    model = ModelHealth(profile="wan-random", revision=None, loaded=loaded, dtype="float32", device="cpu")
    return GeneratorHealth(model=model, gpu=None)


class CountingProbe:
    """Answers what it is given, and counts."""

    def __init__(self) -> None:
        self.answer: GeneratorHealth | WanError = generator_health()
        self.asked = 0

    async def health(self) -> GeneratorHealth:
        self.asked += 1
        await asyncio.sleep(0)
        if isinstance(self.answer, WanError):
            raise self.answer
        return self.answer


class CheckedStore(LocalStore):
    """A store whose check can fail or hang."""

    failure: WanError | None = None
    checked = 0
    answering: threading.Event | None = None

    def check(self) -> None:
        self.checked += 1
        if self.answering is not None:
            self.answering.wait(PATIENCE_S)
        if self.failure is not None:
            raise self.failure
        super().check()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The monitor's clock: `now` in seconds."""
    clock = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def probe() -> CountingProbe:
    return CountingProbe()


@pytest.fixture
def store(tmp_path: Path) -> CheckedStore:
    return CheckedStore(tmp_path / "store")


@pytest.fixture
def monitor(clock: SimpleNamespace, probe: CountingProbe, store: CheckedStore) -> Iterator[HealthMonitor]:
    with ThreadPoolExecutor(max_workers=1) as executor:
        yield HealthMonitor(Settings(), probe, store, KnownJobs(), executor)


async def test_monitor_asks_once_however_many_want_to_know(
    monitor: HealthMonitor, probe: CountingProbe, store: CheckedStore
) -> None:
    answers = await asyncio.gather(
        *(monitor.health() for _ in range(50)), *(monitor.require_ready() for _ in range(50))
    )

    assert len(answers) == 100
    assert (probe.asked, store.checked) == (1, 1)


async def test_monitor_asks_again_after_a_second(
    monitor: HealthMonitor, probe: CountingProbe, clock: SimpleNamespace
) -> None:
    await monitor.require_ready()
    clock.now += MAX_AGE_S / 2
    await monitor.require_ready()
    assert probe.asked == 1

    clock.now += MAX_AGE_S / 2
    await monitor.require_ready()
    assert probe.asked == 2


async def test_monitor_recovers_when_the_model_does(
    monitor: HealthMonitor, probe: CountingProbe, clock: SimpleNamespace
) -> None:
    probe.answer = WorkerLost("the process went away", 1)
    with pytest.raises(WorkerLost):
        await monitor.require_ready()

    probe.answer = generator_health()
    clock.now += MAX_AGE_S
    await monitor.require_ready()
    assert (await monitor.health()).status == "ok"


async def test_health_tells_the_last_error_of_the_job_service(monitor: HealthMonitor) -> None:
    assert (await monitor.health()).last_error == LAST_ERROR


async def test_monitor_is_not_ready_while_the_model_loads(monitor: HealthMonitor, probe: CountingProbe) -> None:
    probe.answer = generator_health(loaded=False)

    with pytest.raises(ModelNotReady):
        await monitor.require_ready()
    assert (await monitor.health()).status == "unavailable"


@pytest.mark.parametrize("failure", [StoreUnavailable("the storage folder is gone"), StoreFull()], ids=["gone", "full"])
async def test_monitor_is_not_ready_without_its_store(
    monitor: HealthMonitor, store: CheckedStore, failure: WanError
) -> None:
    store.failure = failure

    with pytest.raises(type(failure)):
        await monitor.require_ready()
    found = await monitor.health()
    assert (found.status, found.reason, found.storage.reachable) == ("unavailable", failure.detail, False)
    assert found.model.loaded


async def test_monitor_does_not_wait_for_a_store_that_hangs(
    monitor: HealthMonitor, store: CheckedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "STORE_TIMEOUT_S", 0.01)
    store.answering = threading.Event()

    with pytest.raises(StoreUnavailable):
        await monitor.require_ready()
    store.answering.set()


async def test_monitor_names_the_shutdown_before_anything_else(monitor: HealthMonitor, probe: CountingProbe) -> None:
    probe.answer = WorkerLost("the process went away", 1)
    monitor.draining = True

    with pytest.raises(ShuttingDown):
        await monitor.require_ready()


async def test_health_counts_its_uptime_and_asks_for_the_queue(monitor: HealthMonitor, clock: SimpleNamespace) -> None:
    clock.now += 12.3456
    found = await monitor.health()

    assert found.uptime_s == 12.346
    assert found.queue == QUEUE
    assert found.storage.kind == "local"
