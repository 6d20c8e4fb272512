"""A job that this process has in hand. Owns nothing but the state that dies with the process."""

import asyncio
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

from schemas.errors import WanError
from schemas.jobs import JobRecord, Progress
from serve_graph.scheduling import Turn, Work, work_of


@dataclass
class LiveJob:
    """A job that waits or runs here.

    etag: of its record; None while a job of a batch has none yet.
    began: when this process took it up, on the monotonic clock.
    stopped_by: why its task was cancelled, where that was not a client's wish.
    handed_back: it is left to the next process. lost: another process has it. unrecorded: it ended here, and the
    store could not be told; its lease will run out.
    turn, own_s: set when it joins the line, which keeps own_s up to date while it waits. expiry: of its deadline.
    """

    record: JobRecord
    etag: str | None
    began: float
    progress: Progress | None = None
    started: bool = False
    ending: bool = False
    stopping: bool = False
    stopped_by: WanError | None = None
    handed_back: bool = False
    lost: bool = False
    unrecorded: bool = False
    waiters: int = 0
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: set[asyncio.Event] = field(default_factory=set)
    task: asyncio.Task[None] | None = None
    turn: Turn = field(default_factory=lambda: Turn(priority="normal", submitted=0.0, overdue_at=inf))
    own_s: float = 0.0
    expiry: asyncio.TimerHandle | None = None

    @cached_property
    def work(self) -> Work:
        """Of its whole clip, which never changes."""
        return work_of(self.record.parameters)

    @property
    def remaining_s(self) -> float:
        """Seconds of the device's work that are left: of its progress, or by the line's estimate."""
        progress = self.progress
        if progress is None:
            return self.own_s
        if progress.seconds_left is not None:
            return min(progress.seconds_left, self.own_s)
        return self.own_s * (1 - progress.step / max(1, progress.steps))

    @property
    def job_id(self) -> str:
        return self.record.job_id

    def tell(self) -> None:
        """Wake whoever follows this job."""
        for listener in self.listeners:
            listener.set()

    def stop(self, reason: WanError | None = None) -> None:
        """Cancel the job's task, unless its end is being recorded. reason: None where a client asked for it."""
        if self.task is not None and not self.ending:
            self.stopping = True
            self.stopped_by = self.stopped_by or reason
            # Behind its first step: a task that is cancelled before that never enters its `try`.
            asyncio.get_running_loop().call_soon(self._cancel_now)

    def _cancel_now(self) -> None:
        if self.task is not None and not self.ending:
            self.task.cancel()
