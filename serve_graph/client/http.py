"""Requests to the service: credentials, the error table, repetition. Knows no route.

Every request that goes through here may be sent twice: reads and cancellations by their nature, submissions because
they carry an Idempotency-Key.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import responses
from typing import Final
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from schemas.errors import PROBLEM_MEDIA_TYPE, Problem
from serve_graph.client.errors import ApiProblem, ClientError, ServiceUnreachable, UnexpectedAnswer

CONNECT_TIMEOUT_S: Final = 5.0
NO_PROBLEM: Final = "about:blank"
"""RFC 9457's type for a status that came without a problem document."""

_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
_BUSY: Final = frozenset({429, 503})
_GATEWAY: Final = frozenset({502, 504})
"""Of something between the service and us, where they come without a problem document of the service's own."""

OnTrouble = Callable[[ClientError, float], None]
"""Told before each repetition: what went wrong, and the seconds until the next try."""


class Pauses:
    """The pauses between the tries of one call, until its patience is over."""

    def __init__(self, patience_s: float, on_trouble: OnTrouble | None) -> None:
        self._ends = time.monotonic() + patience_s
        self._on_trouble = on_trouble
        self._backoff_s = _FIRST_PAUSE_S

    def take(self, error: ClientError) -> None:
        """Sleep until the next try. Raises `error` when another one can't help or comes too late."""
        hint_s = retry_after_s(error)
        if hint_s is None:
            raise error
        pause_s = max(hint_s, self._backoff_s)
        if time.monotonic() + pause_s > self._ends:
            raise error
        if self._on_trouble is not None:
            self._on_trouble(error, pause_s)
        time.sleep(pause_s)  # the backoff of a repetition
        self._backoff_s = min(2 * self._backoff_s, _LONGEST_PAUSE_S)


def retry_after_s(error: ClientError) -> float | None:
    """The seconds after which the same request may work; None where it never will."""
    if isinstance(error, ServiceUnreachable):
        return 0.0
    if isinstance(error, ApiProblem):
        problem = error.problem
        if problem.status in _BUSY or (problem.status in _GATEWAY and problem.type == NO_PROBLEM):
            return float(problem.retry_after_s or 0)
    return None


class Connection:
    """A pool of connections to one service, and to the stores that its signed URLs name. Threads may share it.

    Args:
        base_url: scheme, host, port and perhaps a path.
        api_key: sent to the service only, never to a store.
        timeout_s: for each silence of the other side.
        patience_s: how long one call goes on trying; may be changed.
        on_trouble: told before each repetition.
        transport: in place of the network, for tests.

    Raises ValueError for a URL or a key that can't be one.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        timeout_s: float,
        patience_s: float,
        on_trouble: OnTrouble | None,
        transport: httpx.BaseTransport | None,
    ) -> None:
        self.server = server_of(base_url)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
            raise ValueError("the API key has characters that no key has")
        timeout = httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key.strip()}"}
        self.patience_s = patience_s
        self._on_trouble = on_trouble
        self._api = httpx.Client(base_url=base_url, headers=headers, timeout=timeout, transport=transport)
        self._files = httpx.Client(timeout=timeout, transport=transport)

    def close(self) -> None:
        """Close every connection."""
        self._api.close()
        self._files.close()

    def pauses(self) -> Pauses:
        """The pauses of a new call."""
        return Pauses(self.patience_s, self._on_trouble)

    def send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        """Send a request, again while that may help. Raises ApiProblem, ServiceUnreachable."""
        pauses = self.pauses()
        while True:
            try:
                with self._errors(self.server):
                    answer = self._api.request(method, path, params=params, headers=headers, content=content)
                return self._checked(answer)
            except ClientError as error:
                pauses.take(error)

    def send_once(self, path: str) -> httpx.Response:
        """Ask for what answers with any status, such as a state. Raises ApiProblem for a problem document only."""
        with self._errors(self.server):
            answer = self._api.get(path)
        if answer.headers.get("content-type", "").startswith(PROBLEM_MEDIA_TYPE):
            raise ApiProblem(problem_of(answer))
        return answer

    @contextmanager
    def lines(self, path: str, media_type: str) -> Iterator[Iterator[bytes]]:
        """The lines of an answer as they come, without their ends. Raises ApiProblem, ServiceUnreachable, and
        UnexpectedAnswer for another media type. Nothing is repeated."""
        with self._errors(self.server), self._api.stream("GET", path, headers={"Accept": media_type}) as answer:
            if not answer.is_success:
                answer.read()
            self._checked(answer)
            found = answer.headers.get("content-type", "").split(";")[0]
            if found != media_type:
                raise UnexpectedAnswer(self.server, f"{found or 'nothing'} and not {media_type}")
            yield _lines(answer.iter_bytes())

    @contextmanager
    def stored(self, url: str) -> Iterator[httpx.Response]:
        """The answer of a signed URL, unread, whatever its status. Raises ServiceUnreachable."""
        with self._errors(server_of(url)), self._files.stream("GET", url) as answer:
            yield answer

    def _checked(self, answer: httpx.Response) -> httpx.Response:
        if answer.status_code >= 400:
            raise ApiProblem(problem_of(answer))
        return answer

    @contextmanager
    def _errors(self, server: str) -> Iterator[None]:
        """The one table from httpx's errors to ours."""
        try:
            yield
        except httpx.TransportError as error:
            raise ServiceUnreachable(server, _reason(error)) from error
        except (httpx.DecodingError, httpx.InvalidURL) as error:
            raise UnexpectedAnswer(server, "what can't be read") from error


def server_of(url: str) -> str:
    """Scheme, host and port. Raises ValueError for what is no HTTP URL."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{parts.scheme or url!r} is no http:// or https:// URL")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def problem_of(answer: httpx.Response) -> Problem:
    """The problem document of an answer that was read; one made of the status alone where there is none."""
    status = answer.status_code
    title = responses.get(status, "an error")
    hint = answer.headers.get("retry-after", "")
    made = {
        "type": NO_PROBLEM,
        "title": title,
        "status": status,
        "detail": f"{server_of(str(answer.request.url))} answered {status} ({title})",
        "retry_after_s": int(hint) if hint.isdecimal() else None,
    }
    try:
        found = answer.json()
        return Problem.model_validate({**made, **{name: found[name] for name in Problem.model_fields if name in found}})
    except (ValueError, TypeError, ValidationError):
        return Problem.model_validate(made)


def _reason(error: httpx.TransportError) -> str:
    """In words that name no URL."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.ConnectError):
        return str(error) or "no connection"
    return "the connection broke"


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines that end with \\n or \\r\\n only: JSON may hold what `str.splitlines` takes for an end (U+2028)."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
    if rest:
        yield rest
