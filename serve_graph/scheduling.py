"""Whose turn it is, and how long that takes. Pure: no clock, no tensor, no Ray; times are passed in.

One order serves everyone who chooses among jobs: the job service (which one the generator gets next), the engine (which
one takes the next step) and whoever tells a client its position. Under `fifo` it is the order of submission. Under
`srpt`, from the first to the last:

1. Overdue jobs, whatever their class, the longest overdue first.
2. Else by class: `high`, `normal`, `low`. Within a class:
   a. jobs whose deadline is near, the nearest first;
   b. single jobs, the one with the least work left first (shortest remaining processing time);
   c. items of batches, in the order of their fair starts (`Shares`).

*No job starves.* When a job becomes overdue is fixed at its submission (`Turn.at_submission`): `max_stretch` times what
`fifo` would have taken, or `ALONE_STRETCH` times its own work where that is more, less its own work; for low jobs and
items of batches `PATIENCE_OF_LOW` times the first, less their own work. From then on only jobs go before it that became
overdue earlier. All of these are known by then, since none becomes overdue before it was submitted. So it ends at the
latest when the device has worked off those and itself, however many jobs of whatever class and size arrive meanwhile,
and whether or not the estimates were right.

The estimates come from `WorkModel`, which counts work and learns the seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, Literal, NamedTuple, Protocol

from schemas.handoff import Standing
from schemas.presets import PresetName
from schemas.requests import GenerationParameters, Priority
from serve_graph.architecture import num_latent_frames

Policy = Literal["fifo", "srpt"]

_CLASS: Final[dict[Priority, int]] = {"high": 1, "normal": 2, "low": 3}

PATIENCE_OF_LOW = 4.0
"""By this factor jobs of the lowest class, and batch items, become overdue later. Its inverse, over `max_stretch`, is
the part of the device that they are sure of while others could use all of it."""

MIN_FIFO_S = 0.5
"""What `fifo` takes at least, for `max_stretch`: hand-offs and uploads, in no estimate, make no job overdue."""

ALONE_STRETCH = 4.0
"""A single job above `low` may take so many times its own work, however few were before it. Without it a long job that
comes to an idle service is overdue after a third of its work, and short ones wait for all of the rest."""

NEAR = 3.0
"""A deadline is near when what is left until then is at most so many times the job's remaining work."""

HOPELESS = 0.5
"""With less than so many times the job's remaining work it can't be met, even with an estimate that is off by half, and
counts no more."""

ATTENTION_TOKENS = 20_000
"""Latent tokens at which self-attention costs as much as all that is linear in the tokens: 3 x dim + ffn_dim, counting
a transformer block's multiplications, is 13,568 for Wan 2.1 1.3B and 29,184 for 14B. Shapes that were seen have their
own averages, so this only carries over from one shape to another."""

FIRST_GUESS_S = 3e-5
"""Seconds per unit of denoising before anything was seen: 1.3B and 14B on an H100, and the tiny model on a CPU core,
are within a factor of three. Good enough to tell a long job from a short one; no client is told of it."""

_WEIGHT = 0.3
"""Of the newest observation: smooth over a few steps, yet quick to follow when the load changes."""


class Work(NamedTuple):
    """A clip's work, all of it or what is left.

    shape: frames, height, width. forwards: over all steps, a guided step has two. chunks: latent frames to decode.
    preset: forwards and chunks of one take other times than those of another.
    """

    shape: tuple[int, int, int]
    forwards: int
    chunks: int
    preset: PresetName = "exact"


def work_of(parameters: GenerationParameters) -> Work:
    """All the work of one clip."""
    return Work(
        shape=(parameters.num_frames, parameters.height, parameters.width),
        forwards=parameters.num_inference_steps + parameters.guided_steps,
        chunks=num_latent_frames(parameters.num_frames),
        preset=parameters.preset,
    )


