"""Waiting for something that comes back by itself: pauses that double, up to a limit. Knows not what is waited for."""

import asyncio
import time

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0
"""A store or a worker that is back is noticed within so much."""


class Patience:
    """`while await patience.pause(): try again`. It begins when it is made, and ends `limit_s` later."""

    def __init__(self, limit_s: float) -> None:
        self._ends = time.monotonic() + limit_s
        self._pause_s = FIRST_PAUSE_S

    async def pause(self) -> bool:
        """Wait, twice as long as the last time. Returns False, at once, when the time is over."""
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            return False
        await asyncio.sleep(min(self._pause_s, left_s))
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        return True
