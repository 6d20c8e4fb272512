"""Which work the device does next. Pure: knows jobs as a shape, a size, a phase and a turn, and nothing of tensors.

Whose turn it is says `serve_graph.scheduling`, and it is asked again for every unit of work: a job that is passed over
stays as it is until its turn comes. The first job takes others of its shape and levers along, in their order, as far as
the token budget goes; a reproducible job travels alone, so that its bytes depend on it alone, and so does a suspect,
whose last shared forward failed.

Under `fifo` a decode goes first, since it ends a job. Under `srpt` a chunk is a unit of work like a step: near a job's
end little work is left, so only a shorter job comes between, and a long decode keeps none waiting for all of it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from serve_graph.scheduling import Candidate, Policy, order

MAX_OPEN_DECODES: Final = 2
"""Decodes that may have begun and not ended. Each keeps features of its last frames on the device, gigabytes for a
large clip, while a job that is passed over in denoising keeps megabytes."""


class Schedulable(Candidate, Protocol):
    """What the policy needs to know of a job."""

    @property
    def is_decoding(self) -> bool: ...

    @property
    def has_open_decode(self) -> bool: ...

    @property
    def travels_alone(self) -> bool: ...

    @property
    def company(self) -> Hashable: ...

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


def next_work(jobs: Sequence[Schedulable], max_batch_tokens: int, policy: Policy, now: float) -> Decode | Step | None:
    """Choose among the jobs in flight. None when there are none."""
    if not jobs:
        return None
    ordered = order(jobs, policy, now)
    decode = _decode_first(jobs, ordered) if policy == "fifo" else _decode_in_turn(jobs, ordered)
    if decode is not None:
        return decode
    leader = jobs[ordered[0]]
    chosen = [ordered[0]]
    if not leader.travels_alone:
        tokens = leader.num_tokens
        for index in ordered[1:]:
            job = jobs[index]
            if job.is_decoding or job.travels_alone or job.company != leader.company:
                continue
            tokens += job.num_tokens
            if tokens > max_batch_tokens:
                break
            chosen.append(index)
    return Step(tuple(chosen))


def _decode_first(jobs: Sequence[Schedulable], ordered: Sequence[int]) -> Decode | None:
    return next((Decode(index) for index in ordered if jobs[index].is_decoding), None)


def _decode_in_turn(jobs: Sequence[Schedulable], ordered: Sequence[int]) -> Decode | None:
    """The first job's chunk, or where it would open one decode too many, that of the first open one."""
    first = jobs[ordered[0]]
    if not first.is_decoding:
        return None
    opened = [index for index in ordered if jobs[index].has_open_decode]
    may_go_on = first.has_open_decode or len(opened) < MAX_OPEN_DECODES
    return Decode(ordered[0] if may_go_on else opened[0])
