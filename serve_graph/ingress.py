"""The ingress deployment: the FastAPI application over the job service, wired to the other two deployments."""

import asyncio
from typing import Any

from prometheus_client import Metric
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from schemas.errors import ModelNotReady
from serve_graph.assembly import Assembly
from serve_graph.instances import Instances, Reporter
from serve_graph.logs import configure_logging
from serve_graph.metrics import merge, new_registry, snapshot
from serve_graph.niceness import step_back
from serve_graph.ray_worker import RayWorker
from serve_graph.renewal import renew_process
from serve_graph.settings import Settings, StorageSettings, check_cluster


@serve.ingress()
class Ingress:
    """Builds its application on the replica, where the environment's secrets are.

    With `queue.by_call` that happens in `awaken`, after the memory snapshot; until then all requests get a 503.
    """

    def __init__(
        self, settings: Settings, preprocessor: DeploymentHandle[Any], generator: DeploymentHandle[Any]
    ) -> None:
        step_back()
        check_cluster(settings)  # this machine's environment need not be that of the one where the graph was built
        context = serve.get_replica_context()
        self._deployment, self._replica = context.deployment, context.replica_id.unique_id
        configure_logging(level=settings.log_level, deployment=self._deployment, replica=self._replica)
        others = serve.get_deployment_handle(self._deployment, context.app_name)
        self._worker = RayWorker(preprocessor, generator, others)
        self._registry = new_registry()
        self._settings = settings
        self._app: ASGIApp | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._assembly = None if settings.queue.by_call else self._assemble()

    def _assemble(self) -> Assembly:
        return Assembly(
            self._settings,
            self._worker,
            exposition=self._exposition,
            registry=self._registry,
            echo_request_id=False,  # Serve's proxy does, see serve_graph.proxy
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:  # Serve's name for it
        """The application, built once per replica."""
        if self._assembly is not None:
            return self._assembly.app()

        async def dormant(scope: Scope, receive: Receive, send: Send) -> None:  # a function: uvicorn knows no methods
            await self._dormant(scope, receive, send)

        return dormant

    async def _dormant(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for event in ("startup", "shutdown"):
                await receive()
                if event == "shutdown":
                    await self.drain()
                await send({"type": f"lifespan.{event}.complete"})
        elif self._app is None:
            await PlainTextResponse("the service is not awake yet", 503)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def awaken(self, environment: dict[str, str], storage: StorageSettings, start: str) -> None:
        """Begin to serve, with these variables in the environment. start: how the graph came up, for the metrics."""
        renew_process(environment)
        self._settings = self._settings.model_copy(update={"storage": storage})
        self._assembly = self._assemble()
        self._assembly.metrics.container_started(start)
        self._app = self._assembly.app()
        self._assembly.jobs.start()
        self._reporter = Reporter(
            Instances(self._assembly.store),
            self._assembly.executor,
            metrics=self._exposition,
            generator=self._worker.health,
            interval_s=self._settings.queue.lease_s / 3,
        )
        self._reporting = asyncio.create_task(self._reporter.run())

    def is_awake(self) -> bool:
        """Whether it serves: with `queue.by_call`, after `awaken`."""
        return self._assembly is not None

    async def work_on(self, work_id: str) -> None:
        """See `JobService.work_on`."""
        if self._assembly is None:
            raise ModelNotReady("the service is not awake yet")
        await self._assembly.jobs.work_on(work_id)

    async def metrics_snapshot(self) -> tuple[str, str, list[Metric]]:
        """This replica's metrics: (deployment, replica, families)."""
        return self._deployment, self._replica, snapshot(self._registry)

    async def _exposition(self) -> bytes:
        """Whichever replica is scraped tells of all; its own part never waits for the others."""
        own = await self.metrics_snapshot()
        others = [part for part in await self._worker.snapshots() if part[:2] != own[:2]]
        return merge([own, *others])

    async def drain(self) -> None:
        """Refuse new jobs and let the others end, within the configured limit."""
        if self._assembly is not None:
            await self._assembly.drain()
        if self._reporting is not None:
            self._reporting.cancel()
            self._reporting = None
            await self._reporter.report(ended=True)


def ingress_options(settings: Settings) -> dict[str, Any]:
    """Serve's options. Room for every waiting client, and for health, metrics and downloads beside them."""
    return {
        "name": "Ingress",
        "max_ongoing_requests": settings.queue.max_waiting_jobs + settings.max_dispatched_jobs + 512,
        "ray_actor_options": {"num_cpus": 0},
        "health_check_period_s": 2,  # by it Serve sees that one has died; by default after up to 10 s
        "graceful_shutdown_timeout_s": settings.queue.drain_timeout_s + 10,
    }
