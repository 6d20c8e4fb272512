"""What `POST` headers say about the answer: `Prefer` (RFC 7240) and `Idempotency-Key`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from schemas.errors import FieldError, InvalidRequest

RESPOND_ASYNC = "respond-async"
MAX_WAIT_S = 24 * 3600

PREFER: dict[str, Any] = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "`respond-async` answers at once; `wait=N` waits for N seconds at most.",
    "schema": {"type": "string"},
    "example": RESPOND_ASYNC,
}
"""Documented by hand: a header may come in several lines, which FastAPI would call an array."""

IDEMPOTENCY_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "1 to 255 visible ASCII characters; the same key and body give the same job.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}

_KEY = re.compile(r"[!-~]{1,255}")
_WAIT = re.compile(r"wait=([0-9]{1,9})")


@dataclass(frozen=True)
class Preference:
    """How long a client wants to wait for the clip, in seconds. None: until it is there.

    applied: the preference that is honoured, for `Preference-Applied`.
    """

    wait_s: float | None = None
    applied: str | None = None

    @classmethod
    def of(cls, headers: Iterable[str]) -> "Preference":
        """What the `Prefer` headers ask for. Unknown preferences and malformed ones are ignored, as RFC 7240 says.

        `respond-async` with `wait=N`: wait for so long and answer with the job then.
        """
        preferences = [part.split(";")[0].strip().lower() for part in ",".join(headers).split(",")]
        waits = [int(match[1]) for match in map(_WAIT.fullmatch, preferences) if match]
        if waits:
            return cls(min(waits[0], MAX_WAIT_S), f"wait={waits[0]}")
        if RESPOND_ASYNC in preferences:
            return cls(0.0, RESPOND_ASYNC)
        return cls()


def idempotency_key(request: Request) -> str | None:
    """The request's `Idempotency-Key`. Raises InvalidRequest for one that is none."""
    sent = request.headers.getlist("idempotency-key")
    if not sent:
        return None
    if len(sent) > 1 or not _KEY.fullmatch(sent[0]):
        legal = "1 to 255 visible ASCII characters, once"
        raise InvalidRequest([FieldError(field="Idempotency-Key", message=f"must be {legal}", legal=legal)])
    return sent[0]
