"""What is known of the service's health, asked for at most once a second. Knows nothing of Ray or HTTP."""

import asyncio
import platform
import time
from concurrent.futures import Executor
from importlib.metadata import version
from typing import Protocol

from schemas.errors import ModelNotReady, ShuttingDown, StoreUnavailable, WanError
from schemas.health import GeneratorHealth, GpuHealth, Health, LastError, ModelHealth, QueueHealth, StorageHealth
from serve_graph import __version__
from serve_graph.settings import Settings
from storage.store import ObjectStore

MAX_AGE_S = 1.0
STORE_TIMEOUT_S = 5.0
_PACKAGES = ("ray", "torch", "diffusers", "transformers")


class GeneratorProbe(Protocol):
    """Asks the generator how it is."""

    async def health(self) -> GeneratorHealth:
        """Raises WanError when the generator or the preprocessor does not answer in time."""


class JobsProbe(Protocol):
    """What the job service knows of itself."""

    @property
    def last_error(self) -> LastError | None:
        """The last failure that was not the request's."""

    def queue(self) -> QueueHealth:
        """How full it is."""


class HealthMonitor:
    """Probes the generator and the store, together and at most once a second however many ask.

    on_demand: the model is loaded where and when there is work, so that a service without one is ready, too.
    """

    def __init__(
        self,
        settings: Settings,
        probe: GeneratorProbe,
        store: ObjectStore,
        jobs: JobsProbe,
        executor: Executor,
        *,
        on_demand: bool = False,
    ) -> None:
        self._on_demand = on_demand
        self._settings = settings
        self._probe = probe
        self._store = store
        self._jobs = jobs
        self._executor = executor
        self._began = time.monotonic()
        self._lock = asyncio.Lock()
        self._probed_at = float("-inf")
        self._generator: GeneratorHealth | None = None
        self._problem: WanError | None = None
        self._store_problem: WanError | None = None
        self._store_check: asyncio.Future[None] | None = None
        self._versions = {"python": platform.python_version(), "wan-serve": __version__} | {
            name: version(name) for name in _PACKAGES
        }
        self.draining = False

    async def require_ready(self) -> None:
        """Raises ShuttingDown, ModelNotReady or StoreUnavailable: why the service can't render now."""
        await self._refresh()
        problem = self._reason()
        if problem is not None:
            raise problem

    @property
    def gpu(self) -> GpuHealth | None:
        """The generator's GPU, as of the last look; None where it has none, or has not said so yet."""
        return self._generator.gpu if self._generator is not None else None

    async def health(self) -> Health:
        """Everything that is known, ready or not."""
        await self._refresh()
        problem = self._reason()
        model = self._settings.model
        unloaded = ModelHealth(
            profile=model.profile.name, revision=model.revision, loaded=False, dtype=None, device=None
        )
        generator = self._generator
        return Health(
            status="ok" if problem is None else "unavailable",
            reason=problem.detail if problem is not None else None,
            model=generator.model if generator is not None else unloaded,
            gpu=generator.gpu if generator is not None else None,
            queue=self._jobs.queue(),
            storage=StorageHealth(kind=self._store.kind, reachable=self._store_problem is None),
            last_error=self._jobs.last_error,
            uptime_s=round(time.monotonic() - self._began, 3),
            versions=self._versions,
        )

    def _reason(self) -> WanError | None:
        if self.draining:
            return ShuttingDown("the service is shutting down")
        return self._problem or self._store_problem

    async def _refresh(self) -> None:
        async with self._lock:
            if time.monotonic() - self._probed_at < MAX_AGE_S:
                return
            await asyncio.gather(self._probe_generator(), self._probe_store())
            self._probed_at = time.monotonic()

    async def _probe_generator(self) -> None:
        try:
            self._generator = await self._probe.health()
            self._problem = None if self._generator.model.loaded else ModelNotReady("the model is loading")
        except WanError as error:
            self._generator, self._problem = None, error
        if self._on_demand:
            self._problem = None

    async def _probe_store(self) -> None:
        """A check that hangs holds one thread of the pool, not one more with each refresh."""
        if self._store_check is None or self._store_check.done():
            self._store_check = asyncio.get_running_loop().run_in_executor(self._executor, self._store.check)
        done, _ = await asyncio.wait([self._store_check], timeout=STORE_TIMEOUT_S)
        if not done:
            self._store_problem = StoreUnavailable(f"the store has not answered for {STORE_TIMEOUT_S:g} s")
            return
        failure = self._store_check.exception()
        if failure is not None and not isinstance(failure, WanError):
            raise failure
        self._store_problem = failure
