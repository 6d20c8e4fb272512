"""Follows a job: server-sent events while they come, polling where they don't."""

import time
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from schemas.jobs import Job
from serve_graph.client.errors import ApiProblem, ServiceUnreachable, UnexpectedAnswer
from serve_graph.client.http import Connection, retry_after_s

EVENT_STREAM: Final = "text/event-stream"
POLL_S: Final = 1.0
"""Where the service gives no hint."""

_STREAMS: Final = 3
"""How many streams in a row may break before they tell anything; what buffers events on the way breaks them all."""

_NOT_OFFERED: Final = frozenset({"route-not-found", "method-not-allowed"})

_Model = TypeVar("_Model", bound=BaseModel)


def follow(connection: Connection, job_id: str) -> Iterator[Job]:
    """The job now and after each change, its end last.

    A broken stream or a restart of the service only costs time, up to the connection's patience.
    Raises ApiProblem, ServiceUnreachable, UnexpectedAnswer.
    """
    streams_left = _STREAMS
    while True:
        if streams_left > 0:
            streams_left -= 1
            try:
                for job in _streamed(connection, job_id):
                    streams_left = _STREAMS
                    yield job
                    if job.state.is_terminal:
                        return
            except ApiProblem as problem:
                if problem.problem.name in _NOT_OFFERED:
                    streams_left = 0
                elif retry_after_s(problem) is None:
                    raise
            except (ServiceUnreachable, UnexpectedAnswer):
                pass  # polling finds out whether the service is still there
        job, pause_s = poll(connection, job_id)
        yield job
        if job.state.is_terminal:
            return
        time.sleep(pause_s)  # as the service's Retry-After asks


def poll(connection: Connection, job_id: str) -> tuple[Job, float]:
    """A job, and the seconds until it is worth asking again."""
    answer = connection.send("GET", f"/jobs/{job_id}")
    hint = answer.headers.get("retry-after", "")
    return parsed(Job, answer.content, connection), float(hint) if hint.isdecimal() else POLL_S


def parsed(model: type[_Model], content: bytes, connection: Connection) -> _Model:
    """An answer's body as one of the schemas. Raises UnexpectedAnswer."""
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise UnexpectedAnswer(connection.server, f"no {model.__name__}") from error


def event_data(lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """The name and data of each server-sent event; comments and other fields are left out.

    Source: the HTML standard, 9.2.6. An event that the stream's end cuts off is dropped, as it says.
    """
    name, data = "", list[bytes]()
    for line in lines:
        if not line:
            if data:
                yield name or "message", b"\n".join(data)
            name, data = "", []
            continue
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace")


def _streamed(connection: Connection, job_id: str) -> Iterator[Job]:
    with connection.lines(f"/jobs/{job_id}/events", EVENT_STREAM) as lines:
        for name, data in event_data(lines):
            if name == "job":
                yield parsed(Job, data, connection)
