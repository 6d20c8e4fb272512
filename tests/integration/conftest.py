from collections.abc import Iterator

import pytest

from tests.integration.service import RunningService

SHARED = pytest.StashKey[RunningService]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that use the shared service come first, on one worker, one after the other."""
    files = {item.path for item in items if _shares(item)}
    items.sort(key=lambda item: item.path not in files)
    for item in items:
        if item.path in files:
            item.add_marker(pytest.mark.xdist_group("one service"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the shared service after the last of them: an idle one takes an eighth of a core."""
    running = item.config.stash.get(SHARED, None)
    if running is not None and (nextitem is None or _group(nextitem) != _group(item)):
        running.stop()


def _group(item: pytest.Item) -> pytest.Mark | None:
    return item.get_closest_marker("xdist_group")


def _shares(item: pytest.Item) -> bool:
    """Whether it uses this `service`, and not one of its own file."""
    return isinstance(item, pytest.Function) and "service" in item.fixturenames and not hasattr(item.module, "service")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[RunningService]:
    """One service for all tests that leave it as they found it."""
    running = RunningService(tmp_path_factory.mktemp("service"), queue={"max_waiting_jobs": 320}).wait_ready()
    pytestconfig.stash[SHARED] = running
    yield running
    running.stop()
