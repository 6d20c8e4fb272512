from collections.abc import Iterator

import pytest

from tests.integration.service import RunningService


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One service for all tests that leave it as they found it."""
    running = RunningService(tmp_path_factory.mktemp("service"), queue={"max_waiting_jobs": 320}).wait_ready()
    yield running
    running.stop()
