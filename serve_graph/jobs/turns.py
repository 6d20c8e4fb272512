"""Turns: where a platform calls for work, jobs are under way only while calls are open, one per turn.

A platform stops a process that has no open call, whatever else goes on in it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Turns:
    """All of it belongs to one event loop. under_way: how many jobs are."""

    def __init__(self, under_way: Callable[[], int], dispatch: Callable[[], None]) -> None:
        self._under_way = under_way
        self._dispatch = dispatch
        self._open = 0
        self._changed = asyncio.Event()

    @property
    def free(self) -> bool:
        """Whether one more job may begin."""
        return self._under_way() < self._open

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """One more job may be under way in here. Leaves once no job needs this turn."""
        self._open += 1
        try:
            self._dispatch()
            yield
            while self._under_way() >= self._open:
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._open -= 1

    def job_went(self) -> None:
        """A job is under way no more."""
        self._changed.set()
