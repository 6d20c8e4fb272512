"""One container: Modal's real entry point as a process of this machine, with RPCs and a life cycle of its own.

    starting --(ContainerCheckpoint)--> frozen --(thaw)--> starting --(first FunctionGetInputs)--> ready --> gone

Only a container that is started so stays frozen; any other of a function with snapshots goes on at once.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import psutil
from grpclib.server import Server
from modal_proto import api_pb2
from s3_servers.process import dies_with_parent

from modal_loopback.calls import Calls, Input
from modal_loopback.clock import Clock
from modal_loopback.records import Function
from modal_loopback.rpc import Changes, RpcService

HEARTBEAT_S = 14.0
"""How long a heartbeat waits for news. The client gives up after 15.1 s, and beats again after the answer."""

MARK = "MODAL_LOOPBACK_CONTAINER"
"""The environment variable by which a container's processes are told from others."""


class ContainerGone(Exception):
    """A container ended before it was ready. The message holds what it wrote."""


class Container:
    """A container, from its start on. The methods that wait or send signals are for the test's thread."""

    def __init__(
        self, task_id: str, function: Function, calls: Calls, changes: Changes, folder: Path, asleep: timedelta | None
    ) -> None:
        self.task_id = task_id
        self.function = function
        self.state = "starting"
        self.started_at = 0.0
        self.exit_code: int | None = None
        self.failure: str | None = None
        """The exception that an `enter`, an `exit` or the import of the app raised."""
        self.running: dict[str, Input] = {}
        self.cancelled: list[str] = []
        self.was_ready = False
        self.retiring = False
        self._held = asleep is not None
        self._calls = calls
        self._changes = changes
        self._folder = folder
        self._log: list[str] = []
        self._preempted = False
        self._mark = f"{MARK}={task_id}@{os.getpid()}"
        self._main_pid = 0
        self._doomed = False
        self._clock: Clock | None = None
        folder.mkdir()
        if asleep:
            self._clock = Clock(folder / "clock")
            self._clock.set(-asleep)

    @property
    def log(self) -> str:
        """What its processes wrote."""
        return "".join(self._log)

    def wait(self, state: str, timeout_s: float = 60.0) -> "Container":
        """Wait until it is frozen, ready or gone. Raises ContainerGone when it ended instead."""
        self._changes.wait(lambda: self.state in (state, "gone"), timeout_s, f"{self.task_id} {state}")
        if self.state != state:
            raise ContainerGone(f"{self.task_id} ended with {self.exit_code}:\n{self.log}")
        return self

    def cpu_seconds(self) -> float:
        """What its processes have used."""
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in self.pids())

    def freeze(self) -> None:
        """Stop all its processes where they are."""
        while moving := [pid for pid in self.pids() if _state(pid) not in "TZX"]:
            for pid in moving:
                _signal(pid, signal.SIGSTOP)

    def thaw(self, env: Mapping[str, str] | None = None) -> None:
        """Let it go on: with its clock right, and with these variables changed in its main process, as Modal does it.

        env: by names in capitals.
        """
        if self._clock:
            self._clock.set(timedelta(0))
        self._restore(env or {})
        for pid in self.pids():
            _signal(pid, signal.SIGCONT)
        self._changes.do(lambda: setattr(self, "state", "starting") if self.state == "frozen" else None)

    def kill(self) -> None:
        """End all its processes at once, as a lost machine does. Returns when it is gone."""
        self.send_kill()
        self.wait("gone")

    def stop(self, timeout_s: float = 60.0) -> None:
        """Let it finish its inputs, take no more, and run its `exit` methods. Returns when it is gone."""
        self._changes.do(self.retire)
        self.wait("gone", timeout_s)

    def preempt(self) -> None:
        """Interrupt it, as Modal does before it takes a machine away; its inputs go to another. Returns at once."""
        self._preempted = True
        _signal(self._main_pid, signal.SIGINT)

    def send_kill(self) -> None:
        """As `kill`, without the wait."""
        self._doomed = True
        self._kill_all()

    def _kill_all(self) -> None:
        while pids := [pid for pid in self.pids() if _state(pid) not in "ZX"]:
            for pid in pids:
                _signal(pid, signal.SIGKILL)

    def retire(self) -> None:
        """Give it no more inputs. On the loop only."""
        self.retiring = True

    # The loop's part

    async def run(self, root: Path, env: Mapping[str, str], layout: api_pb2.AppLayout, shared: RpcService) -> None:
        """Run it to its end. root: where its files lie. shared: the RPCs that are no container's own."""
        server, socket = Server([shared.with_first(self)]), self._folder / "rpc"
        await server.start(path=str(socket))
        arguments = self._folder / "arguments"
        arguments.write_bytes(self._arguments(layout).SerializeToString())
        own_env = {
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(arguments),
            "MODAL_SERVER_URL": f"unix://{socket}",
            "MODAL_RESTORE_STATE_PATH": str(self._restore_file),
            "MODAL_ENABLE_SNAP_RESTORE": "1" if self._has_snapshot else "0",
            "MODAL_TASK_ID": self.task_id,
            "MODAL_IS_REMOTE": "1",
            **(self._clock.env if self._clock else {}),
            **dict([self._mark.split("=")]),
        }
        try:
            await self._process(root, {**env, **own_env})
        finally:
            server.close()
            await server.wait_closed()

    async def _process(self, root: Path, env: Mapping[str, str]) -> None:
        log_out, log_in = os.pipe()
        process = await asyncio.create_subprocess_exec(
            *dies_with_parent(),
            sys.executable,
            "-m",
            "modal._container_entrypoint",
            cwd=root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log_in,
            stderr=log_in,
            start_new_session=True,
        )
        os.close(log_in)
        self._main_pid = process.pid
        log_ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(log_out, self._read_log, log_out, log_ended)
        if self._doomed:  # before it was there
            self._kill_all()
        try:
            self.exit_code = await process.wait()
        finally:
            self._kill_all()  # what it left behind: a container's end is the end of all its processes
            await log_ended.wait()

    def _read_log(self, pipe: int, ended: asyncio.Event) -> None:
        data = os.read(pipe, 65536)
        if data:
            self._log.append(text := data.decode(errors="replace"))
            self.function.app.log.append((self.task_id, text))
        else:
            asyncio.get_running_loop().remove_reader(pipe)
            os.close(pipe)
            ended.set()
        self._changes.notify()

    @property
    def _has_snapshot(self) -> bool:
        """Snapshots are for deployed apps only."""
        return self.function.proto.checkpointing_enabled and self.function.app.state == "deployed"

    @property
    def _restore_file(self) -> Path:
        return self._folder / "restore.json"

    def _arguments(self, layout: api_pb2.AppLayout) -> api_pb2.ContainerArguments:
        definition = api_pb2.Function()
        definition.CopyFrom(self.function.proto)
        definition.is_checkpointing_function = self._has_snapshot
        return api_pb2.ContainerArguments(
            task_id=self.task_id,
            function_id=self.function.function_id,
            app_id=self.function.app.app_id,
            function_def=definition,
            environment_name="main",
            checkpoint_id=f"ch-{self.task_id}" if self._has_snapshot else None,
            app_layout=layout,
        )

    def _restore(self, env: Mapping[str, str]) -> None:
        """What the client waits for after a snapshot: a file with what changed, complete once it is there."""
        draft = self._restore_file.with_suffix(".draft")
        draft.write_text(json.dumps({"task_id": f"{self.task_id}-restored", **env}))
        draft.rename(self._restore_file)

    def pids(self) -> list[int]:
        """Its processes, those that its processes started included."""
        mark = self._mark.encode()
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in found if mark in _environ(pid)]

    # RPCs of this container

    async def ContainerHello(self, request: object) -> None: ...

    async def ContainerHeartbeat(
        self, request: api_pb2.ContainerHeartbeatRequest
    ) -> api_pb2.ContainerHeartbeatResponse:
        await self._changes.until(lambda: self.cancelled, HEARTBEAT_S)
        cancelled, self.cancelled = self.cancelled, []
        event = api_pb2.CancelInputEvent(input_ids=cancelled) if cancelled else None
        return api_pb2.ContainerHeartbeatResponse(cancel_input_event=event)

    async def ContainerCheckpoint(self, request: api_pb2.ContainerCheckpointRequest) -> None:
        if self._held:
            asyncio.get_running_loop().call_soon(self._freeze_now)
        else:
            self._restore({})

    def _freeze_now(self) -> None:
        self.freeze()
        self.state = "frozen"
        self._changes.notify()

    async def FunctionGetInputs(self, request: api_pb2.FunctionGetInputsRequest) -> api_pb2.FunctionGetInputsResponse:
        if not self.was_ready:
            self.was_ready, self.state = True, "ready"
            self._changes.notify()
        item = await self._changes.until(lambda: self.retiring or self._calls.take(self))
        if not isinstance(item, Input):
            return api_pb2.FunctionGetInputsResponse(inputs=[api_pb2.FunctionGetInputsItem(kill_switch=True)])
        given = api_pb2.FunctionGetInputsItem(
            input_id=item.input_id,
            input=item.payload,
            function_call_id=item.call.call_id,
            function_call_invocation_type=item.call.invocation,
            retry_count=item.attempts - 1,
        )
        return api_pb2.FunctionGetInputsResponse(inputs=[given])

    async def FunctionPutOutputs(self, request: api_pb2.FunctionPutOutputsRequest) -> None:
        terminated = api_pb2.GenericResult.GENERIC_STATUS_TERMINATED
        for output in request.outputs:
            if not (self._preempted and output.result.status == terminated):  # nobody has cancelled that input
                self._calls.put(self, output)

    async def FunctionGetDynamicConcurrency(
        self, request: api_pb2.FunctionGetDynamicConcurrencyRequest
    ) -> api_pb2.FunctionGetDynamicConcurrencyResponse:
        """The target, or the maximum once no further container may start."""
        limit = self.function.proto.autoscaler_settings.max_containers
        is_last = limit and len(self.function.containers) >= limit
        concurrency = request.max_concurrency if is_last else request.target_concurrency
        return api_pb2.FunctionGetDynamicConcurrencyResponse(concurrency=concurrency)

    async def TaskResult(self, request: api_pb2.TaskResultRequest) -> None:
        self.failure = request.result.exception
        if not self.was_ready:
            self._calls.fail_queued(self.function, request.result)


def _environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it ended, or is another user's
        return b""


def _state(pid: int) -> str:
    """A letter: T is stopped, Z and X have ended. Source: proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
