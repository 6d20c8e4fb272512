"""Fixtures of the API's tests."""

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from api_under_test import Api, open_api
from support import LogLines

from serve_graph.logs import FOREIGN_LOGGERS, LOGGER_NAME, configure_logging


@pytest.fixture
def log() -> Iterator[LogLines]:
    """What the service logs, the loggers put back afterwards."""
    names = (LOGGER_NAME, *FOREIGN_LOGGERS)
    loggers = [logging.getLogger(name) for name in names]
    before = [(lg, lg.level, lg.handlers[:], lg.filters[:], lg.propagate) for lg in loggers]
    lines = LogLines()
    configure_logging(lines)
    yield lines
    for logger, level, handlers, filters, propagate in before:
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:], logger.propagate = handlers, filters, propagate


@pytest.fixture
async def api(tmp_path: Path, log: LogLines) -> AsyncIterator[Api]:
    """The API over a fresh store."""
    async with open_api(tmp_path / "store", log) as opened:
        yield opened
