"""Waiting for what other processes do: seen over HTTP or in files, which wake nobody."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LOOK_S = 0.05


def until(look: Callable[[], T], what: str, limit_s: float = 120.0) -> T:
    """Look until there is something, and return it. Fails with `what` never came, after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(LOOK_S)  # the only way to see another process's doing
    return found
