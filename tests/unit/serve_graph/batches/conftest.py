"""A service for the tests of batches."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from batch_support import Served, served


@pytest.fixture
async def batches(tmp_path: Path) -> AsyncIterator[Served]:
    with served(tmp_path / "store") as opened:
        opened.service.start()
        yield opened
        await opened.service.drain(5.0)
