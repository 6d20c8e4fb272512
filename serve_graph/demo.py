"""`make demo`: the service as a child process, one clip through its public HTTP API, and a clean stop."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import httpx
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from schemas.clips import Clip
from schemas.errors import Problem
from schemas.jobs import Job
from serve_graph.contact_sheet import write_contact_sheet
from serve_graph.server import load_config

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 90.0
_POLL_S = 0.1
_STEP_BAR = (
    TextColumn("{task.description:<9}"),
    BarColumn(),
    TextColumn("{task.completed:.0f}/{task.total:.0f}"),
)
_LEFT = TextColumn("{task.fields[left]}")


class DemoFailed(Exception):
    """The demo did not get its clip; the message says why."""


def run_demo(config: Path, prompt: str, out: Path) -> None:
    """Start the service with `config` on a free port, make one clip, save it under `out`, stop the service.

    Raises ConfigError, DemoFailed.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    load_config(config, port=port)  # a mistake in the file is told before anything starts
    began = time.monotonic()
    with (
        _service(config, port, out / "demo.log", console) as base,
        httpx.Client(base_url=base, timeout=30) as http,
    ):
        started_s = time.monotonic() - began
        try:
            clip = _generate(http, prompt, console)
            data = http.get(clip.output_url).raise_for_status().content
        except (httpx.HTTPError, ValidationError) as error:
            raise DemoFailed(
                f"the service did not answer as it should ({type(error).__name__}); see {out / 'demo.log'}"
            ) from error
    mp4, sheet = out / "demo.mp4", out / "demo.png"
    mp4.write_bytes(data)
    try:
        write_contact_sheet(mp4, sheet)
    except av.FFmpegError as error:
        raise DemoFailed(f"{mp4} can't be decoded") from error
    _report(console, clip, mp4, sheet, started_s)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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
    while time.monotonic() < deadline:
        if child.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise DemoFailed(f"the service ended: {''.join(last)} (all of it in {log})")
        try:
            if httpx.get(base + "/health/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(_POLL_S)
    raise DemoFailed(f"the service was not ready after {START_TIMEOUT_S:g} s; see {log}")


def _generate(http: httpx.Client, prompt: str, console: Console) -> Clip:
    """Submit one prompt and follow its job to the end."""
    answer = http.post("/generate", json={"prompt": prompt}, headers={"Prefer": "respond-async"})
    if answer.status_code != 202:
        raise DemoFailed(Problem.model_validate_json(answer.content).detail)
    job = Job.model_validate_json(answer.content)
    console.print(f'[bold]"{prompt}"[/bold] → {job.job_id}')
    with Progress(*_STEP_BAR, _LEFT, TimeElapsedColumn(), console=console) as bars:
        bar = bars.add_task("queued", total=1, left="")
        while not job.state.is_terminal:
            time.sleep(_POLL_S)
            job = Job.model_validate_json(http.get(f"/jobs/{job.job_id}").raise_for_status().content)
            if job.progress is not None:
                left = job.progress.seconds_left
                bars.update(
                    bar,
                    description=job.progress.stage,
                    completed=job.progress.step,
                    total=job.progress.steps,
                    left="" if left is None else f"{left:.1f} s left",
                )
        bars.update(bar, description=job.state.value, completed=bars.tasks[0].total, left="")
    if job.clip is None:
        raise DemoFailed(job.error.detail if job.error is not None else "the job ended without a clip")
    return job.clip


def _report(console: Console, clip: Clip, mp4: Path, sheet: Path, started_s: float) -> None:
    timings = clip.timings
    stages = ", ".join(
        f"{name} {getattr(timings, name):.2f}"
        for name in ("queued", "preprocess", "denoise", "decode", "encode", "upload", "total")
    )
    console.print(f"clip           {mp4}  ({clip.width}x{clip.height}, {clip.num_frames} frames, seed {clip.seed})")
    console.print(f"contact sheet  {sheet}")
    console.print(f"seconds        start {started_s:.1f}; {stages}")
    console.print("next           make serve, then:", highlight=False)
    console.print(
        "               curl -sS localhost:8000/generate -H 'content-type: application/json' "
        f'-d \'{{"prompt":"{clip.prompt}"}}\'',
        highlight=False,
        soft_wrap=True,
    )
