"""The contenders as their clients see them: three peers and this service, each a server in processes of its own.

Starts them, asks them for clips, finds the process to kill, and counts steps that were run for clients who had gone.
"""

import asyncio
import base64
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from s3_servers.process import dies_with_parent

from benchmarks.peers import worker_files
from benchmarks.processes import TOGETHER, Memory, memory_by_role, roles
from benchmarks.service import START_TIMEOUT_S, stop_family
from schemas.clips import Clip
from schemas.requests import GenerateRequest
from serve_graph.open_ports import free_port

OURS = "wan-serve"
PEERS = ("FastAPI", "LitServe", "cog")
LOGGED_SERVICE = ("-m", "benchmarks.peers.logged_service")

ROOT = Path(__file__).parents[2]
_POLL_S = 0.05
_BUSY_PAUSE_S = 0.05
_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 10.0


class NoClip(Exception):
    """A request was not answered with a clip; the message says with what instead."""


class PeerFailed(Exception):
    """A peer did not start; the message says why."""


@dataclass
class Contender(ABC):
    """What a server is to its clients. folder: where its worker leaves its files."""

    name: str
    pid: int
    base_url: str
    ready_s: float
    folder: Path
    http: httpx.AsyncClient = field(init=False)
    _left_at: dict[int, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.http = httpx.AsyncClient(base_url=self.base_url, timeout=_TIMEOUT_S, limits=limits)

    async def clip(self, request: GenerateRequest) -> None:
        """Ask for a clip and wait for it. Raises NoClip."""
        try:
            await self._clip(request.model_dump(mode="json", exclude_unset=True))
        except (httpx.HTTPError, KeyError, ValueError) as error:
            raise NoClip(repr(error)) from error

    @abstractmethod
    async def _clip(self, body: dict[str, Any]) -> None: ...

    def left(self, number: int) -> None:
        """The client with this number goes away."""
        self._left_at[number] = time.monotonic()

    def wasted_steps(self) -> float:
        """Steps run since the start for clients who had gone by then; of a step under way then, the part after."""
        return worker_files.steps_after((self.folder / worker_files.STEPS_FILE).read_text(), self._left_at)

    @abstractmethod
    def worker(self) -> int:
        """The process that holds the model."""

    def memory(self) -> Memory:
        """Of all its processes."""
        return memory_by_role(self.pid)[TOGETHER]


@dataclass
class Service(Contender):
    """This service. Its answer is a URL; `download` fetches what it leads to."""

    last_url: str = ""

    async def _clip(self, body: dict[str, Any]) -> None:
        answer = await self.http.post("/generate", json=body)
        if answer.status_code != httpx.codes.OK:
            raise NoClip(f"{answer.status_code}: {answer.text[:300]}")
        self.last_url = Clip.model_validate_json(answer.content).output_url

    async def download(self) -> float:
        """Seconds to fetch the last clip."""
        began = time.perf_counter()
        _require_mp4((await self.http.get(self.last_url)).content)
        return time.perf_counter() - began

    def worker(self) -> int:
        return int(roles(self.pid)["generator"][0].pid)


@dataclass
class Peer(Contender):
    """One of the others: it answers with the clip's bytes."""

    route: str = ""

    async def _clip(self, body: dict[str, Any]) -> None:
        answer = await self.http.post(self.route, json=body)
        if answer.status_code != httpx.codes.OK:
            raise NoClip(f"{answer.status_code}: {answer.text[:300]}")
        _require_mp4(answer.content)

    def worker(self) -> int:
        return int((self.folder / worker_files.WORKER_FILE).read_text())


@dataclass
class CogPeer(Peer):
    """cog: the input in an envelope, the clip in a data URL, a 409 while every slot is taken."""

    async def _clip(self, body: dict[str, Any]) -> None:
        answer = await self.http.post(self.route, json={"input": body})
        while answer.status_code == httpx.codes.CONFLICT:
            await asyncio.sleep(_BUSY_PAUSE_S)  # its documentation leaves it to clients to ask again
            answer = await self.http.post(self.route, json={"input": body})
        if answer.status_code != httpx.codes.OK or answer.json()["status"] != "succeeded":
            raise NoClip(f"{answer.status_code}: {answer.text[:300]}")
        _require_mp4(base64.b64decode(answer.json()["output"].partition(",")[2]))


@dataclass(frozen=True)
class _Launch:
    """How a peer is started. command: of its own Python, `{port}` filled in."""

    command: tuple[str, ...]
    route: str
    health: str
    kind: type[Peer] = Peer
    env: dict[str, str] = field(default_factory=dict)


_UVICORN = ("-m", "uvicorn", "benchmarks.peers.fastapi_peer:app", "--host", "127.0.0.1", "--port", "{port}")
_LAUNCHES = {
    "FastAPI": _Launch((*_UVICORN, "--log-level", "warning"), "/generate", "/health"),
    "LitServe": _Launch(("-m", "benchmarks.peers.litserve_peer", "{port}"), "/predict", "/health"),
    "cog": _Launch(
        ("-m", "cog.server.http", "--host", "127.0.0.1"),
        "/predictions",
        "/health-check",
        CogPeer,
        # What `cog build` writes into an image. MAX_CONCURRENCY of `cog_peer`, which can be imported only there.
        {"COG_PREDICT_TYPE_STUB": "benchmarks/peers/cog_peer.py:Runner", "COG_MAX_CONCURRENCY": "64"},
    ),
}


@contextmanager
def running_peer(name: str, python: Path, checkpoint: Path, folder: Path) -> Iterator[Peer]:
    """Start a peer and wait until it says that it is ready. Raises PeerFailed.

    python: of the environment that has the peers' packages. folder: an empty one for what it writes.
    """
    launch, port = _LAUNCHES[name], free_port()
    folder.mkdir()
    log = folder / "log"
    environment = os.environ | launch.env
    environment |= {worker_files.CHECKPOINT_VARIABLE: str(checkpoint), worker_files.FOLDER_VARIABLE: str(folder)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PORT": str(port), "TMPDIR": str(folder)}
    environment |= {"PATH": f"{python.parent}:{environment['PATH']}"}  # cog starts its worker as `python`
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*dies_with_parent(), python, *(part.format(port=port) for part in launch.command)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the benchmark only, which then stops it
        )
    base_url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(process, base_url + launch.health, log)
        yield launch.kind(name, process.pid, base_url, time.perf_counter() - began, folder, route=launch.route)
    finally:
        stop_family(process, _STOP_TIMEOUT_S)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            answer = httpx.get(url, timeout=5)
            if answer.status_code == httpx.codes.OK and '"STARTING"' not in answer.text:  # cog says so with a 200
                return
        except httpx.HTTPError:
            pass  # it doesn't listen yet
        time.sleep(_POLL_S)  # a server says that it is ready by answering
    raise PeerFailed("it did not start:\n" + log.read_text(errors="replace")[-2_000:])


def _require_mp4(body: bytes) -> None:
    if body[4:8] != b"ftyp":
        raise NoClip(f"{len(body)} bytes that are no MP4")
