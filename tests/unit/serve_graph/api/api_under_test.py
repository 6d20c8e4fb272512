"""The API in process: the real application, job service, monitor and store; worker and model probe scripted."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
from fastapi import FastAPI
from random_wan import RANDOM_WAN
from support import PUBLIC_URL, Jobs, LogLines, open_jobs

from schemas.errors import WanError
from schemas.health import GeneratorHealth, ModelHealth
from schemas.model_profile import ModelProfile
from serve_graph.api.app import create_api
from serve_graph.api.auth import Authenticator
from serve_graph.api.clip_files import SignedClips
from serve_graph.api.routes import Service
from serve_graph.encode import Mp4Writer
from serve_graph.health import HealthMonitor
from serve_graph.metrics import merge, snapshot
from serve_graph.service_plan import ServicePlan, plan_for
from serve_graph.settings import EncodeSettings, ModelSettings, Settings
from serve_graph.stores import LocalFiles

MAX_BODY_BYTES = 64 * 1024


@dataclass
class ScriptedProbe:
    """A `GeneratorProbe`: the health it is given, or the problem."""

    problem: WanError | None = None
    health_now: GeneratorHealth = field(
        default_factory=lambda: GeneratorHealth(
            model=ModelHealth(profile="wan-random", revision=None, loaded=True, dtype="float32", device="cpu"),
            gpu=None,
        )
    )

    async def health(self) -> GeneratorHealth:
        if self.problem is not None:
            raise self.problem
        return self.health_now


@dataclass(frozen=True)
class Api:
    """The application, a client of it, and what is behind it."""

    app: FastAPI
    http: httpx.AsyncClient
    jobs: Jobs
    monitor: HealthMonitor
    probe: ScriptedProbe
    log: LogLines


@asynccontextmanager
async def open_api(
    folder: Path,
    log: LogLines,
    *,
    authenticator: Authenticator | None = None,
    cors_origins: Sequence[str] = (),
    clip_retention: timedelta | None = None,
    profile: ModelProfile = RANDOM_WAN,
) -> AsyncIterator[Api]:
    """A service for 3 waiting jobs, one of them dispatched at a time."""
    probe = ScriptedProbe()
    plan = ServicePlan(plan_for(Settings(model=ModelSettings(profile=profile))), lambda: probe.health_now.gpu)
    with open_jobs(
        folder,
        profile=profile,
        max_waiting_jobs=3,
        max_dispatched_jobs=1,
        clip_retention=clip_retention,
        plan=plan,
    ) as jobs:
        monitor = HealthMonitor(Settings(), probe, jobs.store, jobs.service, jobs.executor)

        async def exposition() -> bytes:
            return merge([("Ingress", "replica-1", snapshot(jobs.registry))])

        app = create_api(
            Service(jobs.service, monitor, exposition),
            profile=profile,
            metrics=jobs.metrics,
            max_body_bytes=MAX_BODY_BYTES,
            authenticator=authenticator,
            cors_origins=cors_origins,
            clip_retention=clip_retention,
            signed_clips=SignedClips(LocalFiles(jobs.store, jobs.presigner), jobs.executor),
        )
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=PUBLIC_URL) as http:
            yield Api(app, http, jobs, monitor, probe, log)


async def send_raw(api: Api, method: str, target: str, headers: dict[str, str] | None = None) -> httpx.Response:
    """Send a request target as it is, decoded as uvicorn does: httpx would tidy `.` and `..` away."""
    path, _, query = target.encode("ascii").partition(b"?")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raw = {"path": unquote(path.decode("ascii")), "raw_path": path, "query_string": query}
        await api.app({**scope, **raw}, receive, send)

    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=PUBLIC_URL) as http:
        return await http.request(method, "/", headers=headers)


def small_mp4(folder: Path) -> bytes:
    """A real clip of two frames of 112x64, a red one and a blue one."""
    frames = np.zeros((2, 64, 112, 3), np.uint8)
    frames[0, ..., 0] = frames[1, ..., 2] = 255
    path = folder / "small.mp4"
    with Mp4Writer(path, width=112, height=64, fps=8, settings=EncodeSettings(), metadata={}) as writer:
        writer.write(frames)
    return path.read_bytes()
