"""The jobs that wait in this process, those under way, and whose turn it is. Knows no record's store and no worker.

The order is `serve_graph.scheduling`'s; this keeps what it is asked about, and learns how long work takes from the
jobs that end.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from schemas.jobs import RenderedClip
from schemas.requests import GenerateRequest, GenerationParameters, Priority
from serve_graph.jobs.live import LiveJob
from serve_graph.scheduling import (
    Candidate,
    Outlook,
    Policy,
    Shares,
    Turn,
    WorkModel,
    next_to_start,
    order,
    outlook,
    work_of,
)

SHORT_LINE = 256
"""A line that is no longer is ordered at every choice."""

RESORT_S = 0.5
"""A longer one is ordered so often; in between the first of it and all that came since are compared."""

HEADS = 32
OUTLOOK_S = 0.5
"""What clients are told of their places may be so old."""


@dataclass(frozen=True)
class Scheduling:
    """policy, max_stretch: see `serve_graph.scheduling`. slots: jobs under way at once."""

    slots: int
    policy: Policy = "srpt"
    max_stretch: float = 1.35


@dataclass(frozen=True)
class _Prospect:
    """A job that has not been submitted."""

    turn: Turn
    remaining_s: float


class Line:
    """All of it belongs to one event loop."""

    def __init__(self, scheduling: Scheduling) -> None:
        self._scheduling = scheduling
        self._model = WorkModel()
        self._shares = Shares()
        self._waiting: dict[str, LiveJob] = {}
        self._under_way: dict[str, LiveJob] = {}
        self._waiting_s = 0.0
        self._sorted: dict[str, LiveJob] = {}
        self._came_since: dict[str, LiveJob] = {}
        self._sorted_at = float("-inf")
        self._outlooks: dict[str, Outlook] = {}
        self._outlooks_at = float("-inf")

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[LiveJob]:
        return iter(list(self._waiting.values()))

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._waiting

    def join(self, live: LiveJob, deadline_left_s: float | None = None) -> None:
        """Put a job in line."""
        live.own_s = self._model.seconds(live.work)
        share = None if live.record.batch_id is None else live.record.principal
        fair_start = None if share is None else self._shares.enter(share, live.own_s)
        live.turn = self._turn(live.own_s, live.record.request.priority, deadline_left_s, fair_start)
        self._waiting[live.job_id] = self._came_since[live.job_id] = live
        self._waiting_s += live.own_s

    def own_seconds(self, parameters: GenerationParameters) -> float:
        """Of the device for one clip; a first guess only until `is_calibrated`."""
        return self._model.seconds(work_of(parameters))

    def prospect(self, request: GenerateRequest, parameters: GenerationParameters) -> Outlook:
        """Where a single job would stand that joined now. No job's place changes."""
        own_s = self.own_seconds(parameters)
        joining = _Prospect(self._turn(own_s, request.priority, request.deadline_s, None), own_s)
        jobs: list[Candidate] = [*self._under_way.values(), *self._estimated(self._waiting.values()), joining]
        return outlook(jobs, self._scheduling.policy, time.monotonic())[-1]

    def _turn(self, own_s: float, priority: Priority, deadline_s: float | None, fair_start: float | None) -> Turn:
        return Turn.at_submission(
            time.monotonic(),
            own_s=own_s,
            ahead_s=self._waiting_s + sum(other.remaining_s for other in self._under_way.values()),
            max_stretch=self._scheduling.max_stretch,
            priority=priority,
            deadline_s=deadline_s,
            fair_start=fair_start,
        )

    def next(self) -> LiveJob | None:
        """Take the job out of line that begins now; None when none does."""
        now, waiting = time.monotonic(), self._candidates()
        policy = self._scheduling.policy
        index = next_to_start(waiting, list(self._under_way.values()), self._scheduling.slots, policy, now)
        if index is None:
            return None
        live = waiting[index]
        self.leave(live)
        self._under_way[live.job_id] = live
        if live.turn.fair_start is not None:
            self._shares.began(live.turn.fair_start)
        return live

    def leave(self, live: LiveJob) -> bool:
        """Take a job out of line that does not begin, or out of those under way. Returns whether it was in line."""
        self._under_way.pop(live.job_id, None)
        self._sorted.pop(live.job_id, None)
        self._came_since.pop(live.job_id, None)
        if self._waiting.pop(live.job_id, None) is None:
            return False
        self._waiting_s = self._waiting_s - live.own_s if self._waiting else 0.0
        return True

    def learn(self, live: LiveJob, clip: RenderedClip) -> None:
        """A job ended that took so long."""
        self._model.saw_job(live.work, clip.denoise_device_s, clip.decode_device_s)

    def seconds_for(self, num_jobs: int) -> float:
        """About how long the device takes for so many of the jobs in line."""
        known = len(self._waiting) + len(self._under_way)
        left_s = self._waiting_s + sum(live.remaining_s for live in self._under_way.values())
        return num_jobs * left_s / known if known else 0.0

    def outlook(self, live: LiveJob) -> Outlook | None:
        """A job's place among all that wait or run here; None for a moment where the line is long."""
        now = time.monotonic()
        unknown = live.job_id not in self._outlooks and len(self._waiting) <= SHORT_LINE
        if unknown or now - self._outlooks_at > OUTLOOK_S:
            jobs = [*self._under_way.values(), *self._estimated(self._waiting.values())]
            found = outlook(jobs, self._scheduling.policy, now)
            self._outlooks = {job.job_id: seen for job, seen in zip(jobs, found, strict=True)}
            self._outlooks_at = now
        return self._outlooks.get(live.job_id)

    @property
    def is_calibrated(self) -> bool:
        """Whether estimates of seconds mean anything yet."""
        return self._model.is_calibrated

    def _candidates(self) -> list[LiveJob]:
        """Those among whom the next one is."""
        if len(self._waiting) <= SHORT_LINE:
            return self._estimated(self._waiting.values())
        now = time.monotonic()
        if now - self._sorted_at > RESORT_S or len(self._came_since) > SHORT_LINE or not self._sorted:
            jobs = self._estimated(self._waiting.values())
            ordered = order(jobs, self._scheduling.policy, now)
            self._sorted = {jobs[index].job_id: jobs[index] for index in ordered}
            self._came_since, self._sorted_at = {}, now
        heads = [live for live, _ in zip(self._sorted.values(), range(HEADS), strict=False)]
        return self._estimated([*heads, *self._came_since.values()])

    def _estimated(self, waiting: Iterable[LiveJob]) -> list[LiveJob]:
        """The same, each with what its work is put at now: whoever is compared has to be, since estimates of when a
        job came would put equals in the order in which they fell."""
        jobs = list(waiting)
        for live in jobs:
            seconds = self._model.seconds(live.work)
            self._waiting_s += seconds - live.own_s
            live.own_s = seconds
        return jobs
