"""The prompt-preprocessing deployment: a thin shell over `text_encoding.TextEncoder`.

torch and transformers are imported on the replica: whoever only binds this class need not wait for them.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import Metric
from ray import serve

from schemas.errors import WorkerLost
from schemas.handoff import PreparedPrompt, TextEmbedding, TextItem
from schemas.requests import GenerationParameters
from serve_graph.imports import without_collector
from serve_graph.logs import configure_logging, log_event
from serve_graph.metrics import PreprocessorMetrics, new_registry, snapshot
from serve_graph.niceness import step_back
from serve_graph.settings import Settings

BATCH_WAIT_S = 0.0
"""Text encoding is quick: whatever is queued when the encoder is free makes the next batch."""

TEXT_ENCODER_GPUS = 0.1
"""Ray's share of a GPU for a text encoder that sits beside the generator; memory is not divided by it."""


class Preprocessor:
    """Counts tokens and encodes prompts, those that arrive together in one forward."""

    def __init__(self, settings: Settings) -> None:
        with without_collector():
            import torch

            from serve_graph.engine.checkpoint_folder import locate_checkpoint
            from serve_graph.engine.devices import pick_device, resolve_dtype
            from serve_graph.engine.text_checkpoint import load_text_parts
            from serve_graph.text_encoding import TextEncoder

        step_back()
        context = serve.get_replica_context()
        self._replica = context.replica_id.unique_id
        self._deployment = context.deployment
        configure_logging(level=settings.log_level, deployment=self._deployment, replica=self._replica)
        torch.set_num_threads(settings.text.num_threads)
        profile, model = settings.profile, settings.model
        device = pick_device(model.text_device, "model.text_device")
        found = locate_checkpoint(profile, model.path, model.revision)
        self._registry = new_registry()
        self._metrics = PreprocessorMetrics(self._registry)
        dtype, int8_weights = resolve_dtype(model.text_dtype, device), settings.text.int8_weights
        self._encoder = TextEncoder(
            load_text_parts(found.folder, device, dtype, int8_weights=int8_weights),
            profile.max_sequence_length,
            settings.text.cache_bytes,
            self._metrics,
        )
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wan-text")
        self._hang_timeout_s = settings.engine.hang_timeout_s
        self._busy_since: float | None = None
        self._encode_batch.set_max_batch_size(settings.text.max_batch_size)  # type: ignore[attr-defined]  # by @batch
        # The default negative prompt is in nearly every request; encoded alone, it serves reproducible ones too.
        self._encoder.encode([TextItem(profile.defaults.negative_prompt, solo=True)])
        log_event("text_encoder_loaded", device=str(device))

    async def check(self, parameters: GenerationParameters) -> None:
        """Raises PromptTooLong for the text that is."""
        self._encoder.tokens.check(parameters)

    async def prepare(self, parameters: GenerationParameters) -> PreparedPrompt:
        """Encode the prompt and, with guidance, the negative prompt. Raises PromptTooLong."""
        self._metrics.prompt_tokenized(self._encoder.tokens.check(parameters))
        texts = [parameters.prompt] + ([parameters.negative_prompt] if parameters.does_guidance else [])
        items = [TextItem(text, parameters.reproducible) for text in texts]
        positive, *negative = await asyncio.gather(*(self._encode_batch(item) for item in items))
        return PreparedPrompt(positive=positive, negative=negative[0] if negative else None)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _encode_batch(self, items: list[TextItem]) -> list[TextEmbedding]:
        self._busy_since = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._encoder.encode, items)
        finally:
            self._busy_since = None

    async def health(self) -> None:
        """Answering is all there is to it."""

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        if self._busy_since is not None and time.monotonic() - self._busy_since > self._hang_timeout_s:
            raise WorkerLost(f"the text encoder has not answered for {self._hang_timeout_s:g} s")

    async def metrics_snapshot(self) -> tuple[str, str, list[Metric]]:
        """This replica's metrics: (deployment, replica, families)."""
        return self._deployment, self._replica, snapshot(self._registry)


def preprocessor_options(settings: Settings) -> dict[str, Any]:
    """Serve's options; the config file's `deployments` go over them."""
    return {
        "name": "Preprocessor",
        "health_check_period_s": 5,
        "max_ongoing_requests": settings.queue.max_waiting_jobs + settings.max_dispatched_jobs + 16,
        "ray_actor_options": {
            "num_cpus": 0,
            "num_gpus": TEXT_ENCODER_GPUS if settings.model.text_device.startswith("cuda") else 0,
        },
    }
