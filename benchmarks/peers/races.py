"""What is done to one contender at a time: closed loops, open arrivals, clients who leave, a SIGKILL."""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.peers.contenders import Contender, NoClip
from benchmarks.peers.report import Killed
from benchmarks.peers.traces import STEPS, Arrival, Kind, job, short_job
from schemas.requests import GenerateRequest

_KILL_LIMIT_S = 60.0
"""How long clips that were in flight may take after the SIGKILL; what isn't there by then is lost."""
_AGAIN_PAUSE_S = 0.5
_SETTLE_S = 2.0
_PAUSES_S = (0.5, 2.0, 5.0)
"""Before a client of a closed loop asks again for a clip that it did not get."""


@dataclass(frozen=True)
class Loop:
    """A closed loop's rate and the seconds of each of its clips."""

    clips_per_min: float
    seconds: list[float]


@dataclass(frozen=True)
class Served:
    """What came of an open trace. failed: requests without a clip. gone: clients who left before theirs was there."""

    seconds: dict[Kind, list[float]]
    failed: dict[Kind, int]
    gone: int


async def run_closed(contender: Contender, numbers: Sequence[int], clients: int) -> Loop:
    """Short jobs, each finished one replaced at once until all have been sent. Raises NoClip.

    Timed from the first request to the last clip: between two finishes, a server that finishes batches would seem
    faster or slower by what happens to lie between them.
    """
    waiting, seconds = iter(numbers), list[float]()

    async def client() -> None:
        for number in waiting:
            sent_at = time.perf_counter()
            await _insist(contender, number)
            seconds.append(time.perf_counter() - sent_at)

    began = time.perf_counter()
    outcomes = await asyncio.gather(*(client() for _ in range(clients)), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return Loop(60 * len(seconds) / (time.perf_counter() - began), seconds)


async def _insist(contender: Contender, number: int) -> None:
    """Ask again where there was no clip: the client's has taken that much longer."""
    for pause_s in _PAUSES_S:
        with suppress(NoClip):
            return await contender.clip(short_job(number))
        await asyncio.sleep(pause_s)
    try:
        await contender.clip(short_job(number))
    except NoClip as error:
        raise NoClip(f"{contender.name}: {error}") from error


async def run_open(contender: Contender, sent: Sequence[Arrival], first: int) -> Served:
    """Send the trace and wait for all clips but those of clients who leave."""
    began = time.perf_counter()
    seconds: dict[Kind, list[float]] = {kind: [] for kind in STEPS}
    failed = dict.fromkeys(STEPS, 0)
    outcomes = await asyncio.gather(*(_one(contender, began, first + i, one) for i, one in enumerate(sent)))
    for arrival, outcome in zip(sent, outcomes, strict=True):
        if isinstance(outcome, float):
            seconds[arrival.kind].append(outcome)
        elif outcome == "failed":
            failed[arrival.kind] += 1
    return Served(seconds, failed, outcomes.count("gone"))


async def _one(contender: Contender, began: float, number: int, arrival: Arrival) -> float | str:
    """Seconds to the clip; or what came instead."""
    await asyncio.sleep(began + arrival.at_s - time.perf_counter())
    asking = asyncio.create_task(_timed(contender, job(number, arrival.kind)))
    if arrival.leaves_after_s is not None:
        await asyncio.wait([asking], timeout=arrival.leaves_after_s)
        if not asking.done():
            contender.left(number)
            asking.cancel()  # closes the connection
            await asyncio.wait([asking])
            return "gone"
    try:
        return await asking
    except NoClip:
        return "failed"


async def _timed(contender: Contender, request: GenerateRequest) -> float:
    """Seconds to the clip. Raises NoClip."""
    sent_at = time.perf_counter()
    await contender.clip(request)
    return time.perf_counter() - sent_at


async def run_leaving(contender: Contender, sent: Sequence[Arrival], first: int) -> tuple[int, float]:
    """The trace with its leavers. Returns how many left, and the steps that were run for them afterwards."""
    before = contender.wasted_steps()
    served = await run_open(contender, sent, first)
    with suppress(NoClip):
        await contender.clip(short_job(first + len(sent)))  # behind what still waits for clients who have gone
    await asyncio.sleep(_SETTLE_S)  # servers need not take turns in order, and steps in a log wake nobody
    return served.gone, contender.wasted_steps() - before


async def run_kill(
    contender: Contender, jobs: Sequence[GenerateRequest], afterwards: GenerateRequest, after_s: float, again_s: float
) -> Killed:
    """All jobs at once; `after_s` seconds later the process that holds the model is killed.

    afterwards: one more, from then on asked for again and again for `again_s` seconds until it is there.
    """
    finished_at: list[float] = []

    async def ask(request: GenerateRequest) -> None:
        await contender.clip(request)
        finished_at.append(time.perf_counter())

    asking = [asyncio.create_task(ask(request)) for request in jobs]
    await asyncio.wait(asking, timeout=after_s)
    in_flight = [task for task in asking if not task.done()]
    with suppress(ProcessLookupError):  # it died before, by itself
        os.kill(contender.worker(), signal.SIGKILL)
    killed_at = time.perf_counter()
    again = asyncio.create_task(_asked_again(contender, afterwards, again_s))
    if in_flight:
        await asyncio.wait(in_flight, timeout=_KILL_LIMIT_S)
    lost = [task for task in in_flight if not task.done() or task.exception() is not None]
    for task in lost:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    finished_at += await again
    served_s = [at - killed_at for at in finished_at if at > killed_at]
    return Killed(in_flight=len(in_flight), lost=len(lost), serves_again_s=min(served_s, default=None))


async def _asked_again(contender: Contender, request: GenerateRequest, limit_s: float) -> list[float]:
    """When the clip came; nothing where it didn't in time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while True:
                with suppress(NoClip):
                    await contender.clip(request)
                    return [time.perf_counter()]
                await asyncio.sleep(_AGAIN_PAUSE_S)  # it may be on its way back, which only an answer tells
    return []
