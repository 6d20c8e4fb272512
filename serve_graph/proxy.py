"""What Serve's HTTP proxy runs in front of its own middleware: valid request ids, and errors as problem documents.

The proxy echoes `X-Request-ID` on every answer, its own errors included, whatever it holds; ids are checked here.
Its own errors are plain text that may quote a process id or an address, or no answer at all; clients get one of
our problems instead. Named by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.
"""

from http.client import responses

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schemas.errors import (
    PROBLEM_MEDIA_TYPE,
    PROBLEM_TYPE_PREFIX,
    BodyTooLarge,
    MethodNotAllowed,
    ModelNotReady,
    Problem,
    QueueFull,
    WorkerLost,
)
from serve_graph.api.problems import problem_response
from serve_graph.api.request_id import REQUEST_ID_HEADER, request_id_of
from serve_graph.niceness import step_back

CALLBACK = "serve_graph.proxy:proxy_middlewares"

OUR_ERROR_TYPES = frozenset({PROBLEM_MEDIA_TYPE, "application/json"})
"""What the application's errors are: problem documents, OpenAI's under `/v1/`, and `/health`'s state with its 503."""

RETRY_AFTER_S = 5

_REFUSALS = {cls.status: cls for cls in (MethodNotAllowed, BodyTooLarge, QueueFull)}


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


class ProblemAnswers:
    """Answers with a problem where the proxy answers with an error of its own, or not at all.

    Every other answer passes message by message. Goes inside `ValidRequestId`, whose id it repeats.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; passes anything but HTTP through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = replaced = False

        async def answer(status: int) -> None:
            nonlocal started
            started = True
            request_id = request_id_of(Headers(scope=scope).get(REQUEST_ID_HEADER))
            response = problem_response(scope, proxy_problem(status, request_id), {REQUEST_ID_HEADER: request_id})
            if scope["method"] == "HEAD":
                response.body = b""  # its length stays in the headers
            await response(scope, receive, send)

        async def pass_or_replace(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start" and _is_foreign_error(message):
                replaced = True
                await answer(message["status"])
            elif not replaced:
                started = True
                await send(message)

        try:
            await self._app(scope, receive, pass_or_replace)
        except Exception:  # whatever Serve raises, the client gets a problem and not its text
            if not started:
                await answer(500)
            raise  # for the server's log
        if not started:  # Serve returns like this when the ingress's process dies
            await answer(500)


def _is_foreign_error(start: Message) -> bool:
    """Whether an `http.response.start` begins an error answer that the application didn't make."""
    media_type = Headers(raw=list(start.get("headers", ()))).get("content-type", "").split(";")[0]
    return start["status"] >= 400 and media_type.strip().lower() not in OUR_ERROR_TYPES


def proxy_problem(status: int, request_id: str) -> Problem:
    """What to tell instead of an error of the proxy's own. Its wording stays here, as it quotes the inside.

    The proxy's 404 says that there is no application: the application's own 404s are problems already. Of its
    other refusals, one that our tree has no name for is `about:blank`, RFC 9457's type for the bare status.
    """
    if status == 404:
        return ModelNotReady("the service is starting or shutting down", RETRY_AFTER_S).problem(request_id)
    if status >= 500:
        detail = "no process of the service could answer this; send the request again"
        return WorkerLost(detail, RETRY_AFTER_S).problem(request_id)
    refusal = _REFUSALS.get(status)
    return Problem(
        type="about:blank" if refusal is None else PROBLEM_TYPE_PREFIX + refusal.name,
        title=responses.get(status, "Refused") if refusal is None else refusal.title,
        status=status,
        detail="the service's proxy refused this request",
        request_id=request_id,
        retry_after_s=RETRY_AFTER_S if status in {408, 429} else None,
    )


def proxy_middlewares() -> list[Middleware]:
    """Serve calls this once per proxy; the last one is the outermost."""
    step_back()
    return [Middleware(ProblemAnswers), Middleware(ValidRequestId)]
