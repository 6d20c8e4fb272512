"""The stores under test, their servers, and how many cases ran on which.

Ceph's cases carry the marker `ceph` and run with `-m ceph` only.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_servers.ceph import CephRgw
from s3_servers.ministack import Ministack
from s3_servers.process import S3Server
from store_cases import StoreCase, local_case, s3_case

S3_SERVERS = ("ministack", "ceph")
STORES = ("local", *S3_SERVERS)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ceph: needs Ceph's daemons (`make test-ceph`)")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what uses Ceph, by a fixture or as a parameter; here, since this file is read before its marker is known."""
    if isinstance(item, pytest.Function):
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "ceph" in item.fixturenames or "ceph" in parameters:
            item.add_marker("ceph")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave Ceph's cases out, unless `-m` speaks of them."""
    if "ceph" in config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("ceph")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("ceph")]


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with Ministack(tmp_path_factory.mktemp("ministack")) as server:
        yield server.info


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with CephRgw(tmp_path_factory.mktemp("ceph")) as server:
        yield server.info


@pytest.fixture(params=S3_SERVERS)
def s3_server(request: pytest.FixtureRequest, record_store: Callable[[str], None]) -> S3Server:
    """Each S3 server in turn, in the state in which the tests before left it."""
    record_store(request.param)
    server: S3Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture(params=STORES)
def case(request: pytest.FixtureRequest, tmp_path: Path, record_store: Callable[[str], None]) -> Iterator[StoreCase]:
    """Each store in turn, empty."""
    record_store(request.param)
    opened = local_case(tmp_path) if request.param == "local" else s3_case(request.getfixturevalue(request.param))
    with opened as store_case:
        yield store_case


@pytest.fixture
def record_store(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    return lambda store: record_property("store", store)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many contract cases ran on which store, and how they ended."""
    ended: dict[str, Counter[str]] = {store: Counter() for store in STORES}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            store = dict(report.user_properties).get("store")
            if store in ended and report.when == "call":
                ended[str(store)][outcome] += 1
    if any(ended.values()):
        terminalreporter.section("contract cases by store")
        for store, outcomes in ended.items():
            counts = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
            terminalreporter.write_line(f"{store:<10} {counts or 'did not run here'}")
