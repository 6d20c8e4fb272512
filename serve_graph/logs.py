"""Our log: one JSON object per line on stderr, one function per event. Imports no Ray and no web framework.

The logger is `wan`, apart from Ray Serve's: Serve drops fields named `job_id` and `task_id` from its own
lines, and other loggers never reach its files. It doesn't propagate, so no handler of the root or of Serve
repeats a line, and it writes to the process's first stderr, since Serve may swap `sys.stderr` for its logger.
The standard library does all of that; structlog or python-json-logger would replace the few lines of
formatter and not what matters here, which is what must stay out of a line:

- Prompts. A prompt appears as its keyed hash only, and parameters go without their two texts.
- Secrets. Fields whose names say key, signature, token and the like are redacted, and so are query strings
  and credentials inside any text.
- Messages of exceptions. Any library may quote its input in one, so it is left out. What is logged is the
  type, an OSError's code, and where it was raised: file, line and function of each frame, no locals and no
  source lines, for the exception and all that led to it; and a `WanError`'s name. Its `detail`, which never
  names a prompt, is logged where the status is a 5xx; a refusal's quotes the request. Ray Serve logs whatever
  a replica raises, so its logger gets our traceback in place of its own.
- Objects. Only plain data is written out; anything else shows its type, since a `repr` may hold all of this.

A field that doesn't apply is left out of its line.
"""

import errno
import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from enum import Enum
from math import isfinite
from numbers import Integral, Real
from pathlib import PurePath
from typing import Final, TextIO

from pydantic import BaseModel

from schemas.clips import Timings
from schemas.errors import WanError
from schemas.jobs import JobState
from schemas.requests import GenerationParameters

UNMATCHED: Final = "unmatched"
"""The route label of a request that no route template matched."""

LOGGER_NAME: Final = "wan"
REDACTED: Final = "[redacted]"
MAX_DEPTH: Final = 6
"""Containers inside containers beyond this, cycles among them, show their type only."""

MAX_FRAMES: Final = 50
"""Of each exception, the innermost ones: a runaway recursion has a thousand."""

FOREIGN_LOGGERS: Final = ("ray.serve", "uvicorn.error")
"""Loggers of others in this process that log whatever a handler of ours raised, message included."""

_LOGGER = logging.getLogger(LOGGER_NAME)
_SECRET_WORDS = frozenset(
    {
        *("authorization", "cookie", "cookies", "credential", "credentials", "key", "keys", "password"),
        *("query", "secret", "secrets", "signature", "token"),
    }
)
_QUERY = re.compile(r"\?[^\s\"'<>]*=[^\s\"'<>]*")
_USERINFO = re.compile(r"//[^\s/@]+@")
_JSON_INTS = range(-(2**63), 2**64)


def configure_logging(
    stream: TextIO | None = None, level: str = "INFO", *, deployment: str = "", replica: str = ""
) -> None:
    """Send this process's lines to `stream`, the process's own stderr when absent. A later call replaces it.

    Args:
        stream: Where lines go.
        level: The least level that is written, such as `INFO`.
        deployment: On every line; "" leaves it out.
        replica: On every line; "" leaves it out.

    Raises:
        ValueError: There is no such level.
    """
    handler = logging.StreamHandler(stream or sys.__stderr__)
    handler.setFormatter(_JsonLines(deployment, replica))
    _LOGGER.setLevel(level.upper())
    _LOGGER.handlers[:] = [handler]
    _LOGGER.propagate = False
    for name in FOREIGN_LOGGERS:
        logging.getLogger(name).addFilter(_hide_exception)


def log_request(
    *,
    request_id: str,
    method: str,
    route: str | None,
    status: int,
    duration_s: float,
    principal: str | None = None,
    job_id: str | None = None,
    error: str | None = None,
    prompt_hash: str | None = None,
    parameters: GenerationParameters | None = None,
) -> None:
    """One HTTP request was answered. route: the template, never the path; error: the problem's name."""
    fields = {
        "request_id": request_id,
        "principal": principal,
        "job_id": job_id,
        "method": method,
        "route": route or UNMATCHED,
        "status": status,
        "duration_s": duration_s,
        "error": error,
        "prompt_hash": prompt_hash,
        "parameters": _without_texts(parameters),
    }
    _emit(logging.ERROR if status >= 500 else logging.INFO, "request", fields)


def log_job(
    *,
    request_id: str,
    job_id: str,
    state: JobState,
    duration_s: float,
    prompt_hash: str,
    parameters: GenerationParameters,
    error: str | None = None,
    timings: Timings | None = None,
) -> None:
    """One job ended. error: the problem's name, of a job that did not succeed."""
    fields = {
        "request_id": request_id,
        "job_id": job_id,
        "state": state,
        "duration_s": duration_s,
        "error": error,
        "prompt_hash": prompt_hash,
        "parameters": _without_texts(parameters),
        "timings": timings,
    }
    _emit(logging.ERROR if state is JobState.FAILED else logging.INFO, "job", fields)


