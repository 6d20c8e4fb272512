"""The HTTP contract without a renderer: a client's tests put it into any state, at any moment.

`tests/integration/one_service/test_client.py` makes the same calls to it and to the real service.
"""

import asyncio
import contextlib
import hashlib
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from random_wan import RANDOM_WAN
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from schemas.batches import BatchResult
from schemas.errors import (
    PROBLEM_MEDIA_TYPE,
    FieldError,
    IdempotencyMismatch,
    InvalidRequest,
    JobNotEnded,
    Unauthorized,
    UrlExpired,
    WanError,
)
from schemas.health import Health, ModelHealth, QueueHealth, StorageHealth
from schemas.jobs import JobState, batch_id_from, item_id, job_id_from, job_id_of
from schemas.requests import GenerateRequest
from scripted.script import ENDED, Script, clip_bytes


def scripted_app(script: Script) -> ASGIApp:
    """The routes of the contract over a script."""

    def remembered(request: Request, body: bytes) -> str | None:
        """The id that this Idempotency-Key made before."""
        found = script.keys.get(request.headers["idempotency-key"])
        if found is not None and found[0] != body:
            raise IdempotencyMismatch
        return None if found is None else found[1]

    def key_digest(request: Request) -> str:
        return hashlib.sha256(request.headers["idempotency-key"].encode()).hexdigest()

    async def generate(request: Request) -> Response:
        assert request.headers["prefer"] == "respond-async"
        body = await request.body()
        job_id = remembered(request, body)
        if job_id is None:
            parsed = GenerateRequest.model_validate_json(body)
            job_id = script.make(parsed, job_id_from(key_digest(request))).job_id
            script.keys[request.headers["idempotency-key"]] = body, job_id
        return answer(script.jobs[job_id], 202, {"location": f"/jobs/{job_id}"})

    async def jobs(request: Request) -> Response:
        asked = request.query_params
        found = [
            job
            for job in reversed(script.jobs.values())
            if job.batch_id == asked.get("batch") and asked.get("state", job.state) == job.state
        ]
        first, size = int(asked.get("after", "0")), min(int(asked["limit"]), 2)
        page = found[first : first + size]
        more = str(first + size) if first + size < len(found) else None
        return JSONResponse({"jobs": [job.model_dump(mode="json") for job in page], "next_cursor": more})

    async def job(request: Request) -> Response:
        found = script.look(request.path_params["job_id"])
        return answer(found, 200, {} if found.state in ENDED else {"retry-after": "0"})

    async def events(request: Request) -> Response:
        script.look(request.path_params["job_id"])

        async def stream() -> AsyncIterator[str]:
            told, sent = None, 0
            while True:
                now = script.look(request.path_params["job_id"])
                if now != told:
                    told = now
                    yield f": note\nevent: job\ndata: {now.model_dump_json()}\n\n"
                    sent += 1
                    if script.cut_events_after is not None and sent >= script.cut_events_after:
                        raise ConnectionAbortedError
                    if now.state in ENDED:
                        return
                await asyncio.sleep(0.005)

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def cancel(request: Request) -> Response:
        found = script.jobs[request.path_params["job_id"]]
        return answer(found if found.state in ENDED else script.end(found.job_id, JobState.CANCELLED), 200)

    async def delete(request: Request) -> Response:
        found = script.look(request.path_params["job_id"])
        if found.state not in ENDED:
            raise JobNotEnded
        script.deleted.add(found.job_id)
        return Response(status_code=204)

    async def make_batch(request: Request) -> Response:
        body = await request.body()
        batch_id = remembered(request, body)
        if batch_id is None:
            parsed = [GenerateRequest.model_validate_json(line) for line in body.split(b"\n") if line]
            wrong = [i for i, one in enumerate(parsed) if one.num_frames == 80]
            if wrong:
                raise InvalidRequest([FieldError(field=f"requests.{i}.num_frames", message="80 is odd") for i in wrong])
            batch_id = batch_id_from(key_digest(request))
            script.batches[batch_id] = [
                script.make(one, item_id(batch_id, i), batch_id).job_id for i, one in enumerate(parsed)
            ]
            script.keys[request.headers["idempotency-key"]] = body, batch_id
        return answer(script.batch(batch_id), 202)

    async def batches(request: Request) -> Response:
        found = [script.batch(batch_id).model_dump(mode="json") for batch_id in reversed(script.batches)]
        return JSONResponse({"batches": found, "next_cursor": None})

    async def batch(request: Request) -> Response:
        return answer(script.batch(request.path_params["batch_id"]), 200)

    async def cancel_batch(request: Request) -> Response:
        for job_id in script.batches[request.path_params["batch_id"]]:
            if script.jobs[job_id].state not in ENDED:
                script.end(job_id, JobState.CANCELLED)
        return answer(script.batch(request.path_params["batch_id"]), 200)

    async def results(request: Request) -> Response:
        async def lines() -> AsyncIterator[bytes]:
            for index, job_id in enumerate(script.batches[request.path_params["batch_id"]]):
                if index == script.cut_results_after:
                    script.cut_results_after = None
                    raise ConnectionAbortedError
                now = script.jobs[job_id]
                line = BatchResult(index=index, job_id=job_id, state=now.state, clip=now.clip, error=now.error)
                yield line.model_dump_json().encode() + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def output(request: Request) -> Response:
        clip_id = request.path_params["clip_id"]
        script.look(job_id_of(clip_id))
        return Response(status_code=307, headers={"location": f"{script.base}/outputs/{clip_id}/again.mp4?signature=x"})

    async def file(request: Request) -> Response:
        clip_id, name = request.path_params["clip_id"], request.path_params["name"]
        assert "authorization" not in request.headers
        if clip_id in script.expired and name == "first.mp4":
            raise UrlExpired
        script.downloads[clip_id] += 1
        content = clip_bytes(job_id_of(clip_id))
        return Response(content[:-1] + b"!" if clip_id in script.damaged else content, media_type="video/mp4")

    async def models(request: Request) -> Response:
        return JSONResponse([RANDOM_WAN.model_dump(mode="json")])

    async def health(request: Request) -> Response:
        return answer(
            Health(
                status="ok",
                reason=None,
                model=ModelHealth(profile="wan-random", revision=None, loaded=True, dtype="float32", device="cpu"),
                gpu=None,
                queue=QueueHealth(waiting=1, running=2, capacity=3),
                storage=StorageHealth(kind="local", reachable=True),
                last_error=None,
                uptime_s=5.0,
                versions={},
            ),
            200,
        )

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, WanError)
        problem = error.problem(request_id="request-1")
        retry = {} if problem.retry_after_s is None else {"retry-after": str(problem.retry_after_s)}
        content = problem.model_dump(mode="json", exclude_none=True)
        return JSONResponse(content, problem.status, retry, PROBLEM_MEDIA_TYPE)

    app = Starlette(
        routes=[
            Route("/generate", generate, methods=["POST"]),
            Route("/jobs", jobs),
            Route("/jobs/{job_id}", delete, methods=["DELETE"]),
            Route("/jobs/{job_id}", job),
            Route("/jobs/{job_id}/events", events),
            Route("/jobs/{job_id}/cancel", cancel, methods=["POST"]),
            Route("/batches", make_batch, methods=["POST"]),
            Route("/batches", batches),
            Route("/batches/{batch_id}", batch),
            Route("/batches/{batch_id}/cancel", cancel_batch, methods=["POST"]),
            Route("/batches/{batch_id}/results", results),
            Route("/outputs/{clip_id}", output),
            Route("/outputs/{clip_id}/{name}", file),
            Route("/models", models),
            Route("/health", health),
            Route("/health/live", live),
        ],
        exception_handlers={WanError: on_error},
    )

    async def with_faults(scope: Scope, receive: Receive, send: Send) -> None:
        response = await refused(Request(scope)) if scope["type"] == "http" else None
        await (response or app)(scope, receive, send)

    async def refused(request: Request) -> Response | None:
        path = request.url.path
        script.asked.append((request.method, path))
        for fault in script.faults:
            if fault.times > 0 and re.fullmatch(fault.path, path) and request.method in fault.methods:
                fault.times -= 1
                await asyncio.sleep(fault.delay_s)
                headers = {} if fault.retry_after is None else {"retry-after": fault.retry_after}
                return Response(fault.body, fault.status, headers, fault.media_type)
        signed = re.fullmatch("/outputs/[^/]+/[^/]+", path) is not None
        open_to_all = script.api_key is None or signed or path == "/health/live"
        if not open_to_all and request.headers.get("authorization") != f"Bearer {script.api_key}":
            return await on_error(request, Unauthorized())
        return None

    return with_faults


def answer(model: Any, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(model.model_dump_json(), status, headers, "application/json")


class ScriptedService:
    """A script behind a real server on a port of its own; `stop` and `start` it as often as you like."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.script = Script(base=self.base)
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        config = uvicorn.Config(
            scripted_app(self.script), port=self.port, log_config=None, access_log=False, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(10)
            self._server = None


@contextlib.contextmanager
def scripted_service() -> Iterator[ScriptedService]:
    service = ScriptedService()
    service.start()
    yield service
    service.stop()
