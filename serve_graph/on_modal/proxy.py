"""An ASGI application that hands each request to an HTTP server on loopback, and its answer back, as they stream.

The client's going away closes the request; headers that are for one hop stay here (RFC 9110, section 7.6.1).
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from urllib.parse import quote

import httpx
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    }
)


class LoopbackProxy:
    """port: of the server on 127.0.0.1. All of it belongs to one event loop."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        # No time limit: a request may wait for its clip as long as its client does.
        self._http = httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)  # noqa: S113  # streams last as long as jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; a lifespan is answered, and websockets are refused."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"the graph speaks no {scope['type']}")
        sends_body = _sends_body(scope)
        body = _Body(receive, ended=not sends_body)
        request = self._http.build_request(
            scope["method"],
            httpx.URL(self._base, raw_path=_raw_path(scope)),
            headers=_end_to_end(scope["headers"]),
            content=body.chunks() if sends_body else None,
        )
        answering = asyncio.create_task(self._answer(request, scope, send))
        leaving = asyncio.create_task(body.client_gone())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, request: httpx.Request, scope: Scope, send: Send) -> None:
        try:
            answer = await self._http.send(request, stream=True)
        except httpx.TransportError:
            await PlainTextResponse("the graph in this container does not answer", 503)(scope, _never, send)
            return
        try:
            headers = _end_to_end(answer.headers.raw)
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            async for chunk in answer.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await answer.aclose()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._http.aclose()
        await send({"type": "lifespan.shutdown.complete"})


async def _never() -> Message:
    raise RuntimeError("a plain answer reads no request")


def _raw_path(scope: Scope) -> bytes:
    """Path and query, byte for byte as they came."""
    path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    query: bytes = scope.get("query_string", b"")
    return path.split(b"?")[0] + (b"?" + query if query else b"")


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without those for one hop, those that `Connection` names among them."""
    headers = [(name.lower(), value) for name, value in headers]
    named = {part.strip().lower() for name, value in headers if name == b"connection" for part in value.split(b",")}
    return [(name, value) for name, value in headers if name not in HOP_BY_HOP | named]


def _sends_body(scope: Scope) -> bool:
    names = {name.lower() for name, _ in scope["headers"]}
    return bool(names & {b"content-length", b"transfer-encoding"})


class _Body:
    """A request's body as it comes, and the client's going away, which come over one channel."""

    def __init__(self, receive: Receive, *, ended: bool) -> None:
        self._receive = receive
        self._read = asyncio.Event()
        self._gone = asyncio.Event()
        if ended:
            self._read.set()

    async def chunks(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._gone.set()
                raise httpx.ReadError("the client has gone")
            more = message.get("more_body", False)
            yield message.get("body", b"")
        self._read.set()

    async def client_gone(self) -> None:
        """Returns once the client is gone. Listens only after the body, which nobody else may take from the channel."""
        reading, gone = asyncio.create_task(self._read.wait()), asyncio.create_task(self._gone.wait())
        try:
            await asyncio.wait({reading, gone}, return_when=asyncio.FIRST_COMPLETED)
            while not self._gone.is_set():
                if (await self._receive())["type"] == "http.disconnect":
                    self._gone.set()
        finally:
            reading.cancel()
            gone.cancel()
