"""Renders clips into nothing before the first request, which then pays for no kernel that is built or chosen first."""

import gc
import queue
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from prometheus_client import CollectorRegistry

from schemas.handoff import PreparedPrompt
from schemas.requests import GenerationParameters
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.job import EngineEvent, EngineJob, Failed, Finished
from serve_graph.engine.loop import Engine, EngineLimits
from serve_graph.metrics import GeneratorMetrics


class _Nowhere:
    """Takes frames and keeps none."""

    def write(self, frames: npt.NDArray[np.uint8]) -> None:
        pass


def warm_up(
    parts: GeneratorParts, clips: Sequence[tuple[GenerationParameters, PreparedPrompt]], *, text_length: int
) -> None:
    """Render each clip, one after the other. Raises what an attempt failed with."""
    limits = EngineLimits(max_jobs_in_flight=1, max_batch_tokens=1, text_length=text_length)
    engine = Engine(parts, limits, GeneratorMetrics(CollectorRegistry()), lambda job_id, error: None)
    try:
        for number, (parameters, prompt) in enumerate(clips):
            events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
            engine.submit(EngineJob(f"warm-up-{number}", parameters, prompt, sink=_Nowhere(), notify=events.put))
            while not isinstance(event := events.get(), Finished):
                if isinstance(event, Failed):
                    raise event.error
    finally:
        engine.close()
    gc.collect()
    if parts.device.type == "cuda":
        torch.cuda.empty_cache()
