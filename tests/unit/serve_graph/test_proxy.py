"""The middleware in Serve's proxy, in process: plain ASGI applications that answer as the proxy does."""

import asyncio
import re
from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import RequestIdMiddleware, convert_object_to_asgi_messages
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schemas.errors import PROBLEM_MEDIA_TYPE, PROBLEM_TYPE_PREFIX, Problem
from serve_graph.proxy import ProblemAnswers, ValidRequestId, proxy_middlewares

LEAK = "The actor died: pid=4711, ip=10.0.0.7, ActorDiedError"
ID = "request-1"


def wrapped(app: ASGIApp) -> ASGIApp:
    """`app` where Serve's proxy is: inside its own middleware, which is inside ours, in its order."""
    app = RequestIdMiddleware(app)
    for middleware in proxy_middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return app


def scripted(*messages: Message, raises: Exception | None = None) -> ASGIApp:
    """An application that sends these messages, then raises or returns."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        if raises is not None:
            raise raises

    return app


def start(status: int, content_type: str | None = None, **headers: str) -> Message:
    fields = headers if content_type is None else {"content-type": content_type, **headers}
    return {
        "type": "http.response.start",
        "status": status,
        "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
    }


def body(content: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


async def ask(
    app: ASGIApp, method: str = "POST", request_id: str | None = ID, path: str = "/generate"
) -> httpx.Response:
    transport = httpx.ASGITransport(app=wrapped(app), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://wan.test") as http:
        headers = {} if request_id is None else {"x-request-id": request_id}
        return await http.request(method, path, headers=headers)


async def sent_by(app: ASGIApp, method: str = "GET") -> list[Message]:
    """What reaches the server, message by message."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await wrapped(app)({"type": "http", "method": method, "path": "/", "headers": []}, receive, send)
    return sent


def problem_of(answer: httpx.Response, status: int, kind: str) -> Problem:
    assert answer.status_code == status
    assert answer.headers.get_list("content-type") == [PROBLEM_MEDIA_TYPE]
    assert int(answer.headers["content-length"]) == len(answer.content)
    problem = Problem.model_validate_json(answer.content)
    assert (problem.type, problem.status) == (kind, status)
    assert answer.headers.get_list("x-request-id") == [problem.request_id]
    assert answer.headers.get("retry-after") == (None if problem.retry_after_s is None else str(problem.retry_after_s))
    for word in ("pid", "10.0.0.7", "ActorDied", "/generate"):
        assert word not in answer.text, word
    return problem


@pytest.mark.parametrize(
    ("status", "problem_status", "name", "retries"),
    [
        (404, 503, "model-not-ready", True),
        (500, 503, "worker-lost", True),
        (502, 503, "worker-lost", True),
        (503, 503, "worker-lost", True),
        (405, 405, "method-not-allowed", False),
        (413, 413, "body-too-large", False),
        (429, 429, "queue-full", True),
    ],
)
async def test_an_error_of_serves_own_becomes_a_problem_of_our_tree(
    status: int, problem_status: int, name: str, retries: bool
) -> None:
    answer = await ask(scripted(*convert_object_to_asgi_messages(LEAK, status_code=status)))

    problem = problem_of(answer, problem_status, PROBLEM_TYPE_PREFIX + name)
    assert problem.request_id == ID
    assert (problem.retry_after_s is not None) == retries


@pytest.mark.parametrize(
    ("status", "title", "retries"),
    [(400, "Bad Request", False), (408, "Request Timeout", True), (499, "Refused", False)],
)
async def test_a_refusal_that_the_tree_has_no_name_for_keeps_its_status(status: int, title: str, retries: bool) -> None:
    answer = await ask(scripted(*convert_object_to_asgi_messages(LEAK, status_code=status)))

    problem = problem_of(answer, status, "about:blank")
    assert problem.title == title
    assert (problem.retry_after_s is not None) == retries


async def test_a_request_that_gets_no_answer_gets_a_problem() -> None:
    """Serve's proxy returns without a word when the ingress's process dies before it answers."""
    problem_of(await ask(scripted()), 503, PROBLEM_TYPE_PREFIX + "worker-lost")


async def test_an_exception_of_the_proxy_gets_a_problem_and_goes_on_to_the_servers_log() -> None:
    app = scripted(raises=RuntimeError(LEAK))

    problem_of(await ask(app), 503, PROBLEM_TYPE_PREFIX + "worker-lost")
    with pytest.raises(RuntimeError, match="ActorDied"):
        await sent_by(app)


async def test_a_foreign_error_is_replaced_once_however_many_messages_it_has() -> None:
    foreign = (start(500, "text/html"), body(b"pid ", more=True), body(b"4711", more=True), body(b""))
    sent = await sent_by(scripted(*foreign))

    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert b"4711" not in sent[1]["body"]


