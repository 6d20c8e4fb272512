"""A mixed trace with open arrivals: short and long clips, sent when their time comes, whatever is still under way."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, quantiles
from typing import Any

import httpx

from benchmarks.service import ServiceFailed
from benchmarks.workload import request
from schemas.official_profiles import WAN_TINY

PROFILE = WAN_TINY.model_copy(update={"max_num_frames": 81})
"""So that there are long clips. What they show is not looked at."""

SHORT: dict[str, Any] = {"num_frames": 17, "num_inference_steps": 6}
LONG: dict[str, Any] = {"num_frames": 49, "num_inference_steps": 60}
"""Some ten times a short clip's work."""

SHARE_OF_LONG = 0.2
LOAD = 1.0
"""By the times that clips take alone. Below, few wait and no order matters."""

COUNT = 50


@dataclass(frozen=True)
class Arrival:
    """A request of the trace. at_s: since the trace's beginning."""

    at_s: float
    is_long: bool


@dataclass(frozen=True)
class Outcome:
    """Seconds from sending a request to its clip, and how fast the whole trace was."""

    short_s: list[float]
    long_s: list[float]
    clips_per_s: float

    @property
    def short_mean_s(self) -> float:
        return mean(self.short_s)

    @property
    def short_p95_s(self) -> float:
        return quantiles(self.short_s, n=20)[-1]

    @property
    def worst_long_s(self) -> float:
        return max(self.long_s)


def arrivals(seed: int, short_s: float, long_s: float) -> list[Arrival]:
    """Poisson arrivals; the same for each seed. short_s, long_s: what a clip of each kind takes alone."""
    dice = random.Random(seed)
    gap_s = ((1 - SHARE_OF_LONG) * short_s + SHARE_OF_LONG * long_s) / LOAD
    at_s, found = 0.0, []
    for _ in range(COUNT):
        at_s += dice.expovariate(1 / gap_s)
        found.append(Arrival(at_s, dice.random() < SHARE_OF_LONG))
    return found


async def alone(http: httpx.AsyncClient, fields: dict[str, Any], first: int) -> float:
    """Seconds that such a clip takes with nothing beside it: the median of three."""
    return sorted([await _clip(http, fields, first + number) for number in range(3)])[1]


async def run(http: httpx.AsyncClient, trace: Sequence[Arrival], first: int) -> Outcome:
    """Send the trace and wait for all of its clips."""
    began = time.perf_counter()

    async def one(number: int, arrival: Arrival) -> float:
        await asyncio.sleep(max(0.0, began + arrival.at_s - time.perf_counter()))
        return await _clip(http, LONG if arrival.is_long else SHORT, first + number)

    seconds = await asyncio.gather(*(one(number, arrival) for number, arrival in enumerate(trace)))
    taken = time.perf_counter() - began
    short_s = [s for s, arrival in zip(seconds, trace, strict=True) if not arrival.is_long]
    long_s = [s for s, arrival in zip(seconds, trace, strict=True) if arrival.is_long]
    return Outcome(short_s, long_s, len(trace) / taken)


async def _clip(http: httpx.AsyncClient, fields: dict[str, Any], number: int) -> float:
    began = time.perf_counter()
    body = request(number).model_dump(mode="json", exclude_unset=True) | fields
    answer = await http.post("/generate", json=body)
    if answer.status_code != 200:
        raise ServiceFailed(f"status {answer.status_code}: {answer.text}")
    return time.perf_counter() - began
