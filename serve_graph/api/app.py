"""Puts the API together: routes, problem documents, the request middleware, the OpenAPI document."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline

from schemas.batches import MAX_BATCH_BYTES
from schemas.model_profile import ModelProfile
from serve_graph import __version__
from serve_graph.api.auth import Authenticator
from serve_graph.api.batch_routes import BATCHES, batch_routes
from serve_graph.api.clip_files import SignedClips, clip_file_routes
from serve_graph.api.job_routes import job_routes
from serve_graph.api.middleware import RequestMiddleware
from serve_graph.api.openai_videos import POLL_AFTER, openai_routes
from serve_graph.api.problems import install_handlers
from serve_graph.api.request_id import REQUEST_ID_HEADER
from serve_graph.api.routes import Service, routes
from serve_graph.metrics import IngressMetrics

DESCRIPTION = """Wan 2.1 as a service: a prompt goes in, an MP4 clip lands in the store and comes back behind a
URL that expires. Errors are RFC 9457 problem documents (`application/problem+json`)."""


def create_api(
    service: Service,
    *,
    profile: ModelProfile,
    metrics: IngressMetrics,
    max_body_bytes: int,
    echo_request_id: bool = True,
    authenticator: Authenticator | None = None,
    cors_origins: Sequence[str] = (),
    signed_clips: SignedClips | None = None,
    clip_retention: timedelta | None = None,
    max_wait_s: float | None = None,
    while_running: Callable[[], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """The application.

    signed_clips: where this service answers the store's presigned URLs itself. clip_retention: how long clips are
    kept; None: for ever. max_wait_s: how long `POST /generate` waits at most before it answers with the job.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if while_running is None:
            yield
            return
        async with while_running():
            yield

    app: FastAPI = FastAPIOffline(
        title="wan-serve",
        description=DESCRIPTION,
        version=__version__,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    _document_own_errors_only(app)
    authenticator = authenticator or Authenticator(None, protect_monitoring=False)
    all_routes = [*app.routes]  # the documentation's; an included router hides its own
    routers = [
        routes(service, profile, authenticator, max_wait_s),
        job_routes(service.jobs, authenticator),
        batch_routes(service.jobs, service.health, profile, authenticator),
        openai_routes(service.jobs, service.health, profile, authenticator, clip_retention),
    ]
    if signed_clips is not None:
        routers.append(clip_file_routes(signed_clips))
    for router in routers:
        all_routes += router.routes
        app.include_router(router)
    install_handlers(app, profile, all_routes)
    app.add_middleware(
        RequestMiddleware,
        routes=all_routes,
        metrics=metrics,
        max_body_bytes=max_body_bytes,
        streamed={BATCHES: MAX_BATCH_BYTES},
        echo_request_id=echo_request_id,
        authenticator=authenticator,
    )
    if cors_origins:
        app.add_middleware(  # outermost: a page can read our errors, too
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=[
                *("Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Prefer", "Range"),
                REQUEST_ID_HEADER,
            ],
            expose_headers=[
                *(REQUEST_ID_HEADER, "Location", "Preference-Applied", "Retry-After", "WWW-Authenticate"),
                *("Accept-Ranges", "Content-Range", "Content-Disposition", "ETag", POLL_AFTER),
            ],
        )
    return app


def _document_own_errors_only(app: FastAPI) -> None:
    """Leave out the 422 that FastAPI documents where a route, as those under `/v1/`, has none."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for operation in (operation for path in document["paths"].values() for operation in path.values()):
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change it
