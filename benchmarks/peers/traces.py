"""What is sent, and when; and what a list of waiting times amounts to. Pure: knows no contender.

Jobs are short or long by their steps, since the tiny profile has one size.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import mean
from typing import Literal

from benchmarks.tables import Part
from benchmarks.workload import request
from schemas.requests import GenerateRequest

Kind = Literal["short", "long"]

STEPS: dict[Kind, int] = {"short": 12, "long": 60}
IN_FIVE = 5
"""Of five jobs one is long, and of five clients one goes away."""

LOADS = (0.5, 0.8, 1.1)
"""Open arrivals, as shares of the bare engine's rate for the same mix."""

WITHIN = 3.0
"""How many times its solo time a job may take to count as served in time."""


def job(number: int, kind: Kind) -> GenerateRequest:
    """The request with this number; no two share a prompt."""
    return request(number).model_copy(update={"num_inference_steps": STEPS[kind]})


def short_job(number: int) -> GenerateRequest:
    """One of the short kind."""
    return job(number, "short")


def long_job(number: int) -> GenerateRequest:
    """One of the long kind."""
    return job(number, "long")


def mixed_job(number: int) -> GenerateRequest:
    """Every fifth is long."""
    return job(number, "short" if number % IN_FIVE else "long")


@dataclass(frozen=True)
class Arrival:
    """One job of an open trace. at_s: since its beginning. leaves_after_s: when its client goes away, if it does."""

    at_s: float
    kind: Kind
    leaves_after_s: float | None = None


def arrivals(seed: int, rate: float, window_s: float) -> list[Arrival]:
    """Poisson arrivals at `rate` jobs a second for `window_s` seconds, at least five; the same for each seed.

    Of each five in a row one is long, so that no trace has more work in it than another.
    """
    dice = random.Random(seed)
    kinds = _kinds(dice)
    at_s = dice.expovariate(rate)
    found: list[Arrival] = []
    while at_s < window_s or len(found) < IN_FIVE:
        found.append(Arrival(at_s, next(kinds)))
        at_s += dice.expovariate(rate)
    return found


def with_leavers(sent: Sequence[Arrival], solo_s: dict[Kind, float]) -> list[Arrival]:
    """The same, but each fifth client goes away after half of the time that its job takes alone."""
    return [
        replace(arrival, leaves_after_s=solo_s[arrival.kind] / 2) if i % IN_FIVE == IN_FIVE // 2 else arrival
        for i, arrival in enumerate(sent)
    ]


def _kinds(dice: random.Random) -> Iterator[Kind]:
    while True:
        place_of_long = dice.randrange(IN_FIVE)
        yield from ("long" if place == place_of_long else "short" for place in range(IN_FIVE))


class Waits(Part):
    """How long the clips of one kind took, in seconds. within: the share served within `WITHIN` solo times."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    within: float


def waits(seconds: Sequence[float], solo_s: float, failed: int = 0) -> Waits | None:
    """Sum up; None where nothing was served. failed: requests without a clip, which count as not served in time."""
    if not seconds:
        return None
    return Waits(
        count=len(seconds),
        mean=mean(seconds),
        p50=percentile(seconds, 50),
        p95=percentile(seconds, 95),
        p99=percentile(seconds, 99),
        within=sum(s <= WITHIN * solo_s for s in seconds) / (len(seconds) + failed),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many per cent of them don't exceed (nearest rank). Raises IndexError without any."""
    return sorted(values)[max(0, ceil(percent / 100 * len(values)) - 1)]
