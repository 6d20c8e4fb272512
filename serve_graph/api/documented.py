"""Pieces of the OpenAPI document that several routes share."""

from typing import Any

from fastapi import Security
from fastapi.security import HTTPBearer

from schemas.errors import PROBLEM_MEDIA_TYPE

RETRY_STATUSES = (429, 503)
"""Each problem with one of these has a `Retry-After`."""

API_KEY: list[Any] = [Security(HTTPBearer(auto_error=False, description="An API key; `wan-serve key new` makes one."))]
"""For the OpenAPI document; `RequestMiddleware` checks keys."""

KEY_PROBLEMS = (401, 403, 429)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries for the problem documents that a route may answer with.

    No `model`: FastAPI would add it as application/json. `Problem` is in the document through `Job`.
    """
    content = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    retry = {"headers": {"Retry-After": header("Seconds to wait.", "integer")}}
    return {
        status: {"content": content, "description": "A problem", **(retry if status in RETRY_STATUSES else {})}
        for status in statuses
    }


def header(description: str, kind: str = "string", *, required: bool = True) -> dict[str, Any]:
    """The OpenAPI entry for a header of an answer."""
    return {"description": description, "required": required, "schema": {"type": kind}}
