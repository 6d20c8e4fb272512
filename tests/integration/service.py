"""A real service as a child process: `wan-serve serve`, real Ray, a data folder and a port of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from random_wan import model_settings

from serve_graph.open_ports import free_port

HASTY = {"name": "Generator", "health_check_period_s": 1, "health_check_timeout_s": 2}
"""A deployment's options: three checks that fail in turn tell that it hangs."""

START_TIMEOUT_S = 170
STOP_TIMEOUT_S = 90


def write_config(folder: Path, deployments: list[dict[str, Any]] | None = None, **args: Any) -> Path:
    """A Serve config like configs/local.yaml, with its data under `folder` and `args` over it.

    deployments: Serve's options for some of them.
    """
    config = yaml.safe_load(Path("configs/local.yaml").read_text())
    config["applications"][0]["args"] = {
        "data_dir": str(folder / "data"),
        "storage": {"kind": "local", "folder": str(folder / "store")},
        "model": model_settings(),
        **args,
    }
    config["applications"][0]["deployments"] = deployments or []
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_serve(config: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serve_graph.cli", "serve", "--config", str(config), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


class ServiceProcess:
    """A child process that serves, its output, and every process below it. Started on construction."""

    def __init__(self, command: list[str], base: str, env: dict[str, str] | None = None) -> None:
        self.base = base
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
        )
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._news = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.stdout), (self.process.stderr, self.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            with self._news:
                lines.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_for(self, condition: Any, timeout_s: float) -> None:
        """Wait until the output makes `condition` true; fails with the output when it never does."""
        with self._news:
            met = self._news.wait_for(lambda: condition() or self.process.poll() is not None, timeout_s)
            assert met, f"timed out; output:\n{self.output()}"
        assert condition(), f"the service ended with {self.process.returncode}; output:\n{self.output()}"

    def output(self) -> str:
        return "".join([*self.stdout, *self.stderr])

    def log(self, event: str) -> list[dict[str, Any]]:
        """The log lines of one event so far."""
        lines = (json.loads(line) for line in list(self.stderr) if line.startswith("{"))
        return [line for line in lines if line["event"] == event]

    def wait_log(self, event: str, **fields: Any) -> dict[str, Any]:
        """The first log line of `event` with these fields, once it is there."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.log(event) if fields.items() <= line.items()]

        self.wait_for(found, 60)
        return found()[0]

    def client(self, timeout_s: float = 60) -> httpx.Client:
        return httpx.Client(base_url=self.base, timeout=timeout_s)

    def family(self) -> list[psutil.Process]:
        """Every process below the service's own, Ray's among them."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def replica(self, deployment: str) -> psutil.Process:
        """The process of a deployment's replica, found as Ray titles it."""
        titled = [p for p in self.family() if f"ServeReplica:wan:{deployment}" in " ".join(p.cmdline())]
        assert len(titled) == 1, [p.cmdline() for p in self.family()]
        return titled[0]

    def kill(self) -> None:
        """End every process of it at once, as a power cut does."""
        everyone = [*self.family(), psutil.Process(self.process.pid)]
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everyone, STOP_TIMEOUT_S)
        self.stop()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait, return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(STOP_TIMEOUT_S)
        for reader in self._readers:
            reader.join(10)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return code


class RunningService(ServiceProcess):
    """`wan-serve serve`; `wait_ready` returns once it says so. Use `stop` to end it."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None, port: int | None = None, **args: Any) -> None:
        self.folder = folder
        self.port = port or free_port()
        command = [sys.executable, "-m", "serve_graph.cli", "serve"]
        command += ["--config", str(write_config(folder, **args)), "--port", str(self.port)]
        super().__init__(command, f"http://127.0.0.1:{self.port}", env)

    def wait_ready(self) -> "RunningService":
        try:
            self.wait_for(lambda: any(line.startswith("ready ") for line in self.stdout), START_TIMEOUT_S)
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        return self
