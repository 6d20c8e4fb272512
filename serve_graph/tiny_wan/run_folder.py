"""A training run's folder: its state, its log and its curves. What every stage shares; knows no model.

A stage saves its state every few minutes and at its end, in one rename, so it can be killed at any time and goes on
where it was. It waits while the pause file exists.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SAVE_EVERY_S = 180.0
_PAUSE_POLL_S = 2.0


@dataclass
class RunFolder:
    """One stage's part of the folder: `{stage}.state.pt`, `{stage}.jsonl`."""

    folder: Path
    stage: str
    pause_file: Path | None = None
    cpu_s: float = 0.0
    _cpu_began: float = field(default_factory=time.process_time)
    _saved: float = field(default_factory=time.monotonic)

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None at the first start."""
        path = self.folder / f"{self.stage}.state.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.cpu_s = state["cpu_s"]
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state, in one rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.stage}.state.pt"
        scratch = path.with_suffix(".part")
        torch.save({**state, "cpu_s": self.used_cpu_s()}, scratch)
        os.replace(scratch, path)  # noqa: PTH105  # the same as Path.replace, named as what it is
        self._saved = time.monotonic()

    def should_save(self) -> bool:
        """Whether the last save is some minutes old."""
        return time.monotonic() - self._saved > SAVE_EVERY_S

    def used_cpu_s(self) -> float:
        """CPU seconds of this stage, those before a restart included."""
        return self.cpu_s + time.process_time() - self._cpu_began

    def log(self, **values: float | int | str) -> None:
        """Add a line to the log, and print it."""
        line = {**values, "cpu_s": round(self.used_cpu_s(), 1)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.stage}.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(
            self.stage, *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()), flush=True
        )

    def read_log(self) -> list[dict[str, Any]]:
        """The log's lines; where a restart repeated a step, its last line."""
        path = self.folder / f"{self.stage}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return list({(line["step"], line.get("kind")): line for line in lines}.values())

    def wait_while_paused(self) -> None:
        """Return once there is no pause file."""
        while self.pause_file is not None and self.pause_file.exists():
            time.sleep(_PAUSE_POLL_S)  # a file tells that the pause is over

    def steps(self, first: int, last: int) -> Iterator[int]:
        """first to last - 1, each once the pause file is gone."""
        for step in range(first, last):
            self.wait_while_paused()
            yield step
