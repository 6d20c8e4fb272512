"""`make demo`: the service as a child process, one clip through its public HTTP API, and a clean stop."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import av
from pydantic import ValidationError
from rich.console import Console

from schemas.clips import Clip
from schemas.requests import GenerateRequest
from serve_graph.client import ClientError, WanClient
from serve_graph.contact_sheet import write_contact_sheet
from serve_graph.job_progress import job_progress
from serve_graph.open_ports import free_port
from serve_graph.server import load_config

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 90.0
_POLL_S = 0.1


class DemoFailed(Exception):
    """The demo did not get its clip; the message says why."""


@dataclass(frozen=True)
class DemoReport:
    """What the demo made."""

    clip: Clip
    mp4: Path
    contact_sheet: Path
    start_s: float

    def show(self) -> None:
        """Tell it to a person."""
        clip, console = self.clip, Console(markup=False, highlight=False)
        stages = ", ".join(f"{name} {value:.2f}" for name, value in clip.timings)
        size = f"({clip.width}x{clip.height}, {clip.num_frames} frames, seed {clip.seed})"
        console.print(f"clip           {self.mp4}  {size}")
        console.print(f"contact sheet  {self.contact_sheet}")
        console.print(f"seconds        start {self.start_s:.1f}; {stages}")
        console.print(
            f'next           make serve, then: wan-serve generate "{clip.prompt}" -o clip.mp4', soft_wrap=True
        )


def run_demo(config: Path, prompt: str, out: Path) -> DemoReport:
    """Start the service with `config` on a free port, make one clip, save it under `out`, stop the service.

    Raises ConfigError, DemoFailed.
    """
    try:
        request = GenerateRequest(prompt=prompt)
    except ValidationError as error:
        raise DemoFailed("the prompt must be 1 to 2,000 characters") from error
    console = Console(stderr=True, markup=False, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    load_config(config, port=port)  # a mistake in the file is told before anything starts
    mp4, sheet = out / "demo.mp4", out / "demo.png"
    began = time.monotonic()
    with _service(config, port, out / "demo.log", console) as base, WanClient(base) as client:
        start_s = time.monotonic() - began
        try:
            with job_progress(console) as show:
                clip = client.generate(request, show)
            client.download(clip, mp4)
        except ClientError as error:
            raise DemoFailed(f"{error}; see {out / 'demo.log'}") from error
    try:
        write_contact_sheet(mp4, sheet)
    except av.FFmpegError as error:
        raise DemoFailed(f"{mp4} can't be decoded") from error
    return DemoReport(clip, mp4, sheet, start_s)


def _command() -> str:
    """How this user calls `wan-serve` from here."""
    if shutil.which("wan-serve") is not None:
        return "wan-serve"
    return os.path.relpath(Path(sys.executable).parent / "wan-serve")


@contextmanager
def _service(config: Path, port: int, log: Path, console: Console) -> Iterator[str]:
    """The service as a child process, ready; stopped at the end, whatever happens."""
    command = [sys.executable, "-m", "serve_graph.cli", "serve", "--config", str(config), "--port", str(port)]
    with log.open("wb") as output:
        environment = {name: value for name, value in os.environ.items() if name != "WAN_API_KEYS"}  # on loopback
        child = subprocess.Popen(  # noqa: S603  # our own CLI
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            base = f"http://127.0.0.1:{port}"
            with console.status("starting the service (Ray, the graph, the model) …"):
                _wait_until_ready(child, base, log)
            yield base
        finally:
            with console.status("stopping the service …"):
                child.send_signal(signal.SIGTERM)
                try:
                    child.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()


def _wait_until_ready(child: subprocess.Popen[bytes], base: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with WanClient(base, timeout_s=5) as client:
        while time.monotonic() < deadline:
            if child.poll() is not None:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise DemoFailed(f"the service ended: {''.join(last)} (all of it in {log})")
            with suppress(ClientError):  # not listening yet, or the application is not up
                if client.health().status == "ok":
                    return
            time.sleep(_POLL_S)  # a start is seen by asking
    raise DemoFailed(f"the service was not ready after {START_TIMEOUT_S:g} s; see {log}")
