"""Plain FastAPI: a `def` route, which FastAPI runs on its thread pool, and a lock around the one pipeline.

FastAPI has no batching. A `def` route learns nothing of a client that went away, and its documentation offers nothing.
"""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from benchmarks.peers.pipeline import Asked, Pipeline, taken


class Body(BaseModel):
    prompt: str
    seed: int
    num_inference_steps: int


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.pipeline, app.state.device = Pipeline(), threading.Lock()
    yield


app = FastAPI(lifespan=_lifespan)


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/generate", response_class=Response)
def generate(request: Request, body: Body) -> Response:
    with request.app.state.device:
        (path,) = request.app.state.pipeline.clips([Asked(body.prompt, body.seed, body.num_inference_steps)])
    return Response(taken(path), media_type="video/mp4")
