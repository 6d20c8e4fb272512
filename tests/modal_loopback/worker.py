"""How many containers run, and what they start with."""

import asyncio
import itertools
import math
import os
import shlex
import time
import traceback
from collections.abc import Coroutine, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from modal_proto import api_pb2

from modal_loopback.calls import Calls
from modal_loopback.container import Container
from modal_loopback.control_plane import ControlPlane
from modal_loopback.records import App, Function
from modal_loopback.rpc import Changes, RpcService

MAX_CONTAINERS = 8
"""Of a function that names no limit."""

MAX_LOST_STARTS = 3
"""After so many containers in a row that ended before they were ready, what is queued fails."""

INHERITED = ("PATH", "LANG", "LC_ALL", "TMPDIR")
"""What a container has of this process's environment."""


class Worker:
    """Starts containers when inputs come; they end when told to. env: of all containers."""

    def __init__(
        self,
        plane: ControlPlane,
        calls: Calls,
        changes: Changes,
        folder: Path,
        ids: "itertools.count[int]",
        env: Mapping[str, str],
        crashes: list[str],
    ) -> None:
        self.containers: list[Container] = []
        """All that ever ran, in the order of their start."""
        self.service: RpcService
        self._plane = plane
        self._calls = calls
        self._changes = changes
        self._folder = folder
        self._ids = ids
        self._env = env
        self._crashes = crashes
        self._tasks: set[asyncio.Task[None]] = set()

    def scale(self, function: Function) -> None:
        """Start what the inputs of a function need, unless its app has ended."""
        if function.app.state == "stopped":
            return
        scaling, proto = function.proto.autoscaler_settings, function.proto
        target = proto.target_concurrent_inputs or proto.max_concurrent_inputs or 1
        inputs = len(function.queue) + sum(len(container.running) for container in function.containers)
        wanted = min(math.ceil(inputs / target), scaling.max_containers or MAX_CONTAINERS)
        for _ in range(wanted - sum(not container.retiring for container in function.containers)):
            self.start(function)

    def start(
        self, function: Function, env: Mapping[str, str] | None = None, asleep: timedelta | None = None
    ) -> Container:
        """Start one container. asleep: freeze it after its snapshot, having set its clock back by this until thawed."""
        if asleep is not None and not (function.proto.checkpointing_enabled and function.app.state == "deployed"):
            raise ValueError(f"{function.name} of {function.app.name} has no snapshot to freeze it after")
        task_id = f"ta-{next(self._ids)}"
        container = Container(task_id, function, self._calls, self._changes, self._folder / task_id, asleep)
        container.started_at = time.time()
        function.containers.append(container)
        self.containers.append(container)
        self._go(self._run(container, env or {}))
        return container

    def _go(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if error := task.exception():
            self._crashes.append("".join(traceback.format_exception(error)))

    async def _run(self, container: Container, env: Mapping[str, str]) -> None:
        function = container.function
        root = self._unpack(function)
        full_env = {**self._base_env(function, root), **self._env, **env}
        try:
            await container.run(root, full_env, self._plane.layout_message(function.app), self.service)
        finally:
            container.state = "gone"
            function.containers.remove(container)
            self._calls.lose(container)
            self._changes.notify()
        if container.was_ready or container.retiring:
            function.lost_starts = 0
        else:
            function.lost_starts += 1
        if function.lost_starts >= MAX_LOST_STARTS:
            reason = f"{function.lost_starts} containers ended before they were ready"
            failure = api_pb2.GenericResult.GENERIC_STATUS_INTERNAL_FAILURE
            self._calls.fail_queued(function, api_pb2.GenericResult(status=failure, exception=reason))
        self.scale(function)

    def _unpack(self, function: Function) -> Path:
        """Write a function's files, once for each publication. Returns the folder that stands for /root."""
        root = self._folder / f"{function.function_id}-{function.app.publications}"
        if not root.exists():
            for path, data in function.layout.files.items() if function.layout else ():
                file = root / path.lstrip("/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        home = root / "root"
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _base_env(self, function: Function, root: Path) -> dict[str, str]:
        env = {name: os.environ[name] for name in INHERITED if name in os.environ}
        commands = function.layout.image.all_commands if function.layout else []
        for command in commands:
            if command.startswith("ENV "):
                pairs = [pair.partition("=") for pair in shlex.split(command.removeprefix("ENV "))]
                env |= {name: value for name, _, value in pairs if "$" not in value}
        for secret_id in function.proto.secret_ids:
            env |= self._plane.storage.secrets[secret_id].env
        return {
            **env,
            "HOME": str(root),
            "PYTHONPATH": str(root),
            "MODAL_ENVIRONMENT": "main",
            "MODAL_IMAGE_ID": function.proto.image_id,
            "MODAL_CLOUD_PROVIDER": "loopback",
            "MODAL_REGION": "loopback",
        }

    # Ends

    def retire(self, replaced: list[Function]) -> None:
        """Containers of a definition that was replaced finish their inputs and end."""
        for container in [container for function in replaced for container in function.containers]:
            container.retire()

    def end(self, app: App) -> None:
        """End all containers of an app that has ended, and then its log."""
        ended = [container for container in self.containers if container.function.app is app]
        for container in ended:
            if container.state != "gone":
                container.send_kill()
        self._go(self._end_log(app, ended))

    async def _end_log(self, app: App, ended: list[Container]) -> None:
        await self._changes.until(lambda: all(container.state == "gone" for container in ended))
        app.log_ended = True
        self._changes.notify()

    async def close(self) -> None:
        """End all containers at once."""
        for app in self._plane.apps.values():
            app.state = "stopped"
        for container in self.containers:
            if container.state != "gone":
                container.send_kill()
        await self._changes.until(lambda: all(container.state == "gone" for container in self.containers))

    # RPCs

    async def TaskList(self, request: api_pb2.TaskListRequest) -> api_pb2.TaskListResponse:
        live = [c for c in self.containers if c.state != "gone" and c.function.app.app_id == request.app_id]
        tasks = [api_pb2.TaskStats(task_id=c.task_id, app_id=request.app_id, enqueued_at=c.started_at) for c in live]
        return api_pb2.TaskListResponse(tasks=tasks)

    async def ContainerStop(self, request: api_pb2.ContainerStopRequest) -> api_pb2.ContainerStopResponse:
        for container in self.containers:
            if container.task_id == request.task_id and container.state != "gone":
                container.retire()
        self._changes.notify()
        return api_pb2.ContainerStopResponse()
