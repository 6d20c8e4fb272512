"""The service's generator, which also writes down each step that it takes for a job, as the peers' workers do.

Progress as clients are told it is up to a quarter of a second old, which is half of a short job. Without this, steps
that were taken before a client left would count as taken afterwards.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.serve import Application

import serve_graph.app
from benchmarks.peers.worker_files import FOLDER_VARIABLE, STEPS_FILE, step_lines
from serve_graph.generator import Generator

if TYPE_CHECKING:  # it loads torch, which Serve's controller would wait for, too
    from serve_graph.engine.job import EngineJob


class LoggedGenerator(Generator):
    """Its engine's steps go through a method that logs them."""

    def _begin(self) -> None:
        super()._begin()
        if self._engine is None:
            raise RuntimeError("the generator began without an engine")
        steps = (Path(os.environ[FOLDER_VARIABLE]) / STEPS_FILE).open("ab", buffering=0)
        take_step = self._engine._step

        def take_logged_step(batch: "Sequence[EngineJob]") -> None:
            began = time.monotonic()
            take_step(batch)
            steps.write(step_lines([job.parameters.seed for job in batch], began, time.monotonic()))

        self._engine._step = take_logged_step  # type: ignore[method-assign]  # of this engine alone


def build_app(args: dict[str, Any]) -> Application:
    """As `serve_graph.app.build_app`, but with the generator above."""
    serve_graph.app.Generator = LoggedGenerator  # type: ignore[misc]  # what the application binds
    return serve_graph.app.build_app(args)
