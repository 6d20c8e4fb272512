"""The whole Ray Serve graph in one container, before and after a memory snapshot. Knows no Modal.

Before the snapshot Ray and Serve start, the model is loaded and warmed up. After it, every replica gets this
container's own secrets and begins to work; a graph that does not answer then is built anew.
"""

import asyncio
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil

from schemas.errors import ModelNotReady, ShuttingDown
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
from serve_graph.settings import SECRET_NAMES
from serve_graph.stores import prepared

T = TypeVar("T")

AWAKEN_TIMEOUT_S = 20.0
"""A thawed Serve answered within a second; moving a 14B model to the GPU takes several."""

WARM_UP_PROMPT = "a paper boat on a pond"


class LoopThread:
    """An event loop in a thread of its own. Serve's handles belong to the loop that they are first used on."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="wan-handles", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T], limit_s: float | None = None) -> T:
        """Wait for it, here. Raises TimeoutError."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, limit_s), self._loop).result()

    async def awaited(self, work: Coroutine[Any, Any, T], limit_s: float | None = None) -> T:
        """Wait for it, on another loop. Raises TimeoutError."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, limit_s), self._loop))


class Container:
    """`start`, then `awaken` (once, perhaps in another container than `start`), then `work_on`, then `stop`."""

    def __init__(self, options: ModalOptions) -> None:
        self._options = options
        self._config: ServeConfig | None = None
        self._environment, self._stack = ExitStack(), ExitStack()
        self._started_in = os.environ.get("MODAL_TASK_ID")
        self._handles_loop = LoopThread()
        self._start: str | None = None
        self._awake_s: float | None = None

    @property
    def port(self) -> int:
        """Of the graph's own ingress, on loopback."""
        return self._loaded.port

    def start(self) -> None:
        """Bring the graph up, model and all, and warm it up. Raises ConfigError, StartFailed, WanError."""
        began = time.monotonic()
        args = service_args(self._options)
        args.setdefault("queue", {})["by_call"] = True
        if self._options.snapshot == "cpu":
            args["model"]["load_on_cpu"] = True
        weights = fetched_weights(self._options)
        if weights is not None:
            check_whole(weights)
        if self._config is None:  # else Ray, which has read its token, is built anew in this process
            self._config = load_config(CONFIG, port=free_port(), args=args)
            self._environment.enter_context(ray_environment(self._config.settings))
        config = self._config
        configure_logging(level=config.settings.log_level)
        schema = check_schema(config.serve)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._stack.enter_context(ray_runtime(num_gpus=1))  # in a CPU snapshot there is none yet
        deploy(schema, config.app_name, threading.Event())
        for number, handler in handlers.items():  # Ray puts its own over Modal's, which end a container cleanly
            signal.signal(number, handler)
        if self._options.snapshot != "cpu":
            self._handles_loop.run(self._warm_up())
        log_event("graph_started", seconds=round(time.monotonic() - began, 3))

    def awaken(self) -> None:
        """Have the replicas work with this container's secrets; build the graph anew where it does not answer."""
        began = time.monotonic()
        renew_process({})
        restored = os.environ.get("MODAL_TASK_ID") != self._started_in
        start = "restored" if restored else "fresh"
        try:
            self._handles_loop.run(self._awaken(start), AWAKEN_TIMEOUT_S)
        except Exception as failure:  # whatever a restore has broken
            if isinstance(failure, ModelNotReady):  # the graph answers, and says what is wrong
                raise
            log_failure("restore_failed", failure)
            start = "rebuilt"
            self._abandon()
            self.start()
            self._handles_loop.run(self._awaken(start), AWAKEN_TIMEOUT_S)
        self._start, self._awake_s = start, round(time.monotonic() - began, 3)
        log_event("graph_awake", start=start, seconds=self._awake_s)
        self._record_start()

    async def work_on(self, work_id: str) -> bool:
        """Work until this job or batch has ended; False where this container or the call ends first."""
        limit_s = self._options.timeout - self._loaded.settings.queue.drain_timeout_s - 30
        try:
            await self._handles_loop.awaited(self._work_on(work_id), limit_s)
        except (TimeoutError, ShuttingDown):
            return False
        return True

    async def started(self) -> dict[str, Any]:
        """How this container came up, in how many seconds after the snapshot, and with which GPU."""
        health = await self._handles_loop.awaited(self._generator_health(), AWAKEN_TIMEOUT_S)
        return {
            "container": os.environ.get("MODAL_TASK_ID"),
            "start": self._start,
            "awake_s": self._awake_s,
            "gpu": None if health.gpu is None else health.gpu.name,
        }

    def stop(self) -> None:
        """Let running jobs end within the drain limit, hand the others back, and take everything down."""
        if self._config is not None:
            stop_app(self._config, self._handles_loop.run)
            self._stack.close()
            self._environment.close()

    @property
    def _loaded(self) -> ServeConfig:
        if self._config is None:
            raise ModelNotReady("the graph has not been started")
        return self._config

    async def _work_on(self, work_id: str) -> None:
        (ingress,) = self._handles("Ingress")
        await ingress.work_on.remote(work_id)

    async def _generator_health(self) -> GeneratorHealth:
        (generator,) = self._handles("Generator")
        health: GeneratorHealth = await generator.health.remote()
        return health

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

    async def _awaken(self, start: str) -> None:
        environment = {name: os.environ[name] for name in SECRET_NAMES if name in os.environ}
        generator, ingress = self._handles("Generator", "Ingress")
        settings = await asyncio.to_thread(prepared, self._loaded.settings)
        await generator.awaken.remote(environment, settings.storage)
        await ingress.awaken.remote(environment, settings.storage, start)

    def _record_start(self) -> None:
        """Leave a line about this start in the Volume, for whoever asks how long starts take."""
        folder = Path(self._options.outputs_dir) / "starts"
        record = {
            "container": os.environ.get("MODAL_TASK_ID"),
            "at": datetime.now(UTC).isoformat(),
            "start": self._start,
            "awake_s": self._awake_s,
            "gpu": self._options.gpu,
            "snapshot": self._options.snapshot,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{record['container']}.json").write_text(json.dumps(record) + "\n")
        except OSError as failure:  # no clip depends on it
            log_failure("start_not_recorded", failure)

    def _handles(self, *deployments: str) -> list[Any]:
        from ray import serve

        return [serve.get_deployment_handle(name, self._loaded.app_name) for name in deployments]

    def _abandon(self) -> None:
        """End what is left of a broken graph, without asking it."""
        import ray

        for process in psutil.Process().children(recursive=True):
            log_event("process_killed", level=logging.WARNING, name=process.name())
            process.kill()
        ray.shutdown()
        self._stack, self._handles_loop = ExitStack(), LoopThread()
