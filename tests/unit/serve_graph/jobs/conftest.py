"""Fixtures of the job service's tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import Jobs, open_jobs


@pytest.fixture
async def jobs(tmp_path: Path) -> AsyncIterator[Jobs]:
    """A service over a fresh store; it sees to its own jobs only, until it is started."""
    with open_jobs(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of other processes' jobs are looked at without a pause."""
    monkeypatch.setattr("serve_graph.jobs.following.LOOK_INTERVAL_S", 0.01)
