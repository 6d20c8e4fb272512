"""Which work the device does next. Pure: knows jobs as a shape, a size and a phase, and nothing of tensors.

First in, first served, with two refinements. A decode goes first, since it ends a job. And the oldest denoising
job takes others of its shape along, oldest first, as far as the token budget goes; a reproducible job travels
alone, so that its bytes depend on it alone, and so does a suspect, whose last shared forward failed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Schedulable(Protocol):
    """What the policy needs to know of a job."""

    @property
    def is_decoding(self) -> bool: ...

    @property
    def travels_alone(self) -> bool: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True)
class Decode:
    """Decode the next chunk of the job at this index."""

    index: int


@dataclass(frozen=True)
class Step:
    """Take one denoising step of the jobs at these indices, in one forward."""

    indices: tuple[int, ...]


def next_work(jobs: Sequence[Schedulable], max_batch_tokens: int) -> Decode | Step | None:
    """Choose among the jobs in flight, given oldest first. None when there are none."""
    for index, job in enumerate(jobs):
        if job.is_decoding:
            return Decode(index)
    if not jobs:
        return None
    leader = jobs[0]
    chosen = [0]
    if not leader.travels_alone:
        tokens = leader.num_tokens
        for index, job in enumerate(jobs[1:], start=1):
            if job.travels_alone or job.shape != leader.shape:
                continue
            if tokens + job.num_tokens > max_batch_tokens:
                break
            chosen.append(index)
            tokens += job.num_tokens
    return Step(tuple(chosen))
