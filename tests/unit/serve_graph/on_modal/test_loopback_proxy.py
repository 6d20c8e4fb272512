"""The proxy to loopback: both ways as they stream, disconnects, headers for one hop, byte-exact paths."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from support import PATIENCE_S

from serve_graph.on_modal.proxy import LoopbackProxy


class Behind:
    """A server with a body counter, a stream that a test releases, and a request that never ends."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()
        self.headers: dict[str, str] = {}

    async def echo(self, request: Request) -> Response:
        self.headers = dict(request.headers)
        async for chunk in request.stream():
            self.chunks.append(chunk)
        raw = request.scope["raw_path"] + b"?" + request.scope["query_string"]
        headers = {"connection": "x-hop", "x-hop": "1", "x-end": "2", "keep-alive": "timeout=5"}
        return Response(raw + b"|" + b"".join(self.chunks), 201, headers)

    async def events(self, request: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            yield b"first"
            await self.go_on.wait()
            yield b"second"

        return StreamingResponse(stream())

    async def wait(self, request: Request) -> Response:
        await request.body()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.left.set()
        return Response()


@pytest.fixture
async def behind() -> AsyncIterator[tuple[Behind, int]]:
    server_side = Behind()
    routes = [
        Route("/events", server_side.events),
        Route("/wait", server_side.wait, methods=["GET", "POST"]),
        Route("/{path:path}", server_side.echo, methods=["GET", "POST"]),
    ]
    async with served(Starlette(routes=routes)) as port:
        yield server_side, port


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    """An ASGI application on a port of its own, over real HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="auto"))
        running = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await running


@pytest.fixture
async def http(behind: tuple[Behind, int]) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        served(LoopbackProxy(behind[1])) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client,
    ):
        yield client


async def test_paths_queries_bodies_and_headers_pass(http: httpx.AsyncClient, behind: tuple[Behind, int]) -> None:
    answer = await http.post("/a%2Fb/c%20d?x=%26&y=1", content=b"body", headers={"x-request-id": "r", "te": "gzip"})

    assert (answer.status_code, answer.content) == (201, b"/a%2Fb/c%20d?x=%26&y=1|body")
    assert answer.headers["x-end"] == "2"
    assert "x-hop" not in answer.headers
    assert behind[0].headers["x-request-id"] == "r"
    assert "te" not in behind[0].headers


async def test_an_answer_streams_while_it_is_made(http: httpx.AsyncClient, behind: tuple[Behind, int]) -> None:
    async with http.stream("GET", "/events") as answer:
        chunks = answer.aiter_raw()
        assert await anext(chunks) == b"first"
        behind[0].go_on.set()
        assert b"".join([chunk async for chunk in chunks]) == b"second"


async def test_a_body_streams_while_it_is_sent(http: httpx.AsyncClient, behind: tuple[Behind, int]) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        async with asyncio.timeout(PATIENCE_S):
            while b"one" not in behind[0].chunks:  # noqa: ASYNC110  # it must be there before the next is sent
                await asyncio.sleep(0.01)
        yield b"two"

    answer = await http.post("/", content=body())

    assert answer.content.endswith(b"|onetwo")


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_client_that_leaves_ends_the_request_behind(
    http: httpx.AsyncClient, behind: tuple[Behind, int], method: str
) -> None:
    content = b"body" if method == "POST" else None
    with pytest.raises(httpx.ReadTimeout):
        await http.request(method, "/wait", content=content, timeout=0.2)

    async with asyncio.timeout(PATIENCE_S):
        await behind[0].left.wait()


async def test_a_graph_that_is_away_is_a_503() -> None:
    async with served(LoopbackProxy(9)) as port, httpx.AsyncClient() as client:
        answer = await client.get(f"http://127.0.0.1:{port}/health")

    assert answer.status_code == 503
