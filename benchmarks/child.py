"""A contender in a process of its own: its memory is its own, and it sleeps while another is measured."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from serve_graph.settings import Settings

_STOP_TIMEOUT_S = 3.0

Kind = Literal["stock", "engine"]


class ChildFailed(Exception):
    """The contender raised; the message is its traceback."""


class Child:
    """The parent's end of the pipe."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid = pid
        self._connection = connection

    def call(self, method: str, *args: object) -> Any:
        """Call the contender's method and wait for what it returns. Raises ChildFailed."""
        self._connection.send((method, args))
        return self.answer()

    def answer(self) -> Any:
        """The next thing that the child says. Raises ChildFailed."""
        try:
            succeeded, value = self._connection.recv()
        except EOFError:
            raise ChildFailed("the process ended") from None
        if not succeeded:
            raise ChildFailed(value)
        return value


@contextmanager
def child(kind: Kind, settings: Settings, log: Path) -> Iterator[Child]:
    """Start a contender; its first `answer` comes when it is loaded. What it prints goes to `log`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(kind, settings, log, theirs), daemon=True, name=kind)
    with _sigint_ignored():
        process.start()
    theirs.close()
    try:
        yield Child(process.pid or 0, ours)
    finally:
        process.terminate()  # all that it leaves are files in the scratch folder
        process.join(_STOP_TIMEOUT_S)
        process.kill()
        process.join()
        ours.close()


@contextmanager
def _sigint_ignored() -> Iterator[None]:
    """A child started meanwhile inherits that: on Ctrl-C it is the parent who ends it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _main(kind: Kind, settings: Settings, log: Path, connection: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())  # lets libraries give back their semaphores
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        from benchmarks.contenders import BareEngine, Stock

        contender = Stock(settings) if kind == "stock" else BareEngine(settings)
        connection.send((True, None))
    except Exception:  # told to the parent process, which raises it
        connection.send((False, traceback.format_exc()))
        return
    _serve(contender, connection)


def _serve(contender: object, connection: Connection) -> None:
    """Answer calls until the parent closes its end, or is gone."""
    while True:
        try:
            method, args = connection.recv()
            connection.send(_answer(contender, method, args))
        except (EOFError, ConnectionError):
            return


def _answer(contender: object, method: str, args: tuple[object, ...]) -> tuple[bool, object]:
    try:
        return True, getattr(contender, method)(*args)
    except Exception:  # told to the parent process, which raises it
        return False, traceback.format_exc()
