"""The routes. Each one reads a request, asks the job service or the health monitor, and shapes the answer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Request, Security
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.security import HTTPBearer

from schemas.clips import Clip
from schemas.errors import PROBLEM_MEDIA_TYPE
from schemas.health import Health
from schemas.jobs import Job
from schemas.model_profile import ModelProfile
from schemas.requests import GenerateRequest
from serve_graph.api.auth import Authenticator
from serve_graph.api.context import context_of
from serve_graph.api.middleware import CLIENT_CLOSED_REQUEST
from serve_graph.health import HealthMonitor
from serve_graph.jobs import JobService
from serve_graph.metrics import CONTENT_TYPE

RESPOND_ASYNC = "respond-async"
RETRY_STATUSES = (429, 503)
"""Each problem with one of these has a `Retry-After`."""

PREFER = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": "`respond-async` answers at once.",
    "schema": {"type": "string"},
    "example": RESPOND_ASYNC,
}
"""Documented by hand: a header may come in several lines, which FastAPI would call an array."""


@dataclass(frozen=True)
class Service:
    """What the routes need: jobs, health, and the metrics of all deployments as Prometheus text."""

    jobs: JobService
    health: HealthMonitor
    metrics: Callable[[], Awaitable[bytes]]


API_KEY: list[Any] = [Security(HTTPBearer(auto_error=False, description="An API key; `wan-serve key new` makes one."))]
"""For the OpenAPI document; `RequestMiddleware` checks keys."""

KEY_PROBLEMS = (401, 403, 429)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries for the problem documents that a route may answer with.

    No `model`: FastAPI would add it as application/json. `Problem` is in the document through `Job`.
    """
    content = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    retry = {"headers": {"Retry-After": _header("Seconds to wait.", "integer")}}
    return {
        status: {"content": content, "description": "A problem", **(retry if status in RETRY_STATUSES else {})}
        for status in statuses
    }


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "required": True, "schema": {"type": kind}}


