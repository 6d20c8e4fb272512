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
from benchmarks.workload import closed_loop
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
    """What came of an open trace. gone: clients who left before their clip was there."""

    seconds: dict[Kind, list[float]]
    failed: int
    gone: int


async def run_closed(contender: Contender, first: int, clients: int, num_timed: int) -> Loop:
    """Short jobs, each finished one replaced at once; see `workload.closed_loop`. Raises NoClip."""
    seconds: list[float] = []

    async def make(number: int) -> None:
        began = time.perf_counter()
        for pause_s in (*_PAUSES_S, None):
            try:
                await contender.clip(short_job(number))
                break
            except NoClip:
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)  # a client asks again, and its clip has taken that much longer
        seconds.append(time.perf_counter() - began)

    try:
        block = await closed_loop(make, first, num_timed=num_timed, in_flight=clients)
    except* NoClip as failed:
        raise NoClip(f"{contender.name}: {failed.exceptions[0]}") from failed
    return Loop(60 * block.clips_per_s, seconds)


async def run_open(contender: Contender, sent: Sequence[Arrival], first: int) -> Served:
    """Send the trace and wait for all clips but those of clients who leave."""
    began = time.perf_counter()
    served = Served({kind: [] for kind in STEPS}, 0, 0)
    outcomes = await asyncio.gather(*(_one(contender, began, first + i, one) for i, one in enumerate(sent)))
    for arrival, outcome in zip(sent, outcomes, strict=True):
        if isinstance(outcome, float):
            served.seconds[arrival.kind].append(outcome)
    return Served(served.seconds, outcomes.count("failed"), outcomes.count("gone"))


async def _one(contender: Contender, began: float, number: int, arrival: Arrival) -> float | str:
    """Seconds to the clip; or what came instead."""
    await asyncio.sleep(began + arrival.at_s - time.perf_counter())
    sent_at = time.perf_counter()
    asking = asyncio.create_task(contender.clip(job(number, arrival.kind)))
    if arrival.leaves_after_s is not None:
        await asyncio.wait([asking], timeout=arrival.leaves_after_s)
        if not asking.done():
            await contender.left(number)
            asking.cancel()  # closes the connection
            await asyncio.wait([asking])
            return "gone"
    try:
        await asking
    except NoClip:
        return "failed"
    return time.perf_counter() - sent_at


async def run_leaving(contender: Contender, sent: Sequence[Arrival], first: int) -> tuple[int, int]:
    """The trace with its leavers. Returns how many left, and the steps that were run for them afterwards."""
    before = await contender.wasted_steps()
    served = await run_open(contender, sent, first)
    with suppress(NoClip):
        await contender.clip(short_job(first + len(sent)))  # behind what still waits for clients who have gone
    await asyncio.sleep(_SETTLE_S)  # servers need not take turns in order, and steps in a log wake nobody
    return served.gone, await contender.wasted_steps() - before


async def run_kill(
    contender: Contender, jobs: Sequence[GenerateRequest], afterwards: GenerateRequest, after_s: float, again_s: float
) -> Killed:
    """All jobs at once; `after_s` seconds later the process that holds the model is killed.

    afterwards: asked for again and again for `again_s` seconds where none of the jobs came to an end.
    """
    finished_at: list[float] = []

    async def ask(request: GenerateRequest) -> None:
        await contender.clip(request)
        finished_at.append(time.perf_counter())

    asking = [asyncio.create_task(ask(request)) for request in jobs]
    await asyncio.wait(asking, timeout=after_s)
    in_flight = [task for task in asking if not task.done()]
    os.kill(contender.worker(), signal.SIGKILL)
    killed_at = time.perf_counter()
    if in_flight:
        await asyncio.wait(in_flight, timeout=_KILL_LIMIT_S)
    lost = [task for task in in_flight if not task.done() or task.exception() is not None]
    for task in lost:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    if not any(at > killed_at for at in finished_at):
        with suppress(TimeoutError):
            async with asyncio.timeout(again_s):
                finished_at.append(await _asked_again(contender, afterwards))
    again = [at - killed_at for at in finished_at if at > killed_at]
    return Killed(in_flight=len(in_flight), lost=len(lost), serves_again_s=min(again, default=None))


async def _asked_again(contender: Contender, request: GenerateRequest) -> float:
    """When the clip came."""
    while True:
        try:
            await contender.clip(request)
            return time.perf_counter()
        except NoClip:
            await asyncio.sleep(_AGAIN_PAUSE_S)  # it may be on its way back, which only an answer tells