class WorkModel:
    """Seconds of work, learnt from steps and chunks, or from whole jobs, as they are seen.

    A shape that was seen under a preset has averages of its own. Another is put at its units, forwards x tokens and
    chunks x pixels, times the seconds per unit that were seen last.
    """

    def __init__(self) -> None:
        self._forwards: dict[tuple[tuple[int, int, int], PresetName], float] = {}
        self._chunks: dict[tuple[tuple[int, int, int], PresetName], float] = {}
        self._per_forward_unit: float | None = None
        self._per_chunk_unit: float | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether anything was seen; `seconds` is only a first guess before."""
        return self._per_forward_unit is not None

    def saw_forwards(self, work: Work, num_forwards: int, seconds: float) -> None:
        """So many forwards of such jobs took so many seconds, those of all jobs that went together counted."""
        key, each = (work.shape, work.preset), seconds / num_forwards
        self._forwards[key] = _blend(self._forwards.get(key), each)
        self._per_forward_unit = _blend(self._per_forward_unit, each / _forward_units(work))

    def saw_chunk(self, work: Work, seconds: float) -> None:
        """One more decode chunk took so long."""
        key = (work.shape, work.preset)
        self._chunks[key] = _blend(self._chunks.get(key), seconds)
        self._per_chunk_unit = _blend(self._per_chunk_unit, seconds / _chunk_units(work))

    def saw_job(self, whole: Work, denoise_s: float, decode_s: float) -> None:
        """Such a job took so many seconds of the device, waiting for others not included."""
        if denoise_s > 0 and decode_s > 0:
            self.saw_forwards(whole, whole.forwards, denoise_s)
            self.saw_chunk(whole, decode_s / whole.chunks)

    def seconds(self, left: Work) -> float:
        """Seconds for the forwards and chunks of `left`. A chunk counts as a forward until one was decoded."""
        key = (left.shape, left.preset)
        forward = self._forwards.get(key)
        if forward is None:
            forward = _forward_units(left) * (self._per_forward_unit or FIRST_GUESS_S)
        chunk = self._chunks.get(key)
        if chunk is None:
            chunk = forward if self._per_chunk_unit is None else _chunk_units(left) * self._per_chunk_unit
        return left.forwards * forward + left.chunks * chunk


def _forward_units(work: Work) -> float:
    """Tokens of one forward, those of attention included. A patch has 16 x 16 pixels of one latent frame."""
    num_frames, height, width = work.shape
    tokens = num_latent_frames(num_frames) * height * width / 256
    return tokens * (1 + tokens / ATTENTION_TOKENS)


def _chunk_units(work: Work) -> float:
    return float(work.shape[1] * work.shape[2])


def _blend(known: float | None, seen: float) -> float:
    return seen if known is None else known + _WEIGHT * (seen - known)


@dataclass(frozen=True, slots=True)
class Turn:
    """What decides a job's place, fixed when it is submitted. Times are of the process's own monotonic clock.

    overdue_at: from then on the job goes before all that are not overdue. deadline: infinite without one.
    fair_start: None for a single job, else where `Shares` put a batch's item.
    """

    priority: Priority
    submitted: float
    overdue_at: float
    deadline: float = inf
    fair_start: float | None = None

    @classmethod
    def at_submission(
        cls,
        now: float,
        *,
        own_s: float,
        ahead_s: float,
        max_stretch: float,
        priority: Priority = "normal",
        deadline_s: float | None = None,
        fair_start: float | None = None,
    ) -> "Turn":
        """The turn of a job that is submitted now.

        own_s, ahead_s: its work, and what is left of all jobs that came before it, which `fifo` would do first.
        max_stretch: at least 1. So many times what `fifo` would have taken may the job take before others wait for it;
        `ALONE_STRETCH` times its own work at least, `PATIENCE_OF_LOW` times as long a low one or an item of a batch.
        """
        patient = priority == "low" or fair_start is not None
        may_take_s = max_stretch * max(MIN_FIFO_S, ahead_s + own_s)
        may_take_s = PATIENCE_OF_LOW * may_take_s if patient else max(may_take_s, ALONE_STRETCH * own_s)
        return cls(
            priority=priority,
            submitted=now,
            overdue_at=now + may_take_s - own_s,
            deadline=inf if deadline_s is None else now + deadline_s,
            fair_start=fair_start,
        )

    @classmethod
    def of(cls, standing: Standing, now: float) -> "Turn":
        """The turn that another process described."""
        return cls(
            priority=standing.priority,
            submitted=now - standing.waited_s,
            overdue_at=now + standing.overdue_in_s,
            deadline=now + standing.deadline_left_s,
            fair_start=standing.fair_start,
        )

    def standing(self, now: float) -> Standing:
        """The same for another process."""
        return Standing(
            priority=self.priority,
            waited_s=now - self.submitted,
            overdue_in_s=self.overdue_at - now,
            deadline_left_s=self.deadline - now,
            fair_start=self.fair_start,
        )


class Candidate(Protocol):
    """What the order needs to know of a job. remaining_s: its work that is left, in seconds of the device."""

    @property
    def turn(self) -> Turn: ...

    @property
    def remaining_s(self) -> float: ...


def order(jobs: Sequence[Candidate], policy: Policy, now: float) -> list[int]:
    """The indices of `jobs`, first to last, as the top of this file says. Equals stay as they were given."""
    if policy == "fifo":
        return sorted(range(len(jobs)), key=lambda index: jobs[index].turn.submitted)
    keys = [_key(job.turn, job.remaining_s, now) for job in jobs]
    return sorted(range(len(jobs)), key=keys.__getitem__)


def _key(turn: Turn, remaining_s: float, now: float) -> tuple[int, int, float, float]:
    if now >= turn.overdue_at:
        return 0, 0, turn.overdue_at, turn.submitted
    group = _CLASS[turn.priority]
    if HOPELESS * remaining_s <= turn.deadline - now <= NEAR * remaining_s:
        return group, 0, turn.deadline, turn.submitted
    if turn.fair_start is None:
        return group, 1, remaining_s, turn.submitted
    return group, 2, turn.fair_start, turn.submitted


def next_to_start(
    waiting: Sequence[Candidate], in_flight: Sequence[Candidate], slots: int, policy: Policy, now: float
) -> int | None:
    """Which of `waiting` begins now; None when none does.

    Under `srpt` a job that goes before everything in flight may begin though all slots are taken, one at a time:
    slots full of long jobs make no short one wait.
    """
    if not waiting or len(in_flight) > slots:
        return None
    first = order(waiting, policy, now)[0]
    if len(in_flight) < slots:
        return first
    overtakes = policy == "srpt" and order([*in_flight, waiting[first]], policy, now)[0] == len(in_flight)
    return first if overtakes else None


@dataclass(frozen=True, slots=True)
class Outlook:
    """Where a job stands. position: 1 has its turn now. seconds_left: until it is done, if nothing else arrives."""

    position: int
    seconds_left: float


def outlook(jobs: Sequence[Candidate], policy: Policy, now: float) -> list[Outlook]:
    """Each job's prospects on one device, in the order of `jobs`: give all of them, waiting and in flight."""
    prospects: dict[int, Outlook] = {}
    seconds = 0.0
    for position, index in enumerate(order(jobs, policy, now), start=1):
        seconds += jobs[index].remaining_s
        prospects[index] = Outlook(position, seconds)
    return [prospects[index] for index in range(len(jobs))]


class Shares:
    """A fair start for each item of a batch: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

    An item starts, in seconds of service, where the batch's last one ends, or where the service is now. While two
    batches both have items to do, what they were served differs by no more than their two longest items. A batch of
    one item starts where the service is, so a long batch does not keep a short one waiting.
    """

    def __init__(self) -> None:
        self._reached = 0.0
        self._ends: dict[str, float] = {}

    def enter(self, share: str, own_s: float) -> float:
        """The fair start of one more item of this batch, whose work is `own_s`."""
        start = max(self._reached, self._ends.get(share, 0.0))
        self._ends[share] = start + own_s
        return start

    def began(self, fair_start: float) -> None:
        """An item was handed to the device: batches that come from now on start level with it."""
        self._reached = max(self._reached, fair_start)
        self._ends = {share: end for share, end in self._ends.items() if end > self._reached}
