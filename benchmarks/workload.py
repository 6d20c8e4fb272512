"""What every contender is asked for: the profile's default request, each time with another prompt and seed."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from schemas.requests import GenerateRequest

IN_FLIGHT = 8
"""Clips at once in the closed loop. Source: the goal speaks of 8 clients."""

_COLOURS = ("red", "green", "blue", "yellow", "white", "orange", "purple", "cyan")
_SHAPES = ("circle", "square", "triangle", "star", "ring")
_DIRECTIONS = ("left", "right", "up", "down")


@dataclass(frozen=True)
class Block:
    """What one closed loop made. clips_per_s: between two finishes, with every slot taken."""

    clips_per_s: float
    num_clips: int


def request(number: int) -> GenerateRequest:
    """The request with this number. No two numbers share a prompt, so no cached embedding serves two of them."""
    words = _COLOURS[number % 8], _SHAPES[number // 8 % 5], _DIRECTIONS[number // 40 % 4]
    return GenerateRequest(prompt="a {} {} moving {}, scene {:05d}".format(*words, number), seed=number)


async def closed_loop(
    make: Callable[[int], Awaitable[object]], first: int, *, num_timed: int, in_flight: int = IN_FLIGHT
) -> Block:
    """Keep `in_flight` clips under way, each finished one replaced, until enough were timed.

    make: makes the clip with this number. first: the first number; the others follow it.
    The time runs from the finish number `in_flight` to the one `num_timed` later: the start, when nothing has
    finished yet, and the end, when nothing follows, are left out.
    """
    numbers = itertools.count(first)
    finished: list[float] = []

    async def slot() -> None:
        while len(finished) < in_flight + num_timed:
            await make(next(numbers))
            finished.append(time.perf_counter())

    async with asyncio.TaskGroup() as slots:
        for _ in range(in_flight):
            slots.create_task(slot())
    seconds = finished[in_flight + num_timed - 1] - finished[in_flight - 1]
    return Block(clips_per_s=num_timed / seconds, num_clips=len(finished))
