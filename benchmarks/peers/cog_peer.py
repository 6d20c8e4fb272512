"""cog's runner, served by its own HTTP server. It has no batching; its counterpart is concurrency with an async `run`.

A cancelled prediction, and one whose client has gone, raises `CancelledError` here; the thread is told to stop.
"""

import asyncio
import threading

import cog
from cog import BaseRunner, Input

from benchmarks.peers.pipeline import Asked, Pipeline

MAX_CONCURRENCY = 64
"""Predictions that it takes at once; beyond it there is a 409. `cog build` puts it into the image's environment."""


class Runner(BaseRunner):
    async def setup(self) -> None:
        self.pipeline, self.device = Pipeline(), asyncio.Lock()

    @cog.concurrent(max=MAX_CONCURRENCY)
    async def run(
        self,
        prompt: str = Input(description="What the clip shows"),
        seed: int = Input(description="Of the first noise"),
        num_inference_steps: int = Input(description="Denoising steps", default=12),
    ) -> cog.Path:
        stop = threading.Event()
        async with self.device:
            making = asyncio.create_task(
                asyncio.to_thread(self.pipeline.clips, [Asked(prompt, seed, num_inference_steps)], stop)
            )
            try:
                (path,) = await asyncio.shield(making)
            except asyncio.CancelledError:
                stop.set()
                await asyncio.wait([making])  # the pipeline is free only when its thread is done
                raise
        return cog.Path(path)
