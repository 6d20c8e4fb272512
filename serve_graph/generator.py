"""The Wan generator deployment: a thin shell over the engine and the renderer.

torch and diffusers are imported on the replica: whoever only binds this class need not wait for them.
"""

from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray
from prometheus_client import Metric
from ray import serve

from schemas.errors import ModelNotReady, WorkerLost
from schemas.handoff import PreparedPrompt, RenderEvent, RenderTask
from schemas.health import GeneratorHealth, GpuHealth, ModelHealth
from schemas.requests import GenerationParameters
from serve_graph.imports import without_collector
from serve_graph.logs import configure_logging, log_event, log_failure
from serve_graph.metrics import GeneratorMetrics, new_registry, snapshot
from serve_graph.preprocessor import TEXT_ENCODER_GPUS
from serve_graph.renewal import renew_process
from serve_graph.service_plan import check_start
from serve_graph.settings import Settings, StorageSettings
from serve_graph.spool import claim_spool
from serve_graph.stores import open_store

if TYPE_CHECKING:
    import torch

    from serve_graph.engine.loop import Engine


class Generator:
    """Loads the model, then renders clips until the process ends."""

    def __init__(self, settings: Settings) -> None:
        with without_collector():
            import torch

            from serve_graph.engine.checkpoint import load_generator_parts
            from serve_graph.engine.checkpoint_folder import locate_checkpoint, locate_loras
            from serve_graph.engine.devices import pick_device, resolve_dtype
            from serve_graph.engine.tuning import tune

        context = serve.get_replica_context()
        self._replica = context.replica_id.unique_id
        self._deployment = context.deployment
        configure_logging(level=settings.log_level, deployment=self._deployment, replica=self._replica)
        torch.set_num_threads(settings.engine.num_threads)
        self._settings = settings
        model, profile = settings.model, settings.profile
        device = pick_device("cpu" if model.load_on_cpu else model.device, "model.device")
        runs_on = torch.device("cuda") if model.load_on_cpu and model.device != "cpu" else device
        gpu = _gpu(device)
        if gpu is not None:
            check_start(settings, gpu.name, gpu.memory_total_bytes)
        dtype = resolve_dtype(model.dtype, runs_on)
        found = locate_checkpoint(profile, model.path, model.revision)
        vae_dtype = resolve_dtype(model.vae_dtype, runs_on)
        self._parts = load_generator_parts(
            found.folder,
            device,
            dtype,
            vae_dtype,
            runs_on,
            presets=profile.presets.values(),
            loras=locate_loras(profile.loras, model.lora_paths, found.folder),
            scheduler=profile.scheduler,
        )
        tune(
            self._parts,
            fuse_qkv=settings.engine.fuse_qkv,
            vae_channels_last=settings.engine.vae_channels_last,
            attention_backend=settings.engine.attention_backend,
            int8_weights=settings.engine.int8_weights,
            compile_mode=settings.engine.compile,
        )
        self._device = device
        self._registry = new_registry()
        self._metrics = GeneratorMetrics(self._registry)
        self._model = ModelHealth(
            profile=profile.name, revision=found.revision, loaded=True, dtype=dtype, device=str(device)
        )
        log_event("model_loaded", profile=profile.name, dtype=dtype, device=str(device), loras=list(self._parts.loras))
        self._engine: Engine | None = None
        if not settings.queue.by_call:
            self._begin()

    def _begin(self) -> None:
        """Start the engine on the loaded model, and open the store."""
        from serve_graph.engine.loop import Engine, EngineLimits
        from serve_graph.render import Renderer

        settings = self._settings
        model = self._model
        self._metrics.set_model(model.profile, model.revision, str(model.dtype), str(self._device))
        limits = EngineLimits(
            max_jobs_in_flight=settings.engine.max_jobs_in_flight,
            max_batch_tokens=settings.engine.max_batch_tokens,
            text_length=settings.profile.max_sequence_length,
            hang_timeout_s=settings.engine.hang_timeout_s,
            policy=settings.queue.policy,
        )
        self._engine = Engine(self._parts, limits, self._metrics, _log_failure)
        self._renderer = Renderer(
            self._engine,
            open_store(settings),
            model=settings.profile.name,
            spool=claim_spool(settings.spool_dir),
            encode=settings.encode,
            executor=ThreadPoolExecutor(max_workers=2 * settings.max_dispatched_jobs, thread_name_prefix="wan-encode"),
            metrics=self._metrics,
            patience_s=settings.storage.patience_s,
        )

    def warm_up(self, clips: Sequence[tuple[GenerationParameters, PreparedPrompt]]) -> None:
        """Render these into nothing, so that kernels are built and chosen, and give back the memory that it took.

        Before `awaken` only: a memory snapshot holds what it leaves behind.
        """
        from serve_graph.engine.warm_up import warm_up

        warm_up(self._parts, clips, text_length=self._settings.profile.max_sequence_length)

    def awaken(self, environment: dict[str, str], storage: StorageSettings) -> None:
        """Begin to work, with these variables in the environment: after a snapshot it is another container's."""
        from serve_graph.engine.checkpoint import moved
        from serve_graph.engine.devices import pick_device

        renew_process(environment)
        self._settings = self._settings.model_copy(update={"storage": storage})
        if self._settings.model.load_on_cpu:
            device = pick_device(self._settings.model.device, "model.device")
            self._parts = moved(self._parts, device)
            self._device = device
            self._model = self._model.model_copy(update={"device": str(device)})
        self._begin()

    def is_awake(self) -> bool:
        """Whether it works: with `queue.by_call`, after `awaken`."""
        return self._engine is not None

    async def render(self, task: RenderTask, prompt: PreparedPrompt) -> AsyncGenerator[RenderEvent, None]:
        """Stream one clip's events; see `Renderer.render`."""
        if self._engine is None:
            raise WorkerLost("the generator has been replaced, and is woken in a moment")
        events = self._renderer.render(task, prompt)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def health(self) -> GeneratorHealth:
        """The model and its GPU. Raises ModelNotReady before `awaken`."""
        if self._engine is None:
            raise ModelNotReady("the model is loaded, and not awake yet")
        return GeneratorHealth(model=self._model, gpu=_gpu(self._device))

    async def metrics_snapshot(self) -> tuple[str, str, list[Metric]]:
        """This replica's metrics: (deployment, replica, families)."""
        gpu = _gpu(self._device)
        if gpu is not None:
            self._metrics.set_device_memory_used(gpu.memory_used_bytes)
        return self._deployment, self._replica, snapshot(self._registry)

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica when this raises."""
        if self._engine is not None:
            self._engine.check()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()


def _log_failure(job_id: str, error: BaseException) -> None:
    log_failure("engine_failed", error, job_id=job_id)


def generator_options(settings: Settings) -> dict[str, Any]:
    """Serve's options; the config file's `deployments` go over them. The engine queues, so Serve need not."""
    return {
        "name": "Generator",
        "max_ongoing_requests": settings.max_dispatched_jobs + 16,
        "ray_actor_options": {"num_cpus": 0, "num_gpus": _num_gpus(settings)},
        "health_check_period_s": 5,
        "graceful_shutdown_timeout_s": settings.queue.drain_timeout_s,
    }


def _num_gpus(settings: Settings) -> float:
    """What to ask Ray for: without asking, a replica sees no GPU. A text encoder on it gets a tenth."""
    resources: dict[str, float] = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]  # Ray's
    there = resources.get("GPU", 0) >= 1
    wanted = settings.model.device.startswith("cuda") or (settings.model.device == "auto" and there)
    if not wanted:
        return 0
    return 1 - TEXT_ENCODER_GPUS if settings.model.text_device.startswith("cuda") else 1


def _gpu(device: "torch.device") -> GpuHealth | None:
    import torch

    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return GpuHealth(name=torch.cuda.get_device_name(device), memory_total_bytes=total, memory_used_bytes=total - free)
