"""Thousands of requests, made from the OpenAPI document, to the API on a real uvicorn."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support
import uvicorn
from api_under_test import open_api, small_mp4
from openapi_fuzz.run import fuzz
from support import LogLines

MAX_EXAMPLES = int(os.environ.get("WAN_FUZZ_EXAMPLES", "100"))
"""For each operation; the fixed cases come on top."""

MIN_CASES = 2_000


@pytest.fixture
def base_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The API on a loopback port, in a thread with a loop of its own."""
    servers: list[uvicorn.Server] = []
    monkeypatch.setattr(support, "CLIP_BYTES", small_mp4(tmp_path))  # something to make thumbnails of

    async def serve(listener: socket.socket) -> None:
        async with open_api(tmp_path / "store", LogLines()) as api:
            servers.append(uvicorn.Server(uvicorn.Config(api.app, log_config=None, access_log=False)))
            started.set()
            await servers[0].serve(sockets=[listener])

    started = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio leaves it off for a socket made here
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(serve(listener)))
        thread.start()
        assert started.wait(20)
        yield f"http://127.0.0.1:{port}"
        servers[0].should_exit = True
        thread.join()


@pytest.mark.timeout(3_600)
def test_every_answer_is_as_documented(base_url: str, tmp_path: Path, tell: Callable[[str, str], None]) -> None:
    outcome = fuzz(base_url, tmp_path, MAX_EXAMPLES)
    tell("OpenAPI cases", f"the API in process: {outcome.cases} in {outcome.seconds:.0f} s")
    assert outcome.passed, outcome.output
    assert outcome.operations == 23
    assert outcome.cases >= MIN_CASES
    assert not [name for name, number in outcome.accepted.items() if number == 0], outcome.accepted