def log_event(event: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Something in the service's life: started, ready, model_loaded, stopping.

    Args:
        event: A fixed word, never made from input.
        level: One of `logging`'s.
        **fields: Facts about it. `time`, `deployment` and `replica` stay the line's own.
    """
    _emit(level, event, fields)


def log_failure(event: str, failure: BaseException, *, level: int = logging.ERROR, **fields: object) -> None:
    """Something raised: adds `exc_type` and `traceback`, and of a `WanError` its name as `error`."""
    _emit(level, event, fields | _failure_fields(failure))


class _JsonLines(logging.Formatter):
    """Writes a record of `_emit`, or of a logger below `wan`, as one line of ASCII JSON."""

    def __init__(self, deployment: str, replica: str) -> None:
        super().__init__()
        where = {"deployment": deployment, "replica": replica}
        self._where = {name: value for name, value in where.items() if value}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        envelope = {"time": time.replace("+00:00", "Z"), "level": record.levelname.lower(), **self._where}
        fields: dict[str, object] = getattr(record, "wan_fields", None) or _foreign_fields(record)
        return json.dumps({**envelope, **fields, **envelope})  # first for its order, last for its values


def _emit(level: int, event: str, fields: Mapping[str, object]) -> None:
    if not _LOGGER.isEnabledFor(level):
        return
    present = {name: value for name, value in fields.items() if value is not None}
    _LOGGER.log(level, "%s", event, extra={"wan_fields": _plain({"event": event, **present})})


def _foreign_fields(record: logging.LogRecord) -> dict[str, object]:
    """A free-form record's template without its arguments, any of which may be a prompt."""
    failure = record.exc_info[1] if record.exc_info else None
    fields = {"event": "message", "logger": record.name, "message": _plain(record.msg)}
    return fields if failure is None else fields | _failure_fields(failure)


def _hide_exception(record: logging.LogRecord) -> bool:
    """A filter that passes every record, its exception (if any) as our traceback: no messages, no source."""
    failure = record.exc_info[1] if record.exc_info else None
    if failure is not None:
        record.exc_info = (None, None, None)  # Ray's JSON formatter reads exc_text only where this is true
        record.exc_text = _traceback(failure)
    return True


def _without_texts(parameters: GenerationParameters | None) -> dict[str, object] | None:
    if parameters is None:
        return None
    return parameters.model_dump(exclude={"prompt", "negative_prompt", "levers"})


def _failure_fields(failure: BaseException) -> dict[str, object]:
    cause = _cause(failure)
    fields: dict[str, object] = {"exc_type": _type_name(cause)}
    if isinstance(cause, WanError):
        problem = cause.problem()
        fields["error"] = problem.name
        if problem.status >= 500:
            fields["detail"] = _text(problem.detail)
    return fields | {"traceback": _traceback(failure)}


def _cause(failure: BaseException) -> BaseException:
    """The error itself where Ray wrapped it: only the wrapped one's attributes can be trusted."""
    cause = getattr(failure, "cause", None)
    return cause if isinstance(cause, BaseException) else failure


def _traceback(failure: BaseException) -> str:
    """Each exception involved, the given one first, with its frames, the raising one last."""
    return "\n".join(line for exception in _involved(failure) for line in _frames(exception))


def _involved(failure: BaseException) -> Iterator[BaseException]:
    """`failure`, what it was raised from or during, and the members of groups; each once."""
    pending: list[BaseException | None] = [failure]
    seen: set[int] = set()
    while pending:
        exception = pending.pop(0)
        if exception is None or id(exception) in seen:
            continue
        seen.add(id(exception))
        yield exception
        context = None if exception.__suppress_context__ else exception.__context__
        pending += (exception.__cause__, context)
        if isinstance(exception, BaseExceptionGroup):
            pending += exception.exceptions


def _frames(exception: BaseException) -> Iterator[str]:
    code = errno.errorcode.get(exception.errno or 0) if isinstance(exception, OSError) else None
    yield _type_name(exception) + (f" [{code}]" if code else "")
    for frame, line in list(traceback.walk_tb(exception.__traceback__))[-MAX_FRAMES:]:
        yield f"  {frame.f_code.co_filename}:{line} in {frame.f_code.co_qualname}"


def _type_name(exception: BaseException) -> str:
    cls = type(exception)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _plain(value: object, depth: int = 0) -> object:
    """`value` as what JSON has, redacted; only the type's name of anything that isn't plain data."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | PurePath):
        return _text(str(value))
    if isinstance(value, Real):
        return _number(value)
    if isinstance(value, datetime):
        return value.isoformat()
    return _container(value, depth)


def _container(value: object, depth: int) -> object:
    if depth < MAX_DEPTH:
        if isinstance(value, dict):
            return {name: _field(name, item, depth + 1) for name, item in _named(value)}
        if isinstance(value, list | tuple | set | frozenset):
            return [_plain(item, depth + 1) for item in value]
    return f"<{type(value).__name__}>"


def _named(mapping: dict[object, object]) -> Iterator[tuple[str, object]]:
    return ((str(_plain(key, MAX_DEPTH)), item) for key, item in mapping.items())


def _field(name: str, value: object, depth: int) -> object:
    return REDACTED if _is_private(name) else _plain(value, depth)


def _is_private(name: str) -> bool:
    words = re.split(r"[^a-z0-9]+", name.lower())
    return words[-1] in {"prompt", "prompts"} or not _SECRET_WORDS.isdisjoint(words)


def _number(value: Real) -> object:
    if isinstance(value, Integral):
        return int(value) if int(value) in _JSON_INTS else f"<{type(value).__name__}>"
    number = float(value)
    return number if isfinite(number) else str(number)


def _text(text: str) -> str:
    return _USERINFO.sub(f"//{REDACTED}@", _QUERY.sub(f"?{REDACTED}", text))
