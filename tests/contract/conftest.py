"""The stores under test, and how many cases ran on which; their servers are fixtures of `tests/conftest.py`."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_servers.process import S3Server
from store_cases import StoreCase, local_case, s3_case

S3_SERVERS = {"ministack": "ministack", "ceph": "Ceph RGW"}
STORES = {"local": "local folder", **S3_SERVERS}
"""By the name of the parameter, as the summary calls it."""

CONTRACT, S3_ONLY = "store contract", "S3 alone"


@pytest.fixture(params=S3_SERVERS)
def s3_server(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> S3Server:
    """Each S3 server in turn, in the state in which the tests before left it."""
    record_property(S3_ONLY, request.param)
    server: S3Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture(params=STORES)
def case(
    request: pytest.FixtureRequest, tmp_path: Path, record_property: Callable[[str, object], None]
) -> Iterator[StoreCase]:
    """Each store in turn, empty."""
    record_property(CONTRACT, request.param)
    opened = local_case(tmp_path) if request.param == "local" else s3_case(request.getfixturevalue(request.param))
    with opened as store_case:
        yield store_case


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many cases of the contract, and how many tests of what only S3 has, ran on which store."""
    ran = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    counts: dict[str, Counter[tuple[str, str]]] = {CONTRACT: Counter(), S3_ONLY: Counter()}
    for report in ran:
        for suite, store in report.user_properties if report.when == "call" else ():
            if suite in counts:
                counts[suite][str(store), report.outcome] += 1
    if any(counts.values()):
        terminalreporter.section("cases by store")
    for suite, cases in counts.items():
        stores = [name for name in STORES if cases[name, "passed"] or cases[name, "failed"]]
        if stores:
            terminalreporter.write_line(f"{suite}: {', '.join(_count(name, cases) for name in stores)}")


def _count(store: str, cases: Counter[tuple[str, str]]) -> str:
    failed = cases[store, "failed"]
    return f"{STORES[store]} {cases[store, 'passed'] + failed}" + (f" ({failed} failed)" if failed else "")
