"""`make demo`: the service as a child process, clips through its public HTTP API, and a clean stop."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import av
from pydantic import ValidationError
from rich.console import Console

from schemas.clips import Clip
from schemas.official_profiles import WAN_TINY
from schemas.requests import GenerateRequest
from serve_graph.client import ClientError, WanClient
from serve_graph.contact_sheet import write_contact_sheet
from serve_graph.job_progress import job_progress
from serve_graph.open_ports import free_port
from serve_graph.server import load_config

PROMPTS = (
    "a red circle moving right on a blue background",
    "a yellow square drifts up over a black backdrop",
    "a white triangle sliding to the right, the background is purple",
    "on black, a small green ball floats to the left",
    "a purple square falling on a yellow background",
    "a red triangle standing still on a white background",
    "a big white circle rises over blue",
    "a yellow triangle gliding to the left on red",
)
"""In the tiny Wan's world; no combination of shape, colours and motion was in its training."""

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 90.0
_POLL_S = 0.1


class DemoFailed(Exception):
    """The demo did not get its clips; the message says why."""


@dataclass(frozen=True)
class DemoReport:
    """What the demo made."""

    clips: list[Clip]
    mp4s: list[Path]
    contact_sheet: Path
    start_s: float

    def show(self) -> None:
        """Tell it to a person."""
        console = Console(markup=False, highlight=False, soft_wrap=True)
        for clip, mp4 in zip(self.clips, self.mp4s, strict=True):
            size = f"{clip.width}x{clip.height}, {clip.num_frames} frames, seed {clip.seed}"
            console.print(f"{mp4}  {clip.timings.total:.2f} s, {size}: {clip.prompt}")
        stages = ", ".join(f"{name} {value:.2f}" for name, value in self.clips[-1].timings)
        console.print(f"contact sheet  {self.contact_sheet}")
        console.print(f"seconds        start {self.start_s:.1f}; the last clip: {stages}")
        console.print(f'next           make serve, then: {_command()} generate "{self.clips[0].prompt}" -o clip.mp4')


def run_demo(config: Path, prompts: Sequence[str], out: Path) -> DemoReport:
    """Start the service with `config` on a free port, make a clip of each prompt, save them under `out`, stop it.

    No prompts: `PROMPTS` for the tiny Wan, and the first of them for a large one. Raises ConfigError, DemoFailed.
    """
    try:
        requests = [GenerateRequest(prompt=prompt, seed=0) for prompt in prompts or PROMPTS]
    except ValidationError as error:
        raise DemoFailed("the prompt must be 1 to 2,000 characters") from error
    console = Console(stderr=True, markup=False, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    load_config(config, port=port)  # a mistake in the file is told before anything starts
    mp4s, sheet, clips = [], out / "demo.png", []
    began = time.monotonic()
    with _service(config, port, out / "demo.log", console) as base, WanClient(base) as client:
        start_s = time.monotonic() - began
        try:
            if not prompts and client.models()[0].name != WAN_TINY.name:
                requests = requests[:1]
            for number, request in enumerate(requests, 1):
                with job_progress(console) as show:
                    clips.append(client.generate(request, show))
                mp4s.append(client.download(clips[-1], out / f"demo-{number}.mp4"))
        except ClientError as error:
            raise DemoFailed(f"{error}; see {out / 'demo.log'}") from error
    try:
        write_contact_sheet([(clip.prompt, mp4) for clip, mp4 in zip(clips, mp4s, strict=True)], sheet)
    except av.FFmpegError as error:
        raise DemoFailed(f"a clip in {out} can't be decoded") from error
    return DemoReport(clips, mp4s, sheet, start_s)


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
