"""Around every request: its id, its API key, the bound on its body, its log line, its metrics, and the last resort
for errors.

Plain ASGI, since Starlette's `BaseHTTPMiddleware` hides a client's disconnect from the routes.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schemas.errors import BodyTooLarge, Forbidden, InternalError, RateLimited, Unauthorized, WanError
from serve_graph.api.auth import Authenticator
from serve_graph.api.context import begin_context
from serve_graph.api.problems import problem_response
from serve_graph.api.request_id import REQUEST_ID_HEADER, request_id_of
from serve_graph.logs import log_failure, log_request
from serve_graph.metrics import IngressMetrics

CLIENT_CLOSED_REQUEST = 499
"""For the log and the metrics only: the client went away before there was an answer. Source: nginx."""


REFUSALS = (BodyTooLarge, Unauthorized, Forbidden, RateLimited)
"""What is refused here, before there is a route's handler."""


class RequestMiddleware:
    """Wraps the whole application; see the module's docstring.

    routes: the application's, to name the route of a request that ends before it is routed.
    streamed: routes that read their body themselves, by template, and how many bytes each takes.
    echo_request_id: put the id on the answer; off where a proxy in front does.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        routes: Sequence[BaseRoute],
        metrics: IngressMetrics,
        max_body_bytes: int,
        streamed: Mapping[str, int],
        echo_request_id: bool,
        authenticator: Authenticator,
    ) -> None:
        self._app = app
        self._routes = routes
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._streamed = streamed
        self._echo_request_id = echo_request_id
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; passes anything but HTTP through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        context = begin_context(scope, request_id_of(Headers(scope=scope).get(REQUEST_ID_HEADER)))
        status = CLIENT_CLOSED_REQUEST

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._echo_request_id:
                    MutableHeaders(scope=message)[REQUEST_ID_HEADER] = context.request_id
            await send(message)

        try:
            route = self._template(scope)
            context.principal = self._authenticator.principal(scope, route)
            limit = self._streamed.get(route or "")
            if limit is not None and scope["method"] == "POST":
                _check_announced(scope, limit)
                await self._app(scope, _bounded(receive, limit), send_with_id)
                return
            body = await self._read_body(scope, receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), send_with_id)
        except Exception as failure:  # the fourth handler: whatever got past the other three
            if not isinstance(failure, REFUSALS):
                log_failure("request_failed", failure, request_id=context.request_id)
                failure = InternalError()
            context.error = failure.name
            if status != CLIENT_CLOSED_REQUEST:
                raise  # half an answer is out; the server has to cut the connection
            problem = failure.problem(request_id=context.request_id, job_id=context.job_id)
            response = problem_response(scope, problem, _challenge(scope, failure))
            await response(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - began
            route = self._template(scope)
            self._metrics.request_answered(route, scope["method"], status, seconds)
            log_request(
                request_id=context.request_id,
                principal=context.principal.name,
                method=scope["method"],
                route=route,
                status=status,
                duration_s=seconds,
                job_id=context.job_id,
                error=context.error,
                prompt_hash=context.prompt_hash,
                parameters=context.parameters,
            )

    def _template(self, scope: Scope) -> str | None:
        """The path template of the request's route, chosen as the router does; None where no route matches."""
        if "route" not in scope:
            matches = [(route.matches(scope)[0], route) for route in self._routes]
            for wanted in (Match.FULL, Match.PARTIAL):
                for match, route in matches:
                    if match is wanted:
                        return getattr(route, "path", None)
        return getattr(scope.get("route"), "path", None)

    async def _read_body(self, scope: Scope, receive: Receive) -> deque[Message] | None:
        """The body's messages, held here so that its size is known before anything is parsed.

        None when the client went away before it had sent all of it.
        """
        _check_announced(scope, self._max_body_bytes)
        messages: deque[Message] = deque()
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._max_body_bytes:
                raise BodyTooLarge(self._max_body_bytes)
            if not message.get("more_body", False):
                return messages


def _challenge(scope: Scope, failure: WanError) -> dict[str, str] | None:
    """The `WWW-Authenticate` of a 401 (RFC 6750): without an error where no key was sent."""
    if not isinstance(failure, Unauthorized):
        return None
    error = ', error="invalid_token"' if "authorization" in Headers(scope=scope) else ""
    return {"WWW-Authenticate": f'Bearer realm="wan-serve"{error}'}


def _check_announced(scope: Scope, max_bytes: int) -> None:
    announced = Headers(scope=scope).get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:12]) > max_bytes:
        raise BodyTooLarge(max_bytes)


def _bounded(receive: Receive, max_bytes: int) -> Receive:
    """The body as it comes in. Raises BodyTooLarge in whoever reads too much of it."""
    size = 0

    async def bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > max_bytes:
            raise BodyTooLarge(max_bytes)
        return message

    return bounded


def _replay(messages: deque[Message], receive: Receive) -> Receive:
    async def replay() -> Message:
        return messages.popleft() if messages else await receive()

    return replay
