"""The routes. Each one reads a request, asks the job service or the health monitor, and shapes the answer."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from schemas.clips import Clip
from schemas.estimates import Estimate
from schemas.health import Health
from schemas.jobs import Job
from schemas.model_profile import ModelProfile
from schemas.requests import GenerateRequest
from serve_graph.api.auth import Authenticator
from serve_graph.api.context import context_of
from serve_graph.api.documented import API_KEY, KEY_PROBLEMS, header, problems
from serve_graph.api.middleware import CLIENT_CLOSED_REQUEST
from serve_graph.api.prefer import IDEMPOTENCY_KEY, PREFER, Preference, idempotency_key
from serve_graph.health import HealthMonitor
from serve_graph.jobs import JobService
from serve_graph.metrics import CONTENT_TYPE


@dataclass(frozen=True)
class Service:
    """What the routes need: jobs, health, and the metrics of all deployments as Prometheus text."""

    jobs: JobService
    health: HealthMonitor
    metrics: Callable[[], Awaitable[bytes]]


def routes(
    service: Service, profile: ModelProfile, authenticator: Authenticator, max_wait_s: float | None = None
) -> APIRouter:
    """All routes but those of the local store's signed URLs.

    authenticator: tells the document which routes ask for a key; `RequestMiddleware` asks.
    max_wait_s: how long `POST /generate` waits at most.
    """
    router = APIRouter()

    def key_on(route: str) -> list[Any]:
        return API_KEY if authenticator.asks_on(route) else []

    examples = _examples(profile)

    @router.post(
        "/generate",
        response_model=Clip | Estimate,
        responses={
            202: {
                "model": Job,
                "description": "With `Prefer: respond-async`, or when the time to wait ran out: the job.",
                "headers": {"Location": header("The job."), "Preference-Applied": header("What was honoured.")},
            },
            **problems(*KEY_PROBLEMS, 409, 410, 413, 422, 500, 503, 504, 507),
        },
        openapi_extra={"parameters": [PREFER, IDEMPOTENCY_KEY]},
        dependencies=key_on("/generate"),
    )
    async def generate(
        request: Request,
        body: Annotated[GenerateRequest, Body(openapi_examples=examples)],
        dry_run: Annotated[
            bool, Query(description="Make nothing: say what it would take, or why it would be refused.")
        ] = False,
    ) -> Response | Clip | Estimate:
        """Make one clip. Waits for it, unless `Prefer` asks for the job instead, or after some seconds."""
        context = context_of(request.scope)
        key, preference = idempotency_key(request), Preference.of(request.headers.getlist("prefer"))
        await service.health.require_ready()
        if dry_run:
            estimate = await service.jobs.estimate(body, context.request_id, context.principal)
            context.parameters = estimate.parameters
            return estimate
        record = await service.jobs.submit(body, context.request_id, context.principal, idempotency_key=key)
        context.job_id = record.job_id
        context.prompt_hash = record.prompt_hash
        context.parameters = record.parameters
        wait_s = _shorter(preference.wait_s, max_wait_s)
        clip = await wait_for_clip(service.jobs, request, record.job_id, wait_s)
        if clip is not None:
            return clip
        job = await service.jobs.job(record.job_id, context.principal)
        headers = {"Location": f"/jobs/{record.job_id}"}
        if preference.applied is not None:
            headers["Preference-Applied"] = preference.applied
        return JSONResponse(job.model_dump(mode="json"), status_code=202, headers=headers)

    @router.get(
        "/outputs/{clip_id}",
        status_code=307,
        response_class=Response,
        responses={
            307: {"description": "To a freshly signed URL.", "headers": {"Location": header("The signed URL.")}},
            **problems(*KEY_PROBLEMS, 404, 410, 422, 500, 503),
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


def _shorter(wait_s: float | None, max_wait_s: float | None) -> float | None:
    waits = [seconds for seconds in (wait_s, max_wait_s) if seconds is not None]
    return min(waits) if waits else None


async def wait_for_clip(
    jobs: JobService, request: Request, job_id: str, wait_s: float | None
) -> Response | Clip | None:
    """Wait for the clip, `wait_s` at most; None when it isn't there by then.

    When the client goes away first, its job is cancelled, unless others wait for it or it has an idempotency key.
    """
    if wait_s == 0:
        return None
    waiting = asyncio.ensure_future(jobs.wait(job_id, context_of(request.scope).principal))
    leaving = asyncio.ensure_future(_client_gone(request))
    try:
        await asyncio.wait({waiting, leaving}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if not leaving.done():
            return None
        await _stop(waiting)
        jobs.abandon(job_id)
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except asyncio.CancelledError:  # Ray Serve cancels the request of a client that went away
        await _stop(waiting)
        jobs.abandon(job_id)
        raise
    finally:
        leaving.cancel()
        waiting.cancel()


async def _stop(waiting: asyncio.Future[Clip]) -> None:
    """Let the waiter go, so that it isn't counted any more."""
    waiting.cancel()
    await asyncio.wait([waiting])


async def _client_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
