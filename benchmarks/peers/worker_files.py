"""What a worker is told in its environment, and what it leaves in its folder. Loads no model library."""

from collections.abc import Iterable, Mapping
from math import inf

CHECKPOINT_VARIABLE, FOLDER_VARIABLE = "PEER_CHECKPOINT", "PEER_FOLDER"
"""The environment is the one way into a worker that all contenders leave open."""

WORKER_FILE, STEPS_FILE = "worker.pid", "steps.log"
"""The process that holds the model (of the peers); what `step_lines` makes."""


def step_lines(seeds: Iterable[int], began: float, ended: float) -> bytes:
    """For the steps file: one step of these clips. Both times by `time.monotonic`, a clock that processes share."""
    return "".join(f"{seed} {began} {ended}\n" for seed in seeds).encode()


def steps_after(text: str, left_at: Mapping[int, float]) -> float:
    """Of a steps file: the steps of each clip after the time in `left_at`; of one under way then, the part after."""
    wasted = 0.0
    for seed, began, ended in (map(float, line.split()) for line in text.splitlines()):
        left = left_at.get(int(seed), inf)
        if ended > left:
            wasted += (ended - max(began, left)) / (ended - began)
    return wasted
