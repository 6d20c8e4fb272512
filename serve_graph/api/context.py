"""What one HTTP request gathers on its way, for its log line and its answer."""

from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from schemas.requests import GenerationParameters
from serve_graph.api_keys import NOBODY, Principal

_KEY = "wan.context"


@dataclass
class RequestContext:
    """Filled in by the routes; read by `RequestMiddleware` when the request ends."""

    request_id: str
    principal: Principal = NOBODY
    job_id: str | None = None
    error: str | None = None
    prompt_hash: str | None = None
    parameters: GenerationParameters | None = None


def begin_context(scope: Scope, request_id: str) -> RequestContext:
    """Give a request its context."""
    context = RequestContext(request_id)
    scope[_KEY] = context
    return context


def context_of(scope: Scope) -> RequestContext:
    """The context that the middleware began."""
    context: Any = scope[_KEY]
    if not isinstance(context, RequestContext):
        raise RuntimeError("the request middleware is not installed")
    return context
