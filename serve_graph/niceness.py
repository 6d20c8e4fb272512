"""Who gets the CPU first: the generator, whose device thread must never wait for those that only pass things on.

Ray would start every worker at 15 with some of its threads at 0, which would go before the device's thread. Our
workers start at the service's own niceness, and all but the generator step back.
"""

import os
import sys
from pathlib import Path
from typing import Final

RAY_WORKER_NICENESS: Final = 0
"""What Ray adds to a worker's niceness."""

STEP_BACK: Final = 15
"""Where Ray would have put every worker: a thirtieth of the generator's weight where all cores compute."""


def step_back() -> None:
    """Lower the priority of every thread of this process; those that they start follow. Linux only."""
    if sys.platform != "linux":
        return
    for thread in map(int, (folder.name for folder in Path("/proc/self/task").iterdir())):
        try:
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + STEP_BACK)
        except ProcessLookupError:  # it has ended
            continue
