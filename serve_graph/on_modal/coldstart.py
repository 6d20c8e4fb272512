"""Measures cold starts: from a call, with no container up, to the answer of one that has the model."""

import statistics
import time
from pathlib import Path
from typing import Any, Final

from serve_graph.on_modal.commands import OUT, write_record
from serve_graph.on_modal.options import ModalOptions

POLL_S: Final = 1.0
SCALE_DOWN_S: Final = 2
MAX_WAIT_S: Final = 900


def measure(generator: Any, count: int, options: ModalOptions) -> Path:
    """generator: an instance of the deployed class. Its autoscaler is put back as it was.

    Returns the record's path. Raises TimeoutError where a container stays up; what was measured is on record then.
    """
    seconds, awake, failures, starts = [], [], 0, []
    before = generator.update_autoscaler()  # without a change it tells
    generator.update_autoscaler(scaledown_window=SCALE_DOWN_S, min_containers=0, buffer_containers=0)
    try:
        for number in range(count):
            _wait_until_none(generator.started)
            began = time.monotonic()
            try:
                container = generator.started.remote()
            except Exception as failure:  # whatever a start can end with is what is counted here
                failures += 1
                print(f"{number + 1}/{count}: {type(failure).__name__}: {failure}", flush=True)
                continue
            seconds.append(time.monotonic() - began)
            awake.append(container["awake_s"])
            starts.append(container["start"])
            print(f"{number + 1}/{count}: {seconds[-1]:.2f} s, {container['start']}, {container['gpu']}", flush=True)
    finally:
        generator.update_autoscaler(
            scaledown_window=before.scaledown_window,
            min_containers=before.min_containers,
            buffer_containers=before.buffer_containers,
        )
        record = write_record(OUT, "coldstart", "Cold starts", summary(seconds, awake, failures, starts, options))
    return record


def summary(
    seconds: list[float], awake: list[float], failures: int, starts: list[str], options: ModalOptions
) -> dict[str, Any]:
    """p50 and p95 of the call to its answer, and the median of the part after the restore."""
    return {
        "gpu": options.gpu,
        "snapshot": options.snapshot,
        "count": len(seconds) + failures,
        "failures": failures,
        "rebuilt": starts.count("rebuilt"),
        "p50_s": round(statistics.median(seconds), 2) if seconds else None,
        "p95_s": round(statistics.quantiles(seconds, n=20)[-1], 2) if len(seconds) > 1 else None,
        "awake_p50_s": round(statistics.median(awake), 2) if awake else None,
    }


def _wait_until_none(started: Any) -> None:
    deadline = time.monotonic() + MAX_WAIT_S
    while started.get_current_stats().num_total_runners:
        if time.monotonic() > deadline:
            raise TimeoutError("a container stays up: is somebody using the service?")
        time.sleep(POLL_S)  # Modal tells its number of containers to whoever asks
