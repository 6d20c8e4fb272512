"""RPCs from methods of their names, and waiting for what other RPCs change."""

import asyncio
import functools
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn, TypeVar

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from grpclib.const import Handler
from grpclib.server import Stream
from modal_proto.api_grpc import ModalClientBase

T = TypeVar("T")


def refuse(status: Status, message: str) -> NoReturn:
    """Answer an RPC with an error, which the client raises and does not try again."""
    raise GRPCError(status, message)


class RpcService:
    """Serves each RPC by the method of that name of the first part that has one; any other is UNIMPLEMENTED, by name.

    A method takes the request, and returns the response (None for an empty one) or yields the responses of a stream.
    An unforeseen exception is INTERNAL to the client, which tries again; its traceback goes to `crashes`.
    """

    def __init__(self, *parts: object, crashes: list[str]) -> None:
        self._parts = parts
        self._crashes = crashes

    def with_first(self, part: object) -> "RpcService":
        """The same RPCs, but those that `part` has."""
        return RpcService(part, *self._parts, crashes=self._crashes)

    def __mapping__(self) -> dict[str, Handler]:
        return ModalClientBase.__mapping__(self)  # it looks the RPCs up by name

    def __getattr__(self, rpc: str) -> Any:
        method = next((getattr(part, rpc) for part in self._parts if hasattr(part, rpc)), None)
        return functools.partial(self._serve, rpc, method)

    async def _serve(self, rpc: str, method: Callable[[Any], Any] | None, stream: Stream[Any, Any]) -> None:
        request = await stream.recv_message()
        if method is None:
            refuse(Status.UNIMPLEMENTED, f"The loopback Modal has no {rpc}.")
        try:
            answer = method(request)
            if isinstance(answer, AsyncIterator):
                async for message in answer:
                    await stream.send_message(message)
            else:
                response = await answer
                await stream.send_message(Empty() if response is None else response)
        except (GRPCError, OSError):  # a refusal; a peer that went away
            raise
        except Exception:  # an RPC that failed in an unforeseen way fails the test, see `crashes`
            self._crashes.append(f"{rpc}: {traceback.format_exc()}")
            raise


class Changes:
    """Waits for what others bring about, without polling. All state is the loop's; other threads come through here."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: set[asyncio.Event] = set()

    def notify(self) -> None:
        """Let everyone look again. On the loop only."""
        for event in self._waiting:
            event.set()

    async def until(self, find: Callable[[], T], timeout_s: float | None = None) -> T:
        """What `find` returns once that is true, or once the time is up. On the loop only."""
        changed = asyncio.Event()
        self._waiting.add(changed)
        try:
            async with asyncio.timeout(timeout_s):
                while not (found := find()):
                    await changed.wait()
                    changed.clear()
                return found
        except TimeoutError:
            return find()
        finally:
            self._waiting.discard(changed)

    def wait(self, find: Callable[[], T], timeout_s: float, what: str) -> T:
        """As `until`, from another thread. Raises TimeoutError, which says `what` did not come."""
        found = asyncio.run_coroutine_threadsafe(self.until(find, timeout_s), self._loop).result()
        if not found:
            raise TimeoutError(f"not within {timeout_s} s: {what}")
        return found

    def do(self, change: Callable[[], T]) -> T:
        """Call `change` on the loop, from another thread, and tell everyone."""

        async def on_loop() -> T:
            result = change()
            self.notify()
            return result

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result()
