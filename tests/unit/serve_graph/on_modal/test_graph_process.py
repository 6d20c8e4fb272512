"""What crosses the pipe between a container's main process and its graph; the rest is in tests/integration."""

import threading
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from schemas.errors import ShuttingDown, StoreUnavailable
from serve_graph.on_modal.graph_process import GraphGone, _give, _portable


def raised_by_ray(cause: Exception) -> Exception:
    """As a handle raises it: an instance of a class that Ray has just made."""
    made: Exception = RayTaskError("work_on", "the traceback", cause).as_instanceof_cause()
    return made


@pytest.mark.parametrize("cause", [ShuttingDown("for a test"), StoreUnavailable("for a test"), TimeoutError()])
def test_the_cause_of_what_ray_raises_is_sent(cause: Exception) -> None:
    assert _portable(raised_by_ray(cause)) is cause


def test_what_can_not_be_pickled_is_told_in_words() -> None:
    error = ValueError(threading.Lock())

    assert repr(_portable(error)) == repr(RuntimeError(repr(error)))


def test_an_answer_that_nobody_waits_for_any_more_is_dropped() -> None:
    for result, failure in (("an answer", None), (None, GraphGone())):
        gone: Future[Any] = Future()
        gone.cancel()
        _give(gone, result, failure)

    waiting: Future[Any] = Future()
    _give(waiting, None, GraphGone())
    with pytest.raises(GraphGone):
        waiting.result(0)
