"""The routes of batches: submit, list, state, results, cancel. Each one asks the job service and shapes the answer."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from schemas.batches import MAX_BATCH_BYTES, MAX_BATCH_REQUESTS, Batch, BatchPage, BatchResult
from schemas.model_profile import ModelProfile
from schemas.requests import GenerateRequest
from serve_graph.api.auth import Authenticator
from serve_graph.api.batch_body import NDJSON, batch_body
from serve_graph.api.context import context_of
from serve_graph.api.documented import API_KEY, KEY_PROBLEMS, header, problems
from serve_graph.api.middleware import CLIENT_CLOSED_REQUEST
from serve_graph.api.prefer import IDEMPOTENCY_KEY, idempotency_key
from serve_graph.health import HealthMonitor
from serve_graph.jobs import JobService
from serve_graph.jobs.service import MAX_PAGE

BATCHES = "/batches"
MAX_INTAKES = 2
"""Submissions that are read and checked at the same time; each holds its body, 16 MiB and what becomes of it."""

MAX_RETRY_AFTER_S = 60

BatchId = Annotated[str, Path(examples=["batch_" + "0" * 32])]


def batch_routes(
    jobs: JobService, health: HealthMonitor, profile: ModelProfile, authenticator: Authenticator
) -> APIRouter:
    """Everything under `/batches`."""
    router = APIRouter()
    intakes = asyncio.Semaphore(MAX_INTAKES)

    def key_on(route: str) -> list[Any]:
        return API_KEY if authenticator.asks_on(route) else []

    @router.post(
        BATCHES,
        status_code=202,
        response_model=Batch,
        responses={
            202: {"headers": {"Location": header("The batch.")}},
            **problems(*KEY_PROBLEMS, 410, 413, 422, 500, 503, 507),
        },
        openapi_extra={"parameters": [IDEMPOTENCY_KEY], "requestBody": _request_body()},
        dependencies=key_on(BATCHES),
    )
    async def submit_batch(request: Request) -> Response:
        """Make many clips, each a job of its own: `jobs` in the order of submission, or none where one is not valid."""
        context, key = context_of(request.scope), idempotency_key(request)
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        await health.require_ready()
        try:
            async with intakes:
                body = await batch_body(request.stream(), media_type, profile)
                batch = await jobs.submit_batch(
                    body.requests,
                    context.request_id,
                    context.principal,
                    webhook_url=body.webhook_url,
                    idempotency_key=key,
                )
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(
            batch.model_dump(mode="json"), status_code=202, headers={"Location": f"{BATCHES}/{batch.batch_id}"}
        )

    @router.get(
        BATCHES,
        response_model=BatchPage,
        responses=problems(*KEY_PROBLEMS, 422, 500, 503),
        dependencies=key_on(BATCHES),
    )
    async def list_batches(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
        after: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
    ) -> BatchPage:
        """This API key's batches, newest first."""
        return await jobs.batches.reading.batches(context_of(request.scope).principal, limit=limit, after=after)

    @router.get(
        "/batches/{batch_id}",
        response_model=Batch,
        responses={
            200: {"headers": {"Retry-After": header("When to look again, in seconds.", "integer", required=False)}},
            **problems(*KEY_PROBLEMS, 404, 410, 422, 500, 503),
        },
        dependencies=key_on("/batches/{batch_id}"),
    )
    async def get_batch(request: Request, response: Response, batch_id: BatchId) -> Batch:
        """How many of a batch's jobs are in which state, and how long it may take."""
        batch = await jobs.batches.reading.batch(batch_id, context_of(request.scope).principal)
        if batch.state != "ended":
            response.headers["Retry-After"] = str(_retry_after_s(batch))
        return batch

    @router.get(
        "/batches/{batch_id}/results",
        response_class=StreamingResponse,
        responses={
            200: {"content": {NDJSON: {}}, "description": "A `BatchResult` per line, in the order of submission."},
            **problems(*KEY_PROBLEMS, 404, 410, 422, 500, 503),
        },
        dependencies=key_on("/batches/{batch_id}/results"),
    )
    async def get_results(request: Request, batch_id: BatchId) -> Response:
        """Every job's state, with a fresh URL of its clip or its problem; those that have not ended are among them."""
        results = jobs.batches.reading.results(batch_id, context_of(request.scope).principal)
        first = await anext(results)  # so that an unknown batch is a 404 and no stream
        return StreamingResponse(_lines(first, results), media_type=NDJSON, headers={"Cache-Control": "no-store"})

    @router.post(
        "/batches/{batch_id}/cancel",
        response_model=Batch,
        responses={
            202: {"model": Batch, "description": "What runs in other processes has been told."},
            **problems(*KEY_PROBLEMS, 404, 410, 422, 500, 503),
        },
        dependencies=key_on("/batches/{batch_id}/cancel"),
    )
    async def cancel_batch(request: Request, batch_id: BatchId) -> Response:
        """Cancel what has not ended: running jobs stop within a step, the others never begin."""
        batch = await jobs.batches.cancel(batch_id, context_of(request.scope).principal)
        return JSONResponse(batch.model_dump(mode="json"), status_code=200 if batch.state == "ended" else 202)

    return router


def _retry_after_s(batch: Batch) -> int:
    left = batch.seconds_left
    return 1 if left is None else min(MAX_RETRY_AFTER_S, max(1, round(left / 10)))


async def _lines(first: BatchResult, results: AsyncGenerator[BatchResult, None]) -> AsyncIterator[bytes]:
    async with aclosing(results):
        yield first.model_dump_json().encode() + b"\n"
        async for result in results:
            yield result.model_dump_json().encode() + b"\n"


def _request_body() -> dict[str, Any]:
    """Documented by hand: the route reads the body itself, bit by bit."""
    one = {"$ref": "#/components/schemas/GenerateRequest"}
    fields = GenerateRequest.model_json_schema()["properties"]
    schema = {
        "title": "BatchRequest",
        "type": "object",
        "required": ["requests"],
        "additionalProperties": False,
        "properties": {
            "requests": {
                "type": "array",
                "items": one,
                "minItems": 1,
                "maxItems": MAX_BATCH_REQUESTS,
                "description": f"In the order of their jobs; {MAX_BATCH_BYTES} bytes at most.",
            },
            "defaults": {
                "type": "object",
                "additionalProperties": False,
                "properties": {name: field for name, field in fields.items() if name != "prompt"},
                "description": "For what a request leaves out.",
            },
            "webhook_url": fields["webhook_url"],
        },
    }
    requests = [{"prompt": "a red circle moving left"}, {"prompt": "a blue square standing still", "seed": 7}]
    lines = '{"prompt": "a red circle moving left"}\n{"prompt": "a blue square standing still", "seed": 7}\n'
    return {
        "required": True,
        "content": {
            "application/json": {
                "schema": schema,
                "examples": {
                    "two prompts": {"value": {"requests": requests}},
                    "with defaults": {"value": {"requests": requests, "defaults": {"num_inference_steps": 4}}},
                },
            },
            NDJSON: {
                "schema": {"type": "string", "description": "One request per line."},
                "examples": {"two prompts": {"value": lines}},
            },
        },
    }
