"""The one place where an error becomes an HTTP answer: RFC 9457, and OpenAI's form under `/v1/`."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from schemas.errors import (
    PROBLEM_MEDIA_TYPE,
    FieldError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    Problem,
    RangeNotSatisfiable,
    RouteNotFound,
    WanError,
)
from schemas.model_profile import ModelProfile
from schemas.openai_videos import STATUS_FOR, ErrorAnswer
from serve_graph.api.context import context_of

MAX_FIELD_ERRORS = 32
"""The request has 16 fields; the rest is a body full of unknown ones, and its answer stays small."""

_BODY = "body"


OPENAI_PREFIX = "/v1"
"""Whoever asks below it expects OpenAI's errors, also where there is no such route."""


def problem_response(scope: Scope, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The HTTP form of a problem, with `Retry-After` where it has one."""
    retry = {} if problem.retry_after_s is None else {"Retry-After": str(problem.retry_after_s)}
    if scope["path"] == OPENAI_PREFIX or scope["path"].startswith(OPENAI_PREFIX + "/"):
        # The SDK sends what got a 409 again, unless it is told not to; no second would change ours.
        settled = {"x-should-retry": "false"} if problem.status == 409 else {}
        return JSONResponse(
            ErrorAnswer.of(problem).model_dump(mode="json"),
            status_code=STATUS_FOR.get(problem.status, problem.status),
            headers={**(headers or {}), **retry, **settled},
        )
    return Response(
        problem.model_dump_json(exclude_none=True),  # quick: a batch's may list thousands of mistakes
        status_code=problem.status,
        media_type=PROBLEM_MEDIA_TYPE,
        headers={**(headers or {}), **retry},
    )


def answer(request: Request, error: WanError, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with an error of the tree and leave its name for the log."""
    context = context_of(request.scope)
    problem = error.problem(request_id=context.request_id, job_id=context.job_id)
    context.error = problem.name
    return problem_response(request.scope, problem, headers)


def install_handlers(app: FastAPI, profile: ModelProfile, routes: Sequence[BaseRoute]) -> None:
    """Three of the four handlers; the fourth, for everything else, is `RequestMiddleware`.

    routes: the application's. A path may have several, and Starlette's 405 knows the methods of the first only.
    """

    async def on_wan_error(request: Request, error: Exception) -> Response:
        headers = None
        if isinstance(error, RangeNotSatisfiable):
            headers = {"Content-Range": f"bytes */{error.size_bytes}"}
        return answer(request, error if isinstance(error, WanError) else InternalError(), headers)

    async def on_invalid(request: Request, error: Exception) -> Response:
        mistakes = error.errors() if isinstance(error, RequestValidationError) else []
        return answer(request, InvalidRequest(field_errors(mistakes, profile)))

    async def on_http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        if status == 405:
            methods = (getattr(r, "methods", ()) for r in routes if r.matches(request.scope)[0] is not Match.NONE)
            headers["Allow"] = ", ".join(sorted(set().union(*methods)))
        return answer(request, _http_error(status), headers)

    app.add_exception_handler(WanError, on_wan_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)


def field_errors(mistakes: Sequence[Any], profile: ModelProfile) -> list[FieldError]:
    """pydantic's first mistakes with the profile's legal values, and without what the client sent."""
    return [_field_error(mistake, profile) for mistake in mistakes[:MAX_FIELD_ERRORS]]


def _field_error(mistake: Mapping[str, Any], profile: ModelProfile) -> FieldError:
    path = [str(part) for part in mistake["loc"] if part != _BODY]
    kind = str(mistake["type"])
    if kind == "json_invalid":
        return FieldError(field=_BODY, message="is not valid JSON")
    if not path and kind in {"model_attributes_type", "model_type", "dict_type"}:
        return FieldError(field=_BODY, message="must be a JSON object, sent with Content-Type: application/json")
    if not path and kind == "missing":
        return FieldError(field=_BODY, message="is missing")
    field = ".".join(path) or _BODY
    if kind == "extra_forbidden":
        return FieldError(field=field[:64], message="is not a field of this request")
    legal = profile.legal(field)
    message = str(mistake["msg"]).removeprefix("Value error, ")
    return FieldError(field=field, message=message + (f"; legal: {legal}" if legal else ""), legal=legal)


def _http_error(status: int) -> WanError:
    if status == 404:
        return RouteNotFound("there is nothing here; /docs lists the routes")
    if status == 405:
        return MethodNotAllowed("the Allow header lists this route's methods")
    if status == 400:  # FastAPI's answer to a body that its JSON parser can't finish
        return InvalidRequest([FieldError(field=_BODY, message="is not valid JSON")])
    return InternalError()
