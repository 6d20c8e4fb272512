"""What runs jobs where the process that records them does not: Modal, which is called for work. Knows no Modal.

A call is a turn: a process that has the model works, on whatever is next in line, at least until what the call names
has ended (`JobService.work_on`). The order of jobs is thus decided where they run, at the moment when there is room,
and not by the platform's own queue.
"""

from typing import Protocol


class PlatformUnavailable(Exception):
    """The platform does not take calls now; a sweep tries again."""


class Platform(Protocol):
    """Methods block; they run on the pool that store calls run on."""

    @property
    def max_turns(self) -> int:
        """How many calls can be under way at once, in all processes."""

    def call(self, work_id: str) -> str:
        """Have a job or a batch seen to. Returns the call's id. Raises PlatformUnavailable."""

    def is_pending(self, call_id: str) -> bool:
        """Whether a call waits or runs. Raises PlatformUnavailable."""

    def is_idle(self) -> bool:
        """Whether no call waits or runs. Raises PlatformUnavailable."""
