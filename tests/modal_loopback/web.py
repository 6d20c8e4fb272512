"""HTTP to web functions, each on a port of its own: a request is a call, its body and answer are the call's data.

A request that has no answer after a while is sent to another address, where the answer can be waited for: a 303, as
Modal answers after 150 s.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from modal._serialization import _deserialize_asgi, _serialize_asgi, deserialize_data_format, serialize
from modal_proto import api_pb2
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modal_loopback.calls import Call, Calls
from modal_loopback.records import Function
from modal_loopback.rpc import Changes

CALL_ID = "__modal_function_call_id"
"""The query parameter of the address that a slow request is sent to."""


class Sites:
    """HTTP servers on the running loop."""

    def __init__(self) -> None:
        self._servers: list[tuple[uvicorn.Server, asyncio.Task[None]]] = []

    def open(self, app: ASGIApp) -> str:
        """Serve an app on a free port. Returns the URL."""
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        self._servers.append((server, asyncio.create_task(server.serve(sockets=[listener]))))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    async def close(self) -> None:
        for server, _ in self._servers:
            server.should_exit = server.force_exit = True
        await asyncio.gather(*[task for _, task in self._servers])


class Ingress:
    """The requests to web functions."""

    def __init__(self, calls: Calls, changes: Changes, blob: Callable[[str], bytes], redirect_after_s: float) -> None:
        self._calls = calls
        self._changes = changes
        self._blob = blob
        self._redirect_after_s = redirect_after_s

    def app(self, function: Function, method: str) -> ASGIApp:
        """The ASGI app that stands for a web function in front of its containers."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            call = self._resumed(scope) or self._begin(function, method, scope)
            feeding = asyncio.create_task(self._feed(call, receive))
            try:
                async for message in self._answer(call, scope["path"]):
                    await send(message)
            finally:
                feeding.cancel()

        return serve

    def _resumed(self, scope: Scope) -> Call | None:
        call_id = parse_qs(scope["query_string"].decode()).get(CALL_ID, [""])[0]
        return self._calls.calls.get(call_id)

    def _begin(self, function: Function, method: str, scope: Scope) -> Call:
        call = self._calls.open(function, api_pb2.FUNCTION_CALL_INVOCATION_TYPE_SYNC)
        carried = _deserialize_asgi(_serialize_asgi(scope))  # only what Modal's own message can carry
        payload = api_pb2.FunctionInput(
            args=serialize(((carried,), {})), data_format=api_pb2.DATA_FORMAT_PICKLE, method_name=method
        )
        call.is_web = True
        self._calls.add(call, 0, payload)
        return call

    async def _feed(self, call: Call, receive: Receive) -> None:
        """Pass the body on, and that the client went away."""
        if call.data_in:  # another connection sent it
            return
        while True:
            message = await receive()
            self._calls.put_data_in(call, _serialize_asgi(message).SerializeToString())
            if message["type"] == "http.disconnect":
                return

    async def _answer(self, call: Call, path: str) -> AsyncIterator[Message]:
        """The messages of a call's answer, a 303 when there is none in time, or a 500 when there will be none."""
        sent = 0
        while True:
            timeout_s = self._redirect_after_s if sent == 0 else None
            await self._changes.until(lambda sent=sent: len(call.data_out) > sent or call.outputs, timeout_s)
            if len(call.data_out) > sent:
                message = self._message(call.data_out[sent])
                sent += 1
                yield message
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    return
            elif sent:
                return  # the server closes a connection whose answer is not complete
            else:
                location = [(b"location", f"{path}?{CALL_ID}={call.call_id}".encode())]
                status, headers = (500, []) if call.outputs else (303, location)
                yield {"type": "http.response.start", "status": status, "headers": headers}
                yield {"type": "http.response.body", "body": b"modal-http: internal error" if status == 500 else b""}
                return

    def _message(self, chunk: api_pb2.DataChunk) -> dict[str, Any]:
        data = self._blob(chunk.data_blob_id) if chunk.data_blob_id else chunk.data
        message = deserialize_data_format(data, chunk.data_format, None)
        message.pop("trailers", None)
        return message
