"""The routes of jobs: list, status, events, cancel, delete. Each one asks the job service and shapes the answer."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from schemas.errors import ShuttingDown, WanError
from schemas.jobs import Job, JobPage, JobState
from serve_graph.api.auth import Authenticator
from serve_graph.api.context import context_of
from serve_graph.api.documented import API_KEY, KEY_PROBLEMS, header, problems
from serve_graph.jobs import JobService
from serve_graph.jobs.service import MAX_PAGE

HEARTBEAT_S = 15.0
"""Between two comments of an event stream on which nothing happens; proxies cut after 30 s or more."""

MAX_RETRY_AFTER_S = 30

JobId = Annotated[str, Path(examples=["job_" + "0" * 32])]


def job_routes(jobs: JobService, authenticator: Authenticator) -> APIRouter:
    """Everything under `/jobs`."""
    router = APIRouter()

    def key_on(route: str) -> list[Any]:
        return API_KEY if authenticator.asks_on(route) else []

    @router.get(
        "/jobs",
        response_model=JobPage,
        responses=problems(*KEY_PROBLEMS, 404, 410, 422, 500, 503),
        dependencies=key_on("/jobs"),
    )
    async def list_jobs(
        request: Request,
        state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
        batch: Annotated[str | None, Query(description="The jobs of this batch.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
        after: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
    ) -> JobPage:
        """This API key's jobs, newest first, without those of batches; or one batch's, in the order of submission."""
        principal = context_of(request.scope).principal
        return await jobs.jobs(principal, state=state, batch_id=batch, limit=limit, after=after)

    @router.get(
        "/jobs/{job_id}",
        response_model=Job,
        responses={
            200: {"headers": {"Retry-After": header("When to look again, in seconds.", "integer", required=False)}},
            **problems(*KEY_PROBLEMS, 404, 410, 422, 500, 503),
        },
        dependencies=key_on("/jobs/{job_id}"),
    )
    async def get_job(request: Request, response: Response, job_id: JobId) -> Job:
        """How a job is doing, and its clip once it is done."""
        job = await jobs.job(job_id, context_of(request.scope).principal)
        if not job.state.is_terminal:
            response.headers["Retry-After"] = str(retry_after_s(job))
        return job

    @router.get(
        "/jobs/{job_id}/events",
        response_class=StreamingResponse,
        responses={
            200: {"content": {"text/event-stream": {}}, "description": "Events named `job`; each holds a `Job`."},
            **problems(*KEY_PROBLEMS, 404, 410, 422, 500, 503),
        },
        dependencies=key_on("/jobs/{job_id}/events"),
    )
    async def get_events(request: Request, job_id: JobId) -> Response:
        """Server-sent events: the job at once, then at each change, until it ends."""
        changes = jobs.changes(job_id, context_of(request.scope).principal)
        first = await anext(changes, None)  # so that an unknown job is a 404 and no stream
        if first is None:
            raise ShuttingDown("the service is stopping")
        return StreamingResponse(
            _events(first, changes), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    @router.post(
        "/jobs/{job_id}/cancel",
        response_model=Job,
        responses={
            202: {"model": Job, "description": "The process that runs it has been told."},
            **problems(*KEY_PROBLEMS, 404, 410, 422, 500, 503),
        },
        dependencies=key_on("/jobs/{job_id}/cancel"),
    )
    async def cancel_job(request: Request, job_id: JobId) -> Response:
        """Cancel a job. `state` says whether that, or the job's end a moment before, came first."""
        job = await jobs.cancel(job_id, context_of(request.scope).principal)
        return JSONResponse(job.model_dump(mode="json"), status_code=200 if job.state.is_terminal else 202)

    @router.delete(
        "/jobs/{job_id}",
        status_code=204,
        response_class=Response,
        responses=problems(*KEY_PROBLEMS, 404, 409, 410, 422, 500, 503),
        dependencies=key_on("/jobs/{job_id}"),
    )
    async def delete_job(request: Request, job_id: JobId) -> None:
        """Delete an ended job and its clip."""
        await jobs.delete(job_id, context_of(request.scope).principal)

    return router


def retry_after_s(job: Job) -> int:
    """When it is worth to look at a job again, in whole seconds."""
    left = job.seconds_left
    return 1 if left is None else min(MAX_RETRY_AFTER_S, max(1, round(left)))


async def _events(first: Job, changes: AsyncGenerator[Job, None]) -> AsyncIterator[bytes]:
    async with aclosing(changes):
        yield _event(first)
        following = asyncio.ensure_future(anext(changes, None))
        try:
            while True:
                await asyncio.wait({following}, timeout=HEARTBEAT_S)
                if not following.done():
                    yield KEEPALIVE_COMMENT
                    continue
                try:
                    job = following.result()
                except WanError:  # it was deleted meanwhile; who asks again is told so
                    return
                if job is None:
                    return
                yield _event(job)
                following = asyncio.ensure_future(anext(changes, None))
        finally:
            following.cancel()
            await asyncio.wait({following})


def _event(job: Job) -> bytes:
    return format_sse_event(data_str=job.model_dump_json(), event="job")
