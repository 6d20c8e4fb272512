"""The ingress deployment: the FastAPI application over the job service, wired to the other two deployments."""

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve_graph.assembly import Assembly
from serve_graph.logs import configure_logging
from serve_graph.metrics import merge, new_registry, snapshot
from serve_graph.niceness import step_back
from serve_graph.ray_worker import RayWorker
from serve_graph.settings import Settings


@serve.ingress()
class Ingress:
    """Builds its application on the replica, where the environment's secrets are."""

    def __init__(
        self, settings: Settings, preprocessor: DeploymentHandle[Any], generator: DeploymentHandle[Any]
    ) -> None:
        step_back()
        context = serve.get_replica_context()
        self._deployment, self._replica = context.deployment, context.replica_id.unique_id
        configure_logging(level=settings.log_level, deployment=self._deployment, replica=self._replica)
        self._worker = RayWorker(preprocessor, generator)
        self._registry = new_registry()
        self._assembly = Assembly(
            settings,
            self._worker,
            exposition=self._exposition,
            registry=self._registry,
            echo_request_id=False,  # Serve's proxy does, see serve_graph.proxy
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:  # Serve's name for it
        """The application, built once per replica."""
        return self._assembly.app()

    async def _exposition(self) -> bytes:
        own = (self._deployment, self._replica, snapshot(self._registry))
        return merge([own, *await self._worker.snapshots()])

    async def drain(self) -> None:
        """Refuse new jobs and let the others end, within the configured limit."""
        await self._assembly.drain()


def ingress_options(settings: Settings) -> dict[str, Any]:
    """Serve's options. Room for every waiting client, and for health, metrics and downloads beside them."""
    return {
        "name": "Ingress",
        "max_ongoing_requests": settings.queue.max_waiting_jobs + settings.max_dispatched_jobs + 512,
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": settings.queue.drain_timeout_s + 10,
    }
