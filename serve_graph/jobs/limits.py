"""What bounds the job service: numbers of jobs, and times."""

from dataclasses import dataclass

from serve_graph.scheduling import Policy

MIN_ORPHAN_S = 600.0


@dataclass(frozen=True)
class QueueLimits:
    """max_waiting_jobs: beyond it, QueueFull. max_dispatched_jobs: handed to the worker at once.

    policy, max_stretch: see `serve_graph.scheduling`.
    max_batches: unfinished ones of one principal; beyond it, QuotaExceeded.
    by_call: jobs are under way only while calls of a platform are open, see `turns.py`.
    max_clip_pixels: width x height x frames of one clip that fit into the device's memory; None: as the plan says.
    """

    max_waiting_jobs: int
    max_dispatched_jobs: int
    max_clip_pixels: int | None = None
    policy: Policy = "srpt"
    max_stretch: float = 1.35
    max_batches: int = 64
    by_call: bool = False


@dataclass(frozen=True)
class Patiences:
    """Times in seconds.

    worker_s, store_s: how long a job waits for a lost worker to be replaced, and for a store that is away.
    lease_s: a record that stays unchanged for so long has lost its owner.
    stall_s: leases are renewed as long as the worker said something within so much.
    run_s: how long one attempt may run, from its first step on.
    kept_s: after so much, ended jobs and batches are deleted; None: never. upkeep_s: between two looks for them.
    """

    worker_s: float
    store_s: float
    lease_s: float = 20.0
    stall_s: float = 600.0
    run_s: float = 4 * 3600.0
    kept_s: float | None = None
    upkeep_s: float = 300.0

    @property
    def orphan_s(self) -> float:
        """An index entry that leads to nothing is nothing that is just being made, once it was there for so long."""
        return max(MIN_ORPHAN_S, 10 * self.lease_s)

    @property
    def renewal_s(self) -> float:
        """Between two renewals, and between two looks at others' jobs: two may be missed."""
        return self.lease_s / 3
