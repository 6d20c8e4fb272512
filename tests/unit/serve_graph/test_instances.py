"""Reports of processes: who is up, what they measured, and what is left out of it."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from schemas.errors import StoreUnavailable
from schemas.health import GeneratorHealth, ModelHealth
from serve_graph.instances import FORGOTTEN, FRESH, InstanceReport, Instances, Reporter
from serve_graph.metrics import IngressMetrics, merge, merge_instances, new_registry, snapshot
from storage.keys import instance_key
from storage.local import LocalStore

HEALTH = GeneratorHealth(
    model=ModelHealth(profile="wan-random", revision=None, loaded=True, dtype="float32", device="cpu"), gpu=None
)


def report(instances: Instances, *, ended: bool = False) -> InstanceReport:
    return InstanceReport(instance=instances.own, generator=HEALTH, metrics="", ended=ended)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def age(folder: Path, instances: Instances, by: timedelta) -> None:
    path = folder / instance_key(instances.own)
    written = path.stat().st_mtime - by.total_seconds()
    os.utime(path, (written, written))


def test_others_see_a_report_and_its_owner_does_not(store: LocalStore) -> None:
    one, two = Instances(store), Instances(store)
    one.leave(report(one))

    assert two.others() == [report(one)]
    assert one.others() == []


def test_a_silent_one_is_left_out_and_forgotten_in_the_end(tmp_path: Path, store: LocalStore) -> None:
    one, two = Instances(store), Instances(store)
    one.leave(report(one))
    age(tmp_path, one, FRESH + timedelta(seconds=5))
    assert two.others() == []
    assert instance_key(one.own) in [stat.key for stat in store.list("instances/").stats]

    age(tmp_path, one, FORGOTTEN)
    assert two.others() == []
    assert instance_key(one.own) not in [stat.key for stat in store.list("instances/").stats]


def test_one_that_has_ended_is_left_out(store: LocalStore) -> None:
    one, two = Instances(store), Instances(store)
    one.leave(report(one, ended=True))

    assert two.others() == []


def test_a_report_of_another_version_is_passed_over(store: LocalStore) -> None:
    one, two = Instances(store), Instances(store)
    store.put(instance_key(one.own), b'{"version": 99}')

    assert two.others() == []


def test_one_page_tells_about_all_with_the_instance_named() -> None:
    pages = {}
    for instance, count in (("a" * 16, 1), ("b" * 16, 2)):
        registry = new_registry()
        metrics = IngressMetrics(registry)
        for _ in range(count):
            metrics.request_answered("/health", "GET", 200, 0.01)
        pages[instance] = merge([("Ingress", "r", snapshot(registry))]).decode()

    merged = merge_instances(pages).decode()

    counts = {
        sample.labels["instance"]: sample.value
        for family in text_string_to_metric_families(merged)
        for sample in family.samples
        if sample.name == "wan_http_requests_total" and sample.labels["route"] == "/health"
    }
    assert counts == {"a" * 16: 1, "b" * 16: 2}
    assert merged.count("# TYPE wan_http_requests_total") == 1


async def test_a_store_that_is_away_ends_no_reports(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    instances, other = Instances(store), Instances(store)
    left, failures = asyncio.Event(), [StoreUnavailable("it can't be reached")]
    leave = instances.leave

    def fail_once(told: InstanceReport) -> None:
        if failures:
            raise failures.pop()
        leave(told)
        loop.call_soon_threadsafe(left.set)

    async def metrics() -> bytes:
        return b""

    async def generator() -> GeneratorHealth:
        return HEALTH

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(instances, "leave", fail_once)
    with ThreadPoolExecutor(1) as executor:
        reporter = Reporter(instances, executor, metrics=metrics, generator=generator, interval_s=0.01)
        reporting = asyncio.create_task(reporter.run())
        async with asyncio.timeout(10):
            await left.wait()
        reporting.cancel()
    assert other.others() == [report(instances)]
