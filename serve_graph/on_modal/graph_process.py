"""The graph in a process of its own: a graph that a restore has broken is ended whole, and another one begun.

Ray can't be started twice in a process that has lost it: its driver waits for what is dead, or ends the process.
The two processes talk over a pipe: (number, method, arguments) there, (number, result or exception) back.
"""

import asyncio
import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final

import psutil

from serve_graph.logs import log_event
from serve_graph.on_modal.graph import Graph
from serve_graph.on_modal.options import ModalOptions

_PR_SET_CHILD_SUBREAPER: Final = 36  # <linux/prctl.h>


class GraphGone(Exception):
    """The graph's process has ended."""


class GraphProcess:
    """A `Graph` elsewhere. Its methods may be called from any thread, several at once."""

    def __init__(self, options: ModalOptions) -> None:
        _adopt_orphans()
        self._connection, others_end = multiprocessing.Pipe()
        with others_end:
            self._process = subprocess.Popen(  # noqa: S603 - ours; multiprocessing would start a process beside it
                [sys.executable, "-m", __name__, str(others_end.fileno())],
                pass_fds=[others_end.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._connection.send(options)
        self._lock = threading.Lock()
        self._is_over = False
        self._number = 0
        self._awaited: dict[int, Future[Any]] = {}
        threading.Thread(target=self._receive, name="wan-graph-answers", daemon=True).start()

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Its result raises what the method raised, or GraphGone. Cancelling it cancels nothing in the graph."""
        answer: Future[Any] = Future()
        with self._lock:
            if self._is_over:
                raise GraphGone
            self._number += 1
            self._awaited[self._number] = answer
            try:
                self._connection.send((self._number, method, arguments))
            except OSError as failure:
                raise GraphGone from failure
        return answer

    def stop(self) -> None:
        """Stop the graph in order, or end it where it is gone. Raises what `Graph.stop` raises."""
        try:
            with suppress(GraphGone):
                self.call("stop").result()
                self._process.wait()
        finally:
            self.end()

    def end(self) -> None:
        """Make an end of the graph and of all that it has started, without asking it. Returns when it is done."""
        processes = psutil.Process().children(recursive=True)  # a container has no others
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                log_event("process_killed", level=logging.WARNING, name=process.name())
                process.kill()
        psutil.wait_procs(processes)
        self._process.wait()

    def _receive(self) -> None:
        try:
            while True:
                number, result, failure = self._connection.recv()
                with self._lock:
                    answer = self._awaited.pop(number)
                _give(answer, result, failure)
        except (EOFError, OSError):
            log_event("graph_gone", level=logging.WARNING)
        finally:
            with self._lock:
                self._is_over = True
            for answer in self._awaited.values():
                _give(answer, None, GraphGone())


def _give(answer: Future[Any], result: Any, failure: BaseException | None) -> None:
    if not answer.set_running_or_notify_cancel():  # its caller has gone
        return
    if failure is None:
        answer.set_result(result)
    else:
        answer.set_exception(failure)


def _portable(failure: Exception) -> Exception:
    """What can be sent: Ray raises classes that it makes on the spot, around the exception itself."""
    inside = getattr(failure, "cause", None)
    sent = inside if isinstance(inside, Exception) else failure
    try:
        pickle.loads(pickle.dumps(sent))  # noqa: S301  # our own
    except Exception:  # whatever its class does with it
        return RuntimeError(repr(sent))
    return sent


def _adopt_orphans() -> None:
    """Have what outlives its parent, such as a worker of a Ray that died, become a child of this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


async def _serve(connection: Connection) -> None:
    graph, sending = Graph(connection.recv()), threading.Lock()

    async def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            result, failure = await getattr(graph, method)(*arguments), None
        except Exception as raised:  # whatever it is belongs to who has called
            result, failure = None, _portable(raised)
        with sending:
            connection.send((number, result, failure))

    under_way = set()
    while True:
        try:
            request = await asyncio.to_thread(connection.recv)
        except EOFError:  # the container's main process is gone
            return
        task = asyncio.create_task(answer(*request))
        if request[1] == "stop":
            await task
            return
        under_way.add(task)
        task.add_done_callback(under_way.discard)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the container's main process that is told to stop
    os.set_inheritable(int(sys.argv[1]), False)  # else Ray's processes hold it, and this one's end would not be seen
    asyncio.run(_serve(Connection(int(sys.argv[1]))))
