"""An unfinished batch as one process sees it: where each of its jobs is. Reads and writes nothing."""

import asyncio
import time
from array import array
from collections.abc import Mapping
from typing import Final

from schemas.batches import BatchCancel, BatchCounts, BatchManifest
from schemas.jobs import JobState, item_id

WAITING: Final = 0
"""Nobody has it in hand, as far as this process knows."""
HERE: Final = 1
"""This process has it in hand."""
ELSEWHERE: Final = 2
"""It has a record that has to be looked at: another process has it, or this one's was not filed yet."""
_ENDED: Final = {JobState.SUCCEEDED: 3, JobState.FAILED: 4, JobState.CANCELLED: 5}


class RunningBatch:
    """One byte per job; counting and finding are one pass over them.

    ends: where the manifest's lines end. cancel: once it was cancelled. shared: another process works on it, too.
    looked: whether the records that there were at the cancel are known here. service: how much work was begun here.
    """

    def __init__(self, head: BatchManifest, ends: "array[int]", service: float) -> None:
        self.head = head
        self.ends = ends
        self.service = service
        self.cancel: BatchCancel | None = None
        self.looked = False
        self.shared = False
        self.finishing = False
        self.over = asyncio.Event()
        self._places = bytearray(head.total)
        self._began_at: float | None = None
        self._done_at_first = 0

    @property
    def batch_id(self) -> str:
        return self.head.batch_id

    def next_waiting(self) -> int | None:
        """The next job to begin; None where there is none, or it must not begin."""
        index = self._places.find(WAITING) if self.cancel is None else -1
        return None if index < 0 else index

    def place(self, index: int) -> int:
        """Where a job is: `WAITING`, `HERE`, `ELSEWHERE`, or more where it has ended."""
        return self._places[index]

    def put(self, index: int, place: int) -> None:
        """A job is somewhere else now. One that has ended stays where it is."""
        if self._places[index] <= ELSEWHERE:
            self._places[index] = place
            if place == HERE and self._began_at is None:
                self._began_at, self._done_at_first = time.monotonic(), self.num_ended

    def ended(self, index: int, state: JobState) -> None:
        """A job's end is on record, and so is its place among the ended ones."""
        if index < len(self._places):
            self._places[index] = _ENDED[state]

    def all_ended(self, done: Mapping[int, JobState]) -> None:
        """As `ended`, for what a list of the store has shown."""
        for index, state in done.items():
            self.ended(index, state)

    def at(self, place: int) -> list[str]:
        """The ids of the jobs at a place."""
        found, index = [], self._places.find(place)
        while index >= 0:
            found.append(item_id(self.batch_id, index))
            index = self._places.find(place, index + 1)
        return found

    @property
    def num_waiting(self) -> int:
        """Jobs that will begin some time."""
        return self._places.count(WAITING) if self.cancel is None else 0

    @property
    def num_ended(self) -> int:
        return sum(self._places.count(place) for place in _ENDED.values())

    @property
    def is_over(self) -> bool:
        """Whether every job has ended, or was cancelled before it began."""
        if self._places.count(HERE) or self._places.count(ELSEWHERE):
            return False
        return self.looked if self.cancel is not None else not self._places.count(WAITING)

    def counts(self, running: int) -> BatchCounts:
        """running: those of `HERE` that hold a slot of the engine."""
        ended = {state: self._places.count(place) for state, place in _ENDED.items()}
        waiting = self._places.count(WAITING)
        unbegun = waiting if self.cancel is not None else 0
        return BatchCounts(
            queued=self.head.total - sum(ended.values()) - unbegun - running,
            running=running,
            succeeded=ended[JobState.SUCCEEDED],
            failed=ended[JobState.FAILED],
            cancelled=ended[JobState.CANCELLED] + unbegun,
        )

    def seconds_left(self) -> float | None:
        """As many as the jobs that are left take at the pace of those that ended since this process is at it."""
        left = self.head.total - self.num_ended - (self._places.count(WAITING) if self.cancel is not None else 0)
        gone = self.num_ended - self._done_at_first
        if self._began_at is None or gone <= 0:
            return None
        return round(left * (time.monotonic() - self._began_at) / gone, 1)