def routes(service: Service, profile: ModelProfile, authenticator: Authenticator) -> APIRouter:
    """All routes but those of the local store's signed URLs.

    authenticator: tells the document which routes ask for a key; `RequestMiddleware` asks.
    """
    router = APIRouter()

    def key_on(route: str) -> list[Any]:
        return API_KEY if authenticator.asks_on(route) else []

    examples = _examples(profile)

    @router.post(
        "/generate",
        response_model=Clip,
        responses={
            202: {
                "model": Job,
                "description": "With `Prefer: respond-async`: the job.",
                "headers": {"Location": _header("The job."), "Preference-Applied": _header("`respond-async`.")},
            },
            **problems(*KEY_PROBLEMS, 409, 413, 422, 500, 503, 504, 507),
        },
        openapi_extra={"parameters": [PREFER]},
        dependencies=key_on("/generate"),
    )
    async def generate(
        request: Request,
        body: Annotated[GenerateRequest, Body(openapi_examples=examples)],
    ) -> Response | Clip:
        """Make one clip. Waits for it, unless `Prefer: respond-async` asks for the job instead."""
        context = context_of(request.scope)
        await service.health.require_ready()
        record = await service.jobs.submit(body, context.request_id, context.principal)
        context.job_id = record.job_id
        context.prompt_hash = record.prompt_hash
        context.parameters = record.parameters
        if wants_async(request.headers.getlist("prefer")):
            job = await service.jobs.job(record.job_id, context.principal)
            headers = {"Location": f"/jobs/{record.job_id}", "Preference-Applied": RESPOND_ASYNC}
            return JSONResponse(job.model_dump(mode="json"), status_code=202, headers=headers)
        return await _wait_for_clip(service.jobs, request, record.job_id)

    @router.get(
        "/jobs/{job_id}",
        response_model=Job,
        responses=problems(*KEY_PROBLEMS, 404, 422, 500, 503),
        dependencies=key_on("/jobs/{job_id}"),
    )
    async def get_job(request: Request, job_id: Annotated[str, Path(examples=["job_" + "0" * 32])]) -> Job:
        """How a job is doing, and its clip once it is done."""
        return await service.jobs.job(job_id, context_of(request.scope).principal)

    @router.get(
        "/outputs/{clip_id}",
        status_code=307,
        response_class=Response,
        responses={
            307: {"description": "To a freshly signed URL.", "headers": {"Location": _header("The signed URL.")}},
            **problems(*KEY_PROBLEMS, 404, 422, 500, 503),
        },
        dependencies=key_on("/outputs/{clip_id}"),
    )
    @router.api_route("/outputs/{clip_id}", methods=["GET", "HEAD"], include_in_schema=False)  # serves both
    async def get_output(request: Request, clip_id: Annotated[str, Path(examples=["clip_" + "0" * 32])]) -> Response:
        """Redirect to a freshly signed URL of the clip."""
        signed = await service.jobs.clip_url(clip_id, context_of(request.scope).principal)
        return RedirectResponse(signed.url, status_code=307, headers={"Cache-Control": "no-store"})

    @router.get(
        "/models",
        response_model=list[ModelProfile],
        responses=problems(*KEY_PROBLEMS, 500),
        dependencies=key_on("/models"),
    )
    async def get_models() -> list[ModelProfile]:
        """The model that is served, and what it may be asked for."""
        return [profile]

    @router.get(
        "/health",
        response_model=Health,
        responses={
            503: {"model": Health, "description": "Not ready; `reason` says why."},
            **problems(*KEY_PROBLEMS, 500),
        },
        dependencies=key_on("/health"),
    )
    async def get_health() -> Response:
        """Everything about the service's state. 503 while it can't render."""
        health = await service.health.health()
        return JSONResponse(health.model_dump(mode="json"), status_code=200 if health.status == "ok" else 503)

    @router.get("/health/live", responses=problems(500))
    async def get_live() -> dict[str, str]:
        """Answers as long as the ingress runs."""
        return {"status": "ok"}

    @router.get("/health/ready", responses=problems(500, 503))
    async def get_ready() -> dict[str, str]:
        """Whether a request would be rendered now."""
        await service.health.require_ready()
        return {"status": "ok"}

    @router.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {}}, "description": "Prometheus text."},
            **problems(*KEY_PROBLEMS, 500),
        },
        dependencies=key_on("/metrics"),
    )
    async def get_metrics() -> Response:
        """The metrics of all deployments."""
        return Response(await service.metrics(), media_type=CONTENT_TYPE)

    return router


def wants_async(prefer: Iterable[str]) -> bool:
    """Whether Prefer headers hold `respond-async` (RFC 7240: comma-separated lists; parameters are ignored)."""
    preferences = ",".join(prefer).split(",")
    return any(preference.split(";")[0].strip().lower() == RESPOND_ASYNC for preference in preferences)


def _examples(profile: ModelProfile) -> dict[str, Any]:
    """Requests for the OpenAPI document, by what they show; the profile takes each of them."""
    defaults = profile.defaults
    return {
        "prompt only": {"value": {"prompt": "a red circle moving left"}},
        "a duration, a seed, a short-lived URL": {
            "value": {
                "prompt": "a red circle moving left",
                "duration": (defaults.num_frames - 1) / defaults.fps,
                "seed": 7,
                "url_ttl_s": 600,
            }
        },
        "a size and a frame count": {
            "value": {
                "prompt": "a blue square standing still",
                "resolution": defaults.resolution,
                "aspect_ratio": defaults.aspect_ratio,
                "num_frames": defaults.num_frames,
                "num_inference_steps": defaults.num_inference_steps,
                "guidance_scale": defaults.guidance_scale,
            }
        },
    }


async def _wait_for_clip(jobs: JobService, request: Request, job_id: str) -> Response | Clip:
    """Wait for the clip; when the client goes away first, its job is cancelled."""
    waiting = asyncio.ensure_future(jobs.wait(job_id))
    leaving = asyncio.ensure_future(_client_gone(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            jobs.cancel(job_id)
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return waiting.result()
    except asyncio.CancelledError:
        jobs.cancel(job_id)  # Ray Serve cancels the request of a client that went away
        raise
    finally:
        leaving.cancel()
        waiting.cancel()


async def _client_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
