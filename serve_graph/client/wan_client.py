"""`WanClient`: one method per route, typed with the schemas."""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Final

import httpx
from pydantic import TypeAdapter, ValidationError

from schemas.batches import Batch, BatchPage, BatchResult
from schemas.clips import Clip
from schemas.health import Health
from schemas.jobs import Job, JobPage, JobState
from schemas.model_profile import ModelProfile
from schemas.requests import GenerateRequest
from serve_graph.client.errors import ApiProblem, ClientError, UnexpectedAnswer
from serve_graph.client.events import follow, parsed
from serve_graph.client.files import download
from serve_graph.client.http import Connection, OnTrouble

DEFAULT_URL: Final = "http://127.0.0.1:8000"
NDJSON: Final = "application/x-ndjson"
_PAGE: Final = 100
_MODELS: Final = TypeAdapter(tuple[ModelProfile, ...])


class WanClient:
    """A client of one service. Threads may share it; leave it as a context manager, or `close` it.

    What may pass (no connection, 429, 503) is tried again, after as long as the service says, for `patience_s`; a
    repeated submission makes no second job. Every method raises `ApiProblem`, `ServiceUnreachable` and
    `UnexpectedAnswer`.

    Args:
        base_url: where the service is.
        api_key: where it asks for one.
        timeout_s: for each silence of the service; it sends something every 15 s.
        patience_s: how long one call goes on trying; 0 tries once.
        on_trouble: told before each repetition what went wrong, and the seconds until the next try.
        transport: in place of the network, for tests.

    Raises ValueError for a URL or a key that can't be one.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout_s: float = 45.0,
        patience_s: float = 30.0,
        on_trouble: OnTrouble | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._connection = Connection(base_url, api_key, timeout_s, patience_s, on_trouble, transport)

    def __enter__(self) -> "WanClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        self._connection.close()

    def set_patience(self, patience_s: float) -> None:
        """How long each later call goes on trying."""
        self._connection.patience_s = patience_s

    def ping(self) -> None:
        """Ask once whether anything answers, ready or not. Raises ServiceUnreachable."""
        with suppress(ApiProblem):
            self._connection.send_once("/health/live")

    def generate(self, request: GenerateRequest, on_change: Callable[[Job], None] | None = None) -> Clip:
        """Make one clip and wait for it. A Ctrl-C meanwhile cancels the job. A job that failed is an ApiProblem."""
        job = self.submit(request)
        try:
            job = self.wait(job.job_id, on_change)
        except KeyboardInterrupt:
            self.cancel(job.job_id)
            raise
        return clip_of(job)

    def submit(self, request: GenerateRequest, idempotency_key: str | None = None) -> Job:
        """Begin one clip; answers at once.

        idempotency_key: the same one gives the same job again, in whatever state; made here when absent.
        """
        key = idempotency_key or new_idempotency_key()
        headers = {"Prefer": "respond-async", "Idempotency-Key": key, "Content-Type": "application/json"}
        answer = self._connection.send("POST", "/generate", headers=headers, content=as_json(request))
        if answer.status_code == 200:  # it had been made before
            return self.job(parsed(Clip, answer.content, self._connection).job_id)
        return parsed(Job, answer.content, self._connection)

    def job(self, job_id: str) -> Job:
        """How a job is doing."""
        return parsed(Job, self._connection.send("GET", f"/jobs/{job_id}").content, self._connection)

    def wait(self, job_id: str, on_change: Callable[[Job], None] | None = None) -> Job:
        """Follow a job to its end, however it ends. on_change: told its state now and each later one."""
        for job in follow(self._connection, job_id):
            if on_change is not None:
                on_change(job)
            if job.state.is_terminal:
                return job
        raise UnexpectedAnswer(self._connection.server, "no end of the job")

    def jobs(self, *, state: JobState | None = None, batch_id: str | None = None) -> Iterator[Job]:
        """All jobs, newest first, page by page; without `batch_id`, those that are part of no batch."""
        asked = {"state": None if state is None else state.value, "batch": batch_id, "limit": str(_PAGE)}
        params = {name: value for name, value in asked.items() if value is not None}
        while True:
            page = parsed(JobPage, self._connection.send("GET", "/jobs", params=params).content, self._connection)
            yield from page.jobs
            if page.next_cursor is None:
                return
            params["after"] = page.next_cursor

    def cancel(self, job_id: str) -> Job:
        """Cancel a job. It may have ended first, or end a moment later: the state says."""
        return parsed(Job, self._connection.send("POST", f"/jobs/{job_id}/cancel").content, self._connection)

    def delete(self, job_id: str) -> None:
        """Delete an ended job and its clip; nothing happens when it is deleted already."""
        try:
            self._connection.send("DELETE", f"/jobs/{job_id}")
        except ApiProblem as error:
            if error.problem.name != "job-gone":
                raise

    def submit_batch(self, requests: Iterable[GenerateRequest], idempotency_key: str | None = None) -> Batch:
        """Submit many prompts together; all of them are accepted or none is.

        idempotency_key: the same one with the same requests gives the same batch again; made here when absent.
        """
        headers = {"Idempotency-Key": idempotency_key or new_idempotency_key(), "Content-Type": NDJSON}
        lines = b"".join(as_json(request) + b"\n" for request in requests)
        answer = self._connection.send("POST", "/batches", headers=headers, content=lines)
        return parsed(Batch, answer.content, self._connection)

    def batch(self, batch_id: str) -> Batch:
        """How a batch is doing."""
        return parsed(Batch, self._connection.send("GET", f"/batches/{batch_id}").content, self._connection)

    def batches(self) -> Iterator[Batch]:
        """All batches, newest first, page by page."""
        params = {"limit": str(_PAGE)}
        while True:
            answer = self._connection.send("GET", "/batches", params=params)
            page = parsed(BatchPage, answer.content, self._connection)
            yield from page.batches
            if page.next_cursor is None:
                return
            params["after"] = page.next_cursor

    def batch_results(self, batch_id: str) -> Iterator[BatchResult]:
        """Every request's outcome so far, in the order of submission, as the service sends them.

        After a broken connection it goes on behind the last one.
        """
        told, pauses = 0, self._connection.pauses()
        while True:
            try:
                with self._connection.lines(f"/batches/{batch_id}/results", NDJSON) as lines:
                    for line in islice(lines, told, None):
                        told, pauses = told + 1, self._connection.pauses()
                        yield parsed(BatchResult, line, self._connection)
                return
            except ClientError as error:
                pauses.take(error)

    def cancel_batch(self, batch_id: str) -> Batch:
        """Cancel what has not ended of a batch."""
        return parsed(Batch, self._connection.send("POST", f"/batches/{batch_id}/cancel").content, self._connection)

    def models(self) -> tuple[ModelProfile, ...]:
        """The models, and what they may be asked for."""
        try:
            return _MODELS.validate_json(self._connection.send("GET", "/models").content)
        except ValidationError as error:
            raise UnexpectedAnswer(self._connection.server, "no ModelProfile") from error

    def health(self) -> Health:
        """The service's state, also while it can't render."""
        return parsed(Health, self._connection.send_once("/health").content, self._connection)

    def download(self, clip: Clip, path: Path) -> Path:
        """Fetch a clip into `path`, which is replaced when the bytes are there and right. Returns `path`.

        An expired URL is renewed. Raises ClipDamaged besides, and OSError where the file can't be written.
        """
        download(self._connection, clip, path)
        return path


def clip_of(job: Job) -> Clip:
    """An ended job's clip. Raises ApiProblem with what went wrong."""
    if job.error is not None:
        raise ApiProblem(job.error)
    if job.clip is None:
        raise UnexpectedAnswer("the service", f"{job.state} and no clip")
    return job.clip


def as_json(request: GenerateRequest) -> bytes:
    """What was set, and no defaults: those are the service's to fill in."""
    return request.model_dump_json(exclude_unset=True).encode()


def new_idempotency_key() -> str:
    """A key that nobody has used."""
    return secrets.token_hex(16)
