"""Puts one process's service together: store, job service, health, API. Knows no Ray and no Modal."""

from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from schemas.health import GpuHealth
from serve_graph.api.app import create_api
from serve_graph.api.auth import Authenticator
from serve_graph.api.clip_files import SignedClips
from serve_graph.api.routes import Service
from serve_graph.health import GeneratorProbe, HealthMonitor
from serve_graph.jobs import JobService, Patiences, QueueLimits
from serve_graph.jobs.platform import Platform
from serve_graph.jobs.worker import Worker
from serve_graph.metrics import IngressMetrics, new_registry
from serve_graph.service_plan import ServicePlan, plan_for
from serve_graph.settings import Settings, accepted_keys, webhook_signer
from serve_graph.stores import open_signed_store
from serve_graph.webhooks.sender import WebhookSender
from storage.job_records import JobRecords
from storage.store import ObjectStore

STORE_THREADS = 16


class ServiceWorker(Worker, GeneratorProbe, Protocol):
    """The rest of the graph, as the job service and the health monitor see it."""


class Assembly:
    """Made where the environment's secrets are: in the process that serves.

    exposition: the metrics' page; by default this process's own. platform: see `JobService`.
    echo_request_id: whether nobody else puts the request's id on the answer.
    gpu: what the generator's will be, until it says so itself.
    """

    def __init__(
        self,
        settings: Settings,
        worker: ServiceWorker,
        *,
        exposition: Callable[[], Awaitable[bytes]],
        registry: CollectorRegistry | None = None,
        platform: Platform | None = None,
        echo_request_id: bool = True,
        gpu: GpuHealth | None = None,
    ) -> None:
        self._settings = settings
        self._exposition = exposition
        self._echo_request_id = echo_request_id
        self._authenticator = Authenticator(accepted_keys(settings), protect_monitoring=settings.protect_monitoring)
        self.metrics = IngressMetrics(registry or new_registry())
        self.executor = ThreadPoolExecutor(max_workers=STORE_THREADS, thread_name_prefix="wan-store")
        opened = open_signed_store(settings)
        self.store: ObjectStore = opened.store
        signer = webhook_signer()
        self._webhooks = None
        if signer is not None:
            policy = settings.webhooks.policy(can_sign=True)
            self._webhooks = WebhookSender(policy, signer, self.metrics, timeout=settings.webhooks.timeout)
        retention = settings.storage.job_retention
        self.jobs = JobService(
            profile=settings.profile,
            worker=worker,
            records=JobRecords(opened.store),
            presigner=opened.presigner,
            limits=QueueLimits(
                max_waiting_jobs=settings.queue.max_waiting_jobs,
                max_dispatched_jobs=settings.max_dispatched_jobs,
                max_clip_pixels=settings.engine.max_clip_pixels,
                policy=settings.queue.policy,
                max_stretch=settings.queue.max_stretch,
                max_batches=settings.queue.max_batches,
                by_call=settings.queue.by_call,
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
            metrics=self.metrics,
            executor=self.executor,
            clip_retention=settings.storage.clip_retention,
            webhook_policy=settings.webhooks.policy(can_sign=signer is not None),
            webhook_sender=self._webhooks,
            platform=platform,
            plan=ServicePlan(plan_for(settings), lambda: self._health.gpu or gpu),
        )
        self._health = HealthMonitor(
            settings, worker, opened.store, self.jobs, self.executor, on_demand=platform is not None
        )
        self._signed_clips = None if opened.local is None else SignedClips(opened.local, self.executor)

    def app(self, while_running: Callable[[], AbstractAsyncContextManager[None]] | None = None) -> FastAPI:
        """The application; its lifespan is that of this process's jobs, unless it is given another."""
        return create_api(
            Service(self.jobs, self._health, self._exposition),
            profile=self._settings.profile,
            metrics=self.metrics,
            max_body_bytes=self._settings.max_body_bytes,
            echo_request_id=self._echo_request_id,
            authenticator=self._authenticator,
            cors_origins=self._settings.cors_origins,
            signed_clips=self._signed_clips,
            clip_retention=self._settings.storage.clip_retention,
            max_wait_s=self._settings.max_wait_s,
            while_running=while_running or self._running,
        )

    async def drain(self) -> None:
        """Refuse new jobs and let the others end, within the configured limit."""
        self._health.draining = True
        await self.jobs.drain(self._settings.queue.drain_timeout_s)
        if self._webhooks is not None:
            self._webhooks.close()

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        self.jobs.start()
        yield
        await self.drain()