async def test_an_exception_after_a_replaced_answer_adds_nothing_to_it() -> None:
    answer = await ask(scripted(start(500, "text/plain"), body(b"pid", more=True), raises=RuntimeError(LEAK)))

    problem_of(answer, 503, PROBLEM_TYPE_PREFIX + "worker-lost")


@pytest.mark.parametrize("content_type", [None, "text/plain", "text/html; charset=utf-8", "application/jsonp"])
async def test_an_error_of_any_other_content_type_is_replaced(content_type: str | None) -> None:
    answer = await ask(scripted(start(500, content_type), body(LEAK.encode())))

    problem_of(answer, 503, PROBLEM_TYPE_PREFIX + "worker-lost")


async def test_an_answer_to_head_has_a_problems_headers_and_no_body() -> None:
    headers, content = await sent_by(scripted(*convert_object_to_asgi_messages(LEAK, status_code=404)), "HEAD")

    assert headers["status"] == 503
    assert (b"content-type", PROBLEM_MEDIA_TYPE.encode()) in headers["headers"]
    assert dict(headers["headers"])[b"retry-after"]
    assert content["body"] == b""


@pytest.mark.parametrize(
    ("status", "content_type"),
    [
        (200, "text/plain"),
        (200, None),
        (206, "video/mp4"),
        (304, None),
        (307, None),
        (404, PROBLEM_MEDIA_TYPE),
        (500, PROBLEM_MEDIA_TYPE),
        (503, "application/json"),
        (503, "Application/JSON; charset=utf-8"),
    ],
)
async def test_an_answer_of_the_application_passes_untouched(status: int, content_type: str | None) -> None:
    answer = await ask(scripted(start(status, content_type, etag='"1"'), body(b"as it ", more=True), body(b"is")))

    assert (answer.status_code, answer.content) == (status, b"as it is")
    assert answer.headers.get("content-type") == content_type
    assert answer.headers["etag"] == '"1"'
    assert answer.headers.get_list("x-request-id") == [ID]


async def test_a_stream_passes_while_it_goes_on() -> None:
    sent: asyncio.Queue[Message] = asyncio.Queue()
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(200, "video/mp4"))
        await send(body(b"first", more=True))
        await go_on.wait()
        await send(body(b"last"))

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    serving = asyncio.ensure_future(wrapped(app)(scope, receive, sent.put))
    assert (await asyncio.wait_for(sent.get(), 10))["status"] == 200
    assert (await asyncio.wait_for(sent.get(), 10))["body"] == b"first"
    assert not serving.done()
    go_on.set()
    await serving
    assert sent.get_nowait()["body"] == b"last"


async def test_half_an_answer_is_not_followed_by_a_problem() -> None:
    half = (start(200, "video/mp4"), body(b"half", more=True))

    assert [message.get("body") for message in await sent_by(scripted(*half))] == [None, b"half"]


@pytest.mark.parametrize("sent", [None, "", "a b", "<script>", "x" * 129])
async def test_a_problem_has_a_valid_request_id_whatever_was_sent(sent: str | None) -> None:
    answer = await ask(scripted(*convert_object_to_asgi_messages(LEAK, status_code=404)), request_id=sent)

    problem = problem_of(answer, 503, PROBLEM_TYPE_PREFIX + "model-not-ready")
    assert re.fullmatch("[0-9a-f]{32}", problem.request_id or "")


@pytest.mark.parametrize("middleware", [ProblemAnswers, ValidRequestId])
async def test_what_is_not_http_passes_as_it_is(middleware: Any) -> None:
    passed: list[Any] = []

    async def app(*arguments: Any) -> None:
        passed.append(arguments)

    arguments = ({"type": "lifespan"}, object(), object())
    await middleware(app)(*arguments)
    assert passed == [arguments]


@pytest.mark.parametrize(("status", "answered"), [(404, 503), (429, 429), (500, 503)])
async def test_an_error_of_the_proxy_under_v1_has_openai_s_form(status: int, answered: int) -> None:
    app = scripted(start(status, "text/plain"), body(LEAK.encode()))
    answer = await ask(app, path="/v1/videos")
    assert (answer.status_code, answer.headers["content-type"]) == (answered, "application/json")
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert LEAK not in answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers.get_list("x-request-id") == [ID]


async def test_an_openai_error_of_the_application_passes() -> None:
    app = scripted(start(404, "application/json"), body(b'{"error": {}}'))
    answer = await ask(app, path="/v1/videos")
    assert (answer.status_code, answer.content) == (404, b'{"error": {}}')
