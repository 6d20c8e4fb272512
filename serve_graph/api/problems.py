"""The one place where an error becomes an HTTP answer (RFC 9457)."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

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
from serve_graph.api.context import context_of

MAX_FIELD_ERRORS = 32
"""The request has 16 fields; the rest is a body full of unknown ones, and its answer stays small."""

_BODY = "body"


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The HTTP form of a problem, with `Retry-After` where it has one."""
    retry = {} if problem.retry_after_s is None else {"Retry-After": str(problem.retry_after_s)}
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
    return problem_response(problem, headers)


def install_handlers(app: FastAPI, profile: ModelProfile) -> None:
    """Three of the four handlers; the fourth, for everything else, is `RequestMiddleware`."""

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
        headers = error.headers if isinstance(error, HTTPException) else None
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
