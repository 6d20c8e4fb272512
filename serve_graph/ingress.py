"""The ingress deployment: the FastAPI application over the job service, wired to the other two deployments."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import Metric
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_graph.api.app import create_api
from serve_graph.api.auth import Authenticator
from serve_graph.api.clip_files import SignedClips
from serve_graph.api.routes import Service
from serve_graph.health import HealthMonitor
from serve_graph.jobs import JobService, Patiences, QueueLimits
from serve_graph.logs import configure_logging
from serve_graph.metrics import IngressMetrics, merge, new_registry, snapshot
from serve_graph.niceness import step_back
from serve_graph.ray_worker import RayWorker
from serve_graph.settings import Settings, accepted_keys, check_cluster, webhook_signer
from serve_graph.stores import open_signed_store
from serve_graph.webhooks.sender import WebhookSender
from storage.job_records import JobRecords

STORE_THREADS = 16


@serve.ingress()
class Ingress:
    """Builds its application on the replica, where the environment's secrets are."""

    def __init__(
        self, settings: Settings, preprocessor: DeploymentHandle[Any], generator: DeploymentHandle[Any]
    ) -> None:
        step_back()
        check_cluster(settings)  # this machine's environment need not be that of the one where the graph was built
        context = serve.get_replica_context()
        self._deployment, self._replica = context.deployment, context.replica_id.unique_id
        configure_logging(level=settings.log_level, deployment=self._deployment, replica=self._replica)
        self._settings = settings
        self._authenticator = Authenticator(accepted_keys(settings), protect_monitoring=settings.protect_monitoring)
        others = serve.get_deployment_handle(self._deployment, context.app_name)
        self._worker = RayWorker(preprocessor, generator, others)
        self._registry = new_registry()
        self._metrics = IngressMetrics(self._registry)
        executor = ThreadPoolExecutor(max_workers=STORE_THREADS, thread_name_prefix="wan-store")
        opened = open_signed_store(settings)
        signer = webhook_signer()
        self._webhooks = None
        if signer is not None:
            policy = settings.webhooks.policy(can_sign=True)
            self._webhooks = WebhookSender(policy, signer, self._metrics, timeout=settings.webhooks.timeout)
        retention = settings.storage.job_retention
        self._jobs = JobService(
            profile=settings.profile,
            worker=self._worker,
            records=JobRecords(opened.store),
            presigner=opened.presigner,
            limits=QueueLimits(
                max_waiting_jobs=settings.queue.max_waiting_jobs,
                max_dispatched_jobs=settings.max_dispatched_jobs,
                max_clip_pixels=settings.engine.max_clip_pixels,
                policy=settings.queue.policy,
                max_stretch=settings.queue.max_stretch,
                max_batches=settings.queue.max_batches,
            ),
            patiences=Patiences(
                worker_s=settings.queue.worker_patience_s,
                store_s=settings.storage.patience_s,
                lease_s=settings.queue.lease_s,
                stall_s=settings.engine.hang_timeout_s + settings.queue.worker_patience_s,
                run_s=settings.queue.max_run_time_s,
                kept_s=None if retention is None else retention.total_seconds(),
            ),
            default_url_ttl=settings.default_url_ttl,
            hash_secret=opened.hash_secret,
            metrics=self._metrics,
            executor=executor,
            clip_retention=settings.storage.clip_retention,
            webhook_policy=settings.webhooks.policy(can_sign=signer is not None),
            webhook_sender=self._webhooks,
        )
        self._health = HealthMonitor(settings, self._worker, opened.store, self._jobs, executor)
        self._signed_clips = None if opened.local is None else SignedClips(opened.local, executor)

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's name for it
        """The application, built once per replica."""
        return create_api(
            Service(self._jobs, self._health, self._exposition),
            profile=self._settings.profile,
            metrics=self._metrics,
            max_body_bytes=self._settings.max_body_bytes,
            echo_request_id=False,  # Serve's proxy does, see serve_graph.proxy
            authenticator=self._authenticator,
            cors_origins=self._settings.cors_origins,
            signed_clips=self._signed_clips,
            clip_retention=self._settings.storage.clip_retention,
            while_running=self._running,
        )

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
        self._health.draining = True
        await self._jobs.drain(self._settings.queue.drain_timeout_s)
        if self._webhooks is not None:
            self._webhooks.close()

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        self._jobs.start()
        yield
        await self.drain()


def ingress_options(settings: Settings) -> dict[str, Any]:
    """Serve's options. Room for every waiting client, and for health, metrics and downloads beside them."""
    return {
        "name": "Ingress",
        "max_ongoing_requests": settings.queue.max_waiting_jobs + settings.max_dispatched_jobs + 512,
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": settings.queue.drain_timeout_s + 10,
    }
