"""Checks the requests of one submission as they come in, without holding up the event loop. Knows no store, no HTTP."""

import asyncio
import hashlib
import io
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from schemas.batches import MAX_BATCH_REQUESTS, BatchItem
from schemas.errors import FieldError, InvalidRequest, PromptTooLong
from schemas.requests import GenerateRequest, GenerationParameters
from serve_graph.jobs.worker import Worker

SLICE_S: Final = 0.005
"""The event loop gets its turn so often. One request costs 0.1 ms or so."""

MAX_CHECKS: Final = 8
"""Prompts whose tokens are counted at the same time, for one submission."""

MAX_ERRORS_PER_REQUEST: Final = 4
MAX_MESSAGE_CHARS: Final = 160
"""10,000 bad requests make an answer of some MB at most."""

Sent = GenerateRequest | Sequence[FieldError]
"""One of a batch's requests, or why it is none."""


class Breath:
    """Lets others run when it is their turn."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    async def take(self) -> None:
        """Give way to the event loop, where the last time is long ago."""
        if time.monotonic() - self._last > SLICE_S:
            await asyncio.sleep(0)
            self._last = time.monotonic()


@dataclass(frozen=True)
class Taken:
    """What was submitted. items: a `BatchItem` per line; digest: of the requests, keyed by the batch's id."""

    total: int
    items: bytes
    digest: str


class Intake:
    """Takes one submission.

    check: fills in a request's defaults and says whether its texts surely fit. Raises InvalidRequest.
    digest_only: the batch exists already; nothing but what was submitted is of interest.
    """

    def __init__(
        self,
        worker: Worker,
        check: Callable[[GenerateRequest], tuple[GenerationParameters, bool]],
        batch_id: str,
        *,
        digest_only: bool,
    ) -> None:
        self._worker = worker
        self._check = check
        self._digest_only = digest_only
        self._digest = hashlib.sha256(batch_id.encode())
        self._items = io.BytesIO()
        self._errors: dict[int, list[FieldError]] = {}
        self._checks: set[asyncio.Task[None]] = set()

    async def take(self, requests: AsyncIterator[Sent]) -> Taken:
        """Raises InvalidRequest with all mistakes; what the worker raises but PromptTooLong."""
        total, breath = 0, Breath()
        try:
            async for sent in requests:
                if total == MAX_BATCH_REQUESTS:
                    raise too_many()
                if isinstance(sent, GenerateRequest):
                    await self._take(total, sent)
                else:
                    self._refuse(total, sent)
                total += 1
                await breath.take()
            while self._checks:
                await self._some_checks()
        finally:
            for task in self._checks:
                task.cancel()
            await asyncio.gather(*self._checks, return_exceptions=True)
        if total == 0:
            raise InvalidRequest([FieldError(field="requests", message="must hold at least one")])
        if self._errors:
            raise InvalidRequest([error for _, errors in sorted(self._errors.items()) for error in errors])
        return Taken(total, self._items.getvalue(), self._digest.hexdigest())

    async def _take(self, index: int, request: GenerateRequest) -> None:
        self._digest.update(b"\n" + request.model_dump_json().encode())
        if self._digest_only:
            return
        try:
            parameters, fits = self._check(request)
        except InvalidRequest as mistake:
            self._refuse(index, mistake.errors)
            return
        if not fits:
            while len(self._checks) >= MAX_CHECKS:
                await self._some_checks()
            self._checks.add(asyncio.create_task(self._count_tokens(index, parameters)))
        if not self._errors:
            item = BatchItem(request=request, parameters=parameters)
            self._items.write(item.model_dump_json().encode() + b"\n")

    async def _count_tokens(self, index: int, parameters: GenerationParameters) -> None:
        try:
            await self._worker.check(parameters)
        except PromptTooLong as mistake:
            self._refuse(index, mistake.errors)

    async def _some_checks(self) -> None:
        done, self._checks = await asyncio.wait(self._checks, return_when=asyncio.FIRST_COMPLETED)
        failures = [failure for task in done if (failure := task.exception()) is not None]
        if failures:
            raise failures[0]

    def _refuse(self, index: int, errors: Sequence[FieldError]) -> None:
        self._errors[index] = [_placed(index, error) for error in errors[:MAX_ERRORS_PER_REQUEST]]


def _placed(index: int, error: FieldError) -> FieldError:
    """A mistake in one of many requests; short, as what is legal is in its words already."""
    field = f"requests.{index}" if error.field == "body" else f"requests.{index}.{error.field}"
    message = error.message
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[: MAX_MESSAGE_CHARS - 1] + "…"
    return FieldError(field=field, message=message, nearest=error.nearest)


def too_many() -> InvalidRequest:
    """Refuses a batch for its length."""
    legal = f"at most {MAX_BATCH_REQUESTS}"
    return InvalidRequest([FieldError(field="requests", message=f"must hold {legal}", legal=legal)])
