"""What the commands that talk to a service share: where it is, how they print, what an error looks like.

Results go to stdout, everything else to stderr, so that `--json` can be piped.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Final, NoReturn

import typer
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table
from rich.text import Text

from schemas.errors import Problem
from serve_graph.client import ApiProblem, ClientError, ServiceUnreachable, WanClient
from serve_graph.client.wan_client import DEFAULT_URL
from serve_graph.settings import API_KEY_VARIABLE, URL_VARIABLE

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130

PATIENCE_S: Final = 600.0
_EXCERPT: Final = 48
_PIPED_WIDTH: Final = 160
_USAGE_STATUSES: Final = frozenset({401, 403, 413, 422})
_SERVER_ERROR: Final = 500
_TROUBLE_EVERY_S: Final = 30.0

Url = Annotated[str, typer.Option("--url", envvar=URL_VARIABLE, help="Where the service is.", show_default=True)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Patience = Annotated[float, typer.Option(min=0, help="Seconds to go on while the service is away.", metavar="SECONDS")]
UrlDefault: Final = DEFAULT_URL


def stderr() -> Console:
    """For people; plain where it is no terminal."""
    return Console(stderr=True, markup=False, highlight=False)


def stdout() -> Console:
    """For results; plain, and wide, where it is no terminal."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=_PIPED_WIDTH)


@contextmanager
def client_of(url: str, as_json: bool, patience_s: float = 0.0) -> Iterator[WanClient]:
    """A client with the environment's API key; what goes wrong with it ends the command in one line."""
    try:
        key = os.environ.get(API_KEY_VARIABLE) or None
        client = WanClient(url, key, patience_s=patience_s, on_trouble=_Trouble())
    except ValueError as error:
        fail(f"{error}: see --url ({URL_VARIABLE}) and {API_KEY_VARIABLE}", WRONG_USAGE, as_json)
    with client:
        try:
            yield client
        except ClientError as error:
            end(error, as_json)
        except OSError as error:
            fail(f"{error.filename or 'a file'}: {error.strerror or error}", FAILED, as_json)


def end(error: ClientError, as_json: bool, prefix: str = "") -> NoReturn:
    """End the command with what went wrong, and what to do."""
    problem = error.problem if isinstance(error, ApiProblem) else None
    wrong = problem is not None and problem.status in _USAGE_STATUSES
    fail(prefix + in_one_line(error), WRONG_USAGE if wrong else FAILED, as_json, problem)


def in_one_line(error: ClientError) -> str:
    """The error and what to do about it."""
    if isinstance(error, ServiceUnreachable):
        return f"{error}: start the service with `make serve`, or say where it is with --url ({URL_VARIABLE})"
    if not isinstance(error, ApiProblem):
        return str(error)
    problem = error.problem
    if problem.status == 401:
        return f"{problem.detail}: set {API_KEY_VARIABLE} to a key of this service"
    if problem.retry_after_s is not None:
        return f"{problem.detail}; try again in {problem.retry_after_s} s"
    if problem.status >= _SERVER_ERROR and problem.request_id is not None:
        return f"{problem.detail} (request id {problem.request_id})"
    return problem.detail


def fail(message: str, code: int, as_json: bool = False, problem: Problem | None = None) -> NoReturn:
    """One line on stderr, with `--json` the error on stdout too, and the exit code."""
    line = " ".join(printable(part) for part in message.split("\n"))
    print(f"wan-serve: {line}", file=sys.stderr)
    if as_json:
        document = {"message": line} if problem is None else problem.model_dump(mode="json", exclude_none=True)
        print_json({"error": document})
    raise typer.Exit(code)


def print_json(value: object) -> None:
    """A model, a dataclass, or what holds them, as one JSON document in one line, at once."""
    print(json.dumps(to_jsonable_python(value), ensure_ascii=True), flush=True)


def printable(text: str) -> str:
    """Text that can't move a terminal's cursor or colour it."""
    return "".join(c if c.isprintable() else "�" for c in text)


def excerpt(prompt: str) -> str:
    """The beginning of a prompt, in one line."""
    line = printable(" ".join(prompt.split()))
    return line if len(line) <= _EXCERPT else line[: _EXCERPT - 1] + "…"


def seconds(value: float | None) -> str:
    """A rough duration for people."""
    if value is None:
        return ""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if value >= 2 * size:
            return f"{value / size:.0f} {unit}"
    return f"{value:.0f} s"


def age(at: datetime) -> str:
    """How long ago something was."""
    return seconds(max(0.0, (datetime.now(UTC) - at).total_seconds()))


def table(*columns: str) -> Table:
    """A table of text."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, no_wrap=True)
    return made


def add_row(to: Table, *cells: str) -> None:
    """Add cells as they are: a prompt is no markup."""
    to.add_row(*(Text(cell) for cell in cells))


class _Trouble:
    """Says that something is repeated: at first, when it changes, and now and then while it lasts."""

    def __init__(self) -> None:
        self._told = ""
        self._again_at = 0.0

    def __call__(self, error: ClientError, pause_s: float) -> None:
        """Tell it on stderr, or not again."""
        line = in_one_line(error) if isinstance(error, ServiceUnreachable) else printable(str(error))
        if line != self._told or time.monotonic() >= self._again_at:
            self._told, self._again_at = line, time.monotonic() + _TROUBLE_EVERY_S
            print(f"wan-serve: {line}; trying again", file=sys.stderr, flush=True)
