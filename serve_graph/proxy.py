"""What Serve's HTTP proxy runs in front of its own middleware: only valid request ids get past it.

The proxy echoes `X-Request-ID` on every answer, its own errors included, whatever it holds; ids are checked here.
Named by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.
"""

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_graph.api.request_id import REQUEST_ID_HEADER, request_id_of

CALLBACK = "serve_graph.proxy:proxy_middlewares"


class ValidRequestId:
    """Replaces a missing or malformed `X-Request-ID` with a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a valid id."""
        if scope["type"] == "http":
            headers = MutableHeaders(scope=scope)
            headers[REQUEST_ID_HEADER] = request_id_of(headers.get(REQUEST_ID_HEADER))
        await self._app(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """Serve calls this once per proxy."""
    return [Middleware(ValidRequestId)]
