"""The whole Ray Serve graph on one machine, before and after a memory snapshot. Knows no Modal.

Before the snapshot Ray and Serve start, the model is loaded and warmed up. After it, every replica gets the secrets of
the container that it woke up in and begins to work.
"""

import asyncio
import threading
import time
from contextlib import ExitStack
from typing import Any

from schemas.errors import ModelNotReady
from schemas.health import GeneratorHealth
from schemas.requests import GenerateRequest
from serve_graph.logs import configure_logging, log_event, log_failure
from serve_graph.on_modal.options import CONFIG, ModalOptions, fetched_weights, service_args
from serve_graph.on_modal.weights import check_whole
from serve_graph.open_ports import free_port
from serve_graph.renewal import renew_process
from serve_graph.server import (
    ServeConfig,
    check_schema,
    deploy,
    load_config,
    ray_environment,
    ray_runtime,
    stop_app,
)
from serve_graph.settings import SECRET_NAMES, StorageSettings, read_settings
from serve_graph.stores import prepared

_MARGIN_S = 30

KEEP_AWAKE_S = 1.0
"""How often the graph looks for a replica that sleeps."""

WARM_UP_PROMPT = "a paper boat on a pond"


class Graph:
    """`start`, then `awaken` (once, perhaps in another container than `start`), then `work_on`, then `stop`.

    All of it on one event loop, which Serve's handles belong to, and in the main thread: Ray sets handlers of signals.
    """

    def __init__(self, options: ModalOptions) -> None:
        self._options = options
        self._config: ServeConfig | None = None
        self._args: dict[str, Any] = {}
        self._secrets: dict[str, str] = {}
        self._storage = StorageSettings()
        self._start = ""
        self._watching: asyncio.Task[None] | None = None
        self._stack = ExitStack()

    async def start(self) -> int:
        """Bring the graph up, model and all, and warm it up. Returns its ingress's port, on loopback.

        Raises ConfigError, StartFailed, WanError.
        """
        began = time.monotonic()
        args = service_args(self._options)
        args.setdefault("queue", {})["by_call"] = True
        weights = fetched_weights(self._options)
        if weights is not None:
            check_whole(weights)
        self._args = args
        config = self._config = load_config(CONFIG, port=free_port(), args=args)
        self._stack.enter_context(ray_environment(config.settings))
        configure_logging(level=config.settings.log_level)
        schema = check_schema(config.serve)
        # Told, not found: a sandbox may show the host's cores, and in a CPU snapshot there is no GPU yet.
        self._stack.enter_context(ray_runtime(num_cpus=4, num_gpus=1, object_store_memory=2**30))
        deploy(schema, config.app_name, threading.Event())
        if self._options.snapshot != "cpu":
            await self._warm_up()
        log_event("graph_started", seconds=round(time.monotonic() - began, 3))
        return config.port

    async def probe(self) -> None:
        """Whether Ray's control store and the model answer."""
        import ray

        await asyncio.to_thread(ray.nodes)
        (generator,) = self._handles("Generator")
        await generator.is_awake.remote()

    async def awaken(self, environment: dict[str, str], start: str) -> None:
        """Have this process and the replicas go on with these variables. start: how the graph came up, for metrics.

        Raises ModelNotReady, ConfigError, StoreUnavailable.
        """
        renew_process(environment)
        self._secrets = {name: value for name, value in environment.items() if name in SECRET_NAMES}
        self._storage = (await asyncio.to_thread(prepared, read_settings(self._args))).storage
        self._start = start
        await self._awaken_who_sleeps()
        self._watching = asyncio.create_task(self._keep_awake())

    async def work_on(self, work_id: str) -> None:
        """See `JobService.work_on`. Raises TimeoutError shortly before Modal would end the call."""
        from ray.exceptions import RayActorError

        (ingress,) = self._handles("Ingress")
        async with asyncio.timeout(self._options.timeout - self._loaded.settings.queue.drain_timeout_s - _MARGIN_S):
            while True:
                try:
                    await ingress.work_on.remote(work_id)
                    break
                except (ModelNotReady, RayActorError):  # Serve replaces it, and `_keep_awake` wakes the new one
                    await asyncio.sleep(KEEP_AWAKE_S)

    async def gpu(self) -> str | None:
        """The name of the generator's GPU."""
        (generator,) = self._handles("Generator")
        health: GeneratorHealth = await generator.health.remote()
        return None if health.gpu is None else health.gpu.name

    async def stop(self) -> None:
        """Let running jobs end within the drain limit, hand the others back, and take everything down."""
        if self._watching is not None:
            self._watching.cancel()
        if self._config is not None:
            await stop_app(self._config)
        self._stack.close()

    async def _keep_awake(self) -> None:
        """Serve knows nothing of sleep: a replica in the place of a lost one has to be woken, too."""
        while True:
            await asyncio.sleep(KEEP_AWAKE_S)
            try:
                await self._awaken_who_sleeps()
            except Exception as failure:  # the next look may find it there
                log_failure("not_awakened", failure)

    async def _awaken_who_sleeps(self) -> None:
        generator, ingress = self._handles("Generator", "Ingress")
        if not await generator.is_awake.remote():
            await generator.awaken.remote(self._secrets, self._storage)
        if not await ingress.is_awake.remote():
            await ingress.awaken.remote(self._secrets, self._storage, self._start)

    @property
    def _loaded(self) -> ServeConfig:
        if self._config is None:
            raise ModelNotReady("the graph has not been started")
        return self._config

    async def _warm_up(self) -> None:
        """Render each size that the profile names, with one step, without the store."""
        preprocessor, generator = self._handles("Preprocessor", "Generator")
        profile = self._loaded.settings.profile
        clips = []
        for resolution in profile.resolutions:
            request = GenerateRequest(
                prompt=WARM_UP_PROMPT, width=resolution.width, height=resolution.height, num_inference_steps=1
            )
            parameters = profile.resolve(request)
            clips.append((parameters, await preprocessor.prepare.remote(parameters)))
        await generator.warm_up.remote(clips)

    def _handles(self, *deployments: str) -> list[Any]:
        from ray import serve

        return [serve.get_deployment_handle(name, self._loaded.app_name) for name in deployments]
