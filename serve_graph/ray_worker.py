"""The graph's deployments behind their Serve handles, as the job service, the monitor and a scrape see them.

Errors of our tree cross a handle as they are; what Ray itself raises becomes one of ours here.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from prometheus_client import Metric
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from schemas.errors import InternalError, ModelNotReady, WanError, WorkerLost
from schemas.handoff import PreparedPrompt, RenderEvent, RenderTask
from schemas.health import GeneratorHealth
from schemas.requests import GenerationParameters
from serve_graph.logs import log_failure

T = TypeVar("T")

HEALTH_TIMEOUT_S = 5.0
"""A dead replica is told at once; this is for one that hangs, and a busy machine may take seconds for an answer."""

SNAPSHOT_TIMEOUT_S = 2.0

Snapshots = list[tuple[str, str, list[Metric]]]


class RayWorker:
    """Implements `serve_graph.jobs.Worker` and `serve_graph.health.GeneratorProbe` over two handles.

    ingress: the caller's own deployment, whose replicas are part of a scrape.
    """

    def __init__(
        self,
        preprocessor: DeploymentHandle[Any],
        generator: DeploymentHandle[Any],
        ingress: DeploymentHandle[Any] | None = None,
    ) -> None:
        self._preprocessor = preprocessor
        self._generator = generator
        self._scraped = [handle for handle in (ingress, preprocessor, generator) if handle is not None]

    async def check(self, parameters: GenerationParameters) -> None:
        """Count both texts' tokens. Raises PromptTooLong."""
        async with _our_errors():
            await self._preprocessor.check.remote(parameters)

    async def prepare(self, parameters: GenerationParameters) -> PreparedPrompt:
        """Encode both texts."""
        async with _our_errors():
            prepared: PreparedPrompt = await self._preprocessor.prepare.remote(parameters)
            return prepared

    async def render(self, task: RenderTask, prompt: PreparedPrompt) -> AsyncGenerator[RenderEvent, None]:
        """Stream one clip's events; closing it cancels the work in the generator."""
        async with _our_errors():
            response: Any = self._generator.options(stream=True).render.remote(task, prompt)
            try:
                async for event in response:
                    yield event
            finally:
                response.cancel()

    async def health(self) -> GeneratorHealth:
        """Ask both deployments. Raises ModelNotReady when one does not answer in time."""
        try:
            async with _our_errors(), asyncio.timeout(HEALTH_TIMEOUT_S):
                generator, _ = await asyncio.gather(
                    _result(self._generator.health.remote()), _result(self._preprocessor.health.remote())
                )
                health: GeneratorHealth = generator
                return health
        except TimeoutError as error:
            raise ModelNotReady("the model is loading, or its process is being replaced") from error

    async def snapshots(self) -> Snapshots:
        """Every replica's metrics; a replica that fails is left out of this scrape.

        So is a whole deployment, when it has no replica or one that doesn't answer in time: Serve's broadcast
        has one time limit for all of its replicas and hands out nothing when it passes.
        """
        found = await asyncio.gather(*map(_snapshots_of, self._scraped))
        return [part for replicas in found for part in replicas]


async def _snapshots_of(handle: DeploymentHandle[Any]) -> Snapshots:
    try:
        found = await handle.broadcast("metrics_snapshot").results_async(
            timeout_s=SNAPSHOT_TIMEOUT_S, return_exceptions=True
        )
    except (TimeoutError, RayError, RayServeException):
        return []
    return [part for part in found if not isinstance(part, BaseException)]


async def _result(response: Awaitable[T]) -> T:
    return await response


@asynccontextmanager
async def _our_errors() -> AsyncIterator[None]:
    try:
        yield
    except BackPressureError as error:
        raise ModelNotReady("the model has more calls waiting than it takes") from error
    except DeploymentUnavailableError as error:
        raise ModelNotReady("the model's deployment is not healthy") from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, WanError):
            raise cause from None
        log_failure("worker_failed", error)
        raise InternalError from error
    except (RayError, RayServeException) as error:
        raise WorkerLost("the process that worked on this went away; send the request again", 1) from error
