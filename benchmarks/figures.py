"""Medians, ratios taken pair by pair, and what was aimed at. Pure: knows nothing of what was measured."""

from collections.abc import Sequence
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict

Unit = Literal["s", "clips/s", "items/s", "%"]


class _Figure(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Spread(_Figure):
    """The median of some values, and how far they lie apart."""

    median: float
    min: float
    max: float
    count: int


class Measure(_Figure):
    """A contender's values under one condition. spread: of single clips, or of blocks."""

    name: str
    unit: Unit
    spread: Spread


class Comparison(_Figure):
    """One contender over another, each pair measured side by side.

    difference_s: the seconds that the first took more, pair by pair; None for rates.
    """

    name: str
    ratio: Spread
    difference_s: Spread | None
    goal: str
    passed: bool


def spread(values: Sequence[float]) -> Spread:
    """Raises statistics.StatisticsError when there are no values."""
    return Spread(median=median(values), min=min(values), max=max(values), count=len(values))


def ratios(values: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Each value over the one that was measured beside it. Raises ValueError when they don't pair up."""
    return spread([value / base for value, base in zip(values, baseline, strict=True)])


def differences(values: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Each value less the one that was measured beside it. Raises ValueError when they don't pair up."""
    return spread([value - base for value, base in zip(values, baseline, strict=True)])


def no_slower(name: str, seconds: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """Goal: the median ratio is at most 1."""
    ratio = ratios(seconds, baseline)
    return Comparison(
        name=name,
        ratio=ratio,
        difference_s=differences(seconds, baseline),
        goal="time ratio ≤ 1.00",
        passed=ratio.median <= 1.0,
    )


def within_overhead(
    name: str, seconds: Sequence[float], baseline: Sequence[float], *, factor: float, extra_s: float
) -> Comparison:
    """Goal: `factor` times the baseline and `extra_s` more is not exceeded, in the median of all pairs."""
    excess_s = differences(seconds, [factor * base for base in baseline])
    return Comparison(
        name=name,
        ratio=ratios(seconds, baseline),
        difference_s=differences(seconds, baseline),
        goal=f"time ≤ {factor:.2f} × + {1000 * extra_s:.0f} ms",
        passed=excess_s.median <= extra_s,
    )


def keeps_rate(name: str, rates: Sequence[float], baseline: Sequence[float], *, share: float) -> Comparison:
    """Goal: the median ratio of rates is at least `share`."""
    ratio = ratios(rates, baseline)
    return Comparison(
        name=name, ratio=ratio, difference_s=None, goal=f"rate ratio ≥ {share:.2f}", passed=ratio.median >= share
    )


def at_most(name: str, values: Sequence[float], baseline: Sequence[float], *, share: float) -> Comparison:
    """Goal: the median ratio is at most `share`."""
    ratio = ratios(values, baseline)
    return Comparison(
        name=name, ratio=ratio, difference_s=None, goal=f"ratio ≤ {share:.2f}", passed=ratio.median <= share
    )
