"""What a test uses: a Modal on loopback for the length of a `with` block."""

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self
from unittest import mock

import modal
from grpclib.server import Server
from modal_proto import api_pb2
from starlette.applications import Starlette

from modal_loopback.calls import Call, Calls
from modal_loopback.container import Container
from modal_loopback.control_plane import ControlPlane
from modal_loopback.records import App, Function, FunctionLayout, Volume
from modal_loopback.rpc import Changes, RpcService, T
from modal_loopback.storage import Storage
from modal_loopback.web import Ingress, Sites
from modal_loopback.worker import Worker

START_TIMEOUT_S = 60.0
CLI_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Finished:
    """A run of the CLI; `output` is what it printed and logged."""

    exit_code: int
    output: str


class Loopback:
    """A Modal with one environment. It starts containers on demand, and ends everything when it is left.

    secrets: their variables by name. container_env: what all containers have in their environment, such as the paths
    that stand for mounted Volumes. redirect_after_s: how long a web request waits for an answer before it is sent to
    another address. Raises AssertionError on exit when an RPC failed in an unforeseen way.
    """

    def __init__(
        self,
        secrets: Mapping[str, Mapping[str, str]] | None = None,
        container_env: Mapping[str, str] | None = None,
        redirect_after_s: float = 150.0,
    ) -> None:
        self.crashes: list[str] = []
        """The tracebacks of RPCs that failed in an unforeseen way."""
        self.container_env = dict(container_env or {})
        self._secrets = secrets or {}
        self._redirect_after_s = redirect_after_s
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="modal-"))
        self._exits.callback(shutil.rmtree, self._folder)
        self._stop = asyncio.Event()
        up: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=[up], name="loopback Modal")
        self._thread.start()
        up.result(START_TIMEOUT_S)
        self._exits.callback(self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._exits.close()
        if error is None and self.crashes:
            raise AssertionError("\n".join(self.crashes))

    def _end(self) -> None:
        self._changes.do(self._stop.set)
        self._thread.join()

    def _run(self, up: "Future[None]") -> None:
        try:
            asyncio.run(self._serve(up))
        except BaseException as error:
            if up.done():
                raise
            up.set_exception(error)

    async def _serve(self, up: "Future[None]") -> None:
        changes = self._changes = Changes(asyncio.get_running_loop())
        ids = itertools.count(1)
        storage = self._storage = Storage(self._folder / "volumes", self._secrets, ids)
        plane = self._plane = ControlPlane(storage, changes, ids)
        calls = self._calls = Calls(plane.functions, changes, ids)
        worker = self._worker = Worker(plane, calls, changes, self._folder, ids, self.container_env, self.crashes)
        worker.service = RpcService(plane, calls, storage, worker, crashes=self.crashes)
        sites, ingress = Sites(), Ingress(calls, changes, storage.blob, self._redirect_after_s)
        storage.base_url = sites.open(Starlette(routes=storage.routes()))
        plane.url_of = lambda function, method: sites.open(ingress.app(function, method))
        plane.on_publish, plane.on_stop, calls.on_queued = worker.retire, worker.end, worker.scale
        server = Server([worker.service])
        listener = socket.create_server(("127.0.0.1", 0))
        await server.start(sock=listener)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        up.set_result(None)
        await self._stop.wait()
        await worker.close()
        await sites.close()
        server.close()
        await server.wait_closed()

    # The CLI

    def cli(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = CLI_TIMEOUT_S,
    ) -> Finished:
        """Run `modal` with these arguments, and wait for its end. env: besides this process's own."""
        done = subprocess.run(
            _command(arguments),
            env=self.environment(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return Finished(done.returncode, done.stdout)

    @contextlib.contextmanager
    def serve(self, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Iterator[App]:
        """`modal serve` for the length of a `with` block. Yields the app, once it is up."""
        known = set(self._plane.apps)
        output = self._folder / "serve.log"
        with output.open("w") as log:
            process = subprocess.Popen(
                _command(("serve", *arguments)),
                env=self.environment(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        look = threading.Thread(target=lambda: (process.wait(), self._changes.do(lambda: None)))
        look.start()
        try:

            def up() -> App | bool:
                new = [app for app_id, app in self._plane.apps.items() if app_id not in known and app.publications]
                return new[0] if new else process.poll() is not None

            app = self._changes.wait(up, START_TIMEOUT_S, "an app by `modal serve`")
            if not isinstance(app, App):
                raise RuntimeError(f"`modal serve` ended with {process.returncode}: {output.read_text()}")
            yield app
        finally:
            process.send_signal(signal.SIGINT)
            look.join()

    def environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.upper().startswith("MODAL_")}
        inherited = {k: v for k, v in inherited.items() if not k.upper().endswith("_PROXY")}
        own = {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": "ak-loopback",
            "MODAL_TOKEN_SECRET": "as-loopback",
            "MODAL_CONFIG_PATH": str(self._folder / "no-config.toml"),
            "MODAL_DISABLE_API_PROXY": "1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }
        return {**inherited, **own, **(env or {})}

    # What is there

    def app(self, name: str) -> App:
        """The app of that name that runs. Raises KeyError."""
        found = self._plane.app(name)
        if found is None:
            raise KeyError(name)
        return found

    def layout(self, app_name: str) -> dict[str, FunctionLayout]:
        """What is published of an app, by the names of its functions and classes."""
        return self.app(app_name).layout

    def function(self, app_name: str, name: str) -> Function:
        """A function or class of an app that runs."""
        return self.app(app_name).functions[name]

    def web_url(self, app_name: str, name: str, method: str = "") -> str:
        """The address of a web function, or of a class's method."""
        return self.function(app_name, name).web_urls[method]

    def volume(self, name: str) -> Volume:
        """A Volume, made if there is none yet; its files lie in `folder`."""
        return self._changes.do(lambda: self._storage.volume(name))

    def set_secret(self, name: str, env: Mapping[str, str]) -> None:
        """Change a Secret, for the containers that start from now on."""
        secret = next(secret for secret in self._storage.secrets.values() if secret.name == name)
        self._changes.do(lambda: setattr(secret, "env", dict(env)))

    @property
    def client(self) -> modal.Client:
        """A client of this Modal in the test's process, as for `modal.Function.from_name(..., client=...)`."""
        if "_client" not in vars(self):
            self._exits.enter_context(mock.patch.dict(os.environ, MODAL_DISABLE_API_PROXY="1"))
            client = modal.Client(self.url, api_pb2.CLIENT_TYPE_CLIENT, ("ak-loopback", "as-loopback"))
            self._client = self._exits.enter_context(client)
        return self._client

    @property
    def calls(self) -> list[Call]:
        """All calls that were made, with their inputs and outputs."""
        return list(self._calls.calls.values())

    # Containers

    def start(
        self, app_name: str, name: str, env: Mapping[str, str] | None = None, asleep: timedelta | None = None
    ) -> Container:
        """Start a container, besides those that inputs start.

        asleep: freeze it after its snapshot; until it is thawed its clock is this much behind, so that on waking it
        finds that so much time has passed, and agrees with everyone else.
        """
        function = self.function(app_name, name)
        return self._changes.do(lambda: self._worker.start(function, env, asleep))

    def containers(self, app_name: str, name: str) -> list[Container]:
        """Those that live, in the order of their start."""
        return list(self.function(app_name, name).containers)

    def scale_to_zero(self, app_name: str, timeout_s: float = 60.0) -> None:
        """End all containers of an app, once each has finished its inputs."""
        live = [container for function in self.app(app_name).functions.values() for container in function.containers]
        self._changes.do(lambda: [container.retire() for container in live])
        self.wait_until(lambda: all(c.state == "gone" for c in live), timeout_s, f"no containers of {app_name}")

    def abandon(self, app_name: str) -> None:
        """End all calls of an app, and kill its containers: as if there had been none."""
        functions = self.app(app_name).functions.values()
        live = [container for function in functions for container in function.containers]
        self._changes.do(lambda: [self._calls.abandon(function) for function in functions])
        for container in live:
            container.kill()

    def wait_until(self, find: Callable[[], T], timeout_s: float = 60.0, what: str = "a condition") -> T:
        """What `find` returns once that is true; it is looked at when anything changes here. Raises TimeoutError."""
        return self._changes.wait(find, timeout_s, what)


def _command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "modal", *arguments]
