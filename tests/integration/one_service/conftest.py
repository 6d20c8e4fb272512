"""One service for all tests that leave it as they found it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.service import RunningService

HERE = Path(__file__).parent
RUNNING = pytest.StashKey[RunningService]()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[RunningService]:
    running = RunningService(tmp_path_factory.mktemp("service"), queue={"max_waiting_jobs": 320}).wait_ready()
    pytestconfig.stash[RUNNING] = running
    yield running
    running.stop()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop it after the last of them: an idle one takes an eighth of a core."""
    if nextitem is None or nextitem.path.parent != HERE:
        running = item.config.stash.get(RUNNING, None)
        if running is not None:
            running.stop()
