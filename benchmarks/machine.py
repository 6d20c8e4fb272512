"""The machine that a benchmark ran on."""

import os
import platform
from pathlib import Path

import psutil

from benchmarks.tables import Part


class Machine(Part):
    """Where it was measured; nothing that names the machine. load: the mean of the last minute before the run."""

    cpu: str
    num_cores: int
    memory_bytes: int
    load: float


def machine() -> Machine:
    """This machine, as far as the figures depend on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return Machine(
        cpu=next(names, platform.machine()),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        load=round(os.getloadavg()[0], 2),
    )
