"""A real `wan-serve serve` as a child process, and HTTP clients for it. Leaves no process and no file behind."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families
from s3_servers.ministack import BUCKETS

from benchmarks.workload import IN_FLIGHT, Block, closed_loop, request
from schemas.clips import Clip
from serve_graph.open_ports import free_port
from serve_graph.server import load_config
from serve_graph.settings import Settings

SERVE = ("-m", "serve_graph.cli", "serve", "--config")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 90.0
REQUEST_TIMEOUT_S = 120.0
_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.1

_SHIPPED_CONFIG = Path(__file__).parents[1] / "configs" / "local.yaml"


class ServiceFailed(Exception):
    """The service did not start, or did not answer with a clip; the message says why."""


class Service:
    """The running service, seen by its clients. Each method runs a loop of its own to its end."""

    def __init__(self, pid: int, base_url: str) -> None:
        self.pid = pid
        self.base_url = base_url
        limits = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
        self._http = httpx.AsyncClient(base_url=base_url, timeout=REQUEST_TIMEOUT_S, limits=limits)
        self._runner = asyncio.Runner()

    def clip(self, number: int) -> tuple[float, Clip]:
        """One request. Returns the seconds to its answer, and the answer."""
        return self._runner.run(self._timed(number))

    def block(self, first: int, num_timed: int) -> Block:
        """A closed loop of as many clients, see `workload.closed_loop`."""
        return self._runner.run(closed_loop(self._generate, first, num_timed=num_timed))

    def device_busy_s(self) -> float:
        """Seconds in which the device's thread has worked since its start. Raises ServiceFailed."""
        return busy_seconds(self._runner.run(self._http.get("/metrics")).text)

    def close(self) -> None:
        """Close the clients' connections."""
        self._runner.run(self._http.aclose())
        self._runner.close()

    async def _timed(self, number: int) -> tuple[float, Clip]:
        began = time.perf_counter()
        answer = await self._generate(number)
        seconds = time.perf_counter() - began
        return seconds, Clip.model_validate_json(answer)

    async def _generate(self, number: int) -> bytes:
        body = request(number).model_dump(mode="json", exclude_unset=True)
        answer = await self._http.post("/generate", json=body)
        if answer.status_code != 200:
            raise ServiceFailed(f"status {answer.status_code}: {answer.text}")
        return answer.content


def busy_seconds(page: str) -> float:
    """Of the device's thread, from what `/metrics` answered. Raises ServiceFailed where it is missing."""
    families = text_string_to_metric_families(page)
    found = [s.value for family in families for s in family.samples if s.name == "wan_device_busy_seconds_total"]
    if not found:
        raise ServiceFailed("/metrics has no wan_device_busy_seconds_total")
    return sum(found)


def write_config(folder: Path, s3_endpoint: str | None = None, **args_over: Any) -> tuple[Path, Settings]:
    """The shipped config file with its data under `folder`, and the settings that it means.

    s3_endpoint: keep clips and records in a bucket there; the environment has the keys. args_over: sections of `args`.
    """
    folder.mkdir(exist_ok=True)
    config = yaml.safe_load(_SHIPPED_CONFIG.read_text())
    args = config["applications"][0]["args"]
    args |= {"data_dir": str(folder / "data")}
    args["storage"] |= {"folder": str(folder / "store")}
    if s3_endpoint is not None:
        bucket = {"endpoint": s3_endpoint, "bucket": f"{BUCKETS}bench"}
        args["storage"] |= {"kind": "s3", "s3": bucket, "create_bucket": True}
    args |= args_over
    config["http_options"]["port"] = free_port()
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, load_config(path).settings


@contextmanager
def running_service(
    config: Path,
    settings: Settings,
    scratch: Path,
    command: Sequence[str] = SERVE,
    env: Mapping[str, str] | None = None,
) -> Iterator[Service]:
    """Start the service, wait until it is ready, and stop it at the end. Raises ServiceFailed.

    command: what Python runs, before the config file. env: more variables for it.
    """
    log = scratch / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command, str(config)],
            stdout=subprocess.PIPE,
            stderr=output,
            env=os.environ | {"RAY_TMPDIR": str(scratch / "ray"), "TMPDIR": str(scratch)} | dict(env or {}),
            start_new_session=True,  # Ctrl-C reaches this process only, which then stops the service in its own way
        )
    try:
        _wait_ready(process, log)
        service = Service(process.pid, settings.require_public_url())
        try:
            yield service
        finally:
            service.close()
    finally:
        stop_family(process, STOP_TIMEOUT_S)


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    timer = threading.Timer(START_TIMEOUT_S, process.terminate)
    timer.start()
    try:
        for line in process.stdout or ():
            if line.startswith(b"ready "):
                return
    finally:
        timer.cancel()
    raise ServiceFailed("the service did not start:\n" + log.read_text(errors="replace")[-2_000:])


def stop_family(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Ask it to stop within so many seconds; whoever of its family is still there afterwards is killed."""
    family: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):  # before it ends: later its children have no parent to be found by
        family |= set(psutil.Process(process.pid).children(recursive=True))
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):  # also those that start only now, while Ray comes up
            family |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(_POLL_S)  # its children change meanwhile, so no plain wait
    process.kill()
    process.wait()
    for left in family:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(family, timeout=_KILL_TIMEOUT_S)
