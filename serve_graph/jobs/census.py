"""How many jobs this process has in hand, whose they are and whether they run. Its cost does not grow with them.

Jobs of batches count while they run; those that wait don't take the place of other jobs in line.
"""

from collections import Counter

from serve_graph.jobs.live import LiveJob


class Census:
    """submitting: by principal, those that are checked and not yet recorded; the job service counts them itself.

    elsewhere: those that others run, where this process runs none; as of the last look at the store.
    """

    def __init__(self) -> None:
        self.submitting: Counter[str] = Counter()
        self.elsewhere: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._running: set[str] = set()
        self._num_waiting = 0

    def came(self, live: LiveJob) -> None:
        """A job that waits."""
        self._count_waiting(live, 1)

    def moved(self, live: LiveJob) -> None:
        """It may have got a slot of the engine, or lost it."""
        ran = live.job_id in self._running
        if live.started and not ran:
            self._running.add(live.job_id)
            self._count_waiting(live, -1)
        elif ran and not live.started:
            self._running.discard(live.job_id)
            self._count_waiting(live, 1)

    def went(self, live: LiveJob) -> None:
        """This process has it no longer in hand."""
        if live.job_id in self._running:
            self._running.discard(live.job_id)
        else:
            self._count_waiting(live, -1)
        if not self._waiting[live.record.principal]:
            del self._waiting[live.record.principal]

    @property
    def running(self) -> int:
        """Jobs that hold a slot of the engine."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """All others."""
        return self._num_waiting + self.submitting.total() + self.elsewhere.total()

    def waiting_of(self, principal: str) -> int:
        """One principal's jobs that wait."""
        return self.submitting[principal] + self._waiting[principal] + self.elsewhere[principal]

    def _count_waiting(self, live: LiveJob, change: int) -> None:
        if live.record.batch_id is None:
            self._num_waiting += change
            self._waiting[live.record.principal] += change
