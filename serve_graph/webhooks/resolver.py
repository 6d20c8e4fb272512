"""Asks the system for a name's addresses, in threads of its own."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(name, port) -> addresses, best first. Raises OSError where the name has none."""

THREADS = 4


class SystemResolver:
    """A `Resolve`. `loop.getaddrinfo` would take the loop's own threads, all of them while a name server is silent."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="wan-webhook-dns")

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        found = await asyncio.get_running_loop().run_in_executor(self._threads, _addresses, name, port)
        return list(dict.fromkeys(found))

    def close(self) -> None:
        """Wait for nobody: a lookup that is under way ends when the system gives up on it."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _addresses(name: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)]
