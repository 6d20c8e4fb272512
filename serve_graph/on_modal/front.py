"""The front: what users call. It records jobs and reads them, has a platform run them, and wakes no GPU by itself.

It is the same application as the ingress of a graph, over the same store, with two other parts: calls instead of a
line, and what containers have said of themselves instead of handles.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cached_property

from fastapi import FastAPI

from schemas.errors import ModelNotReady
from schemas.handoff import PreparedPrompt, RenderEvent, RenderTask
from schemas.health import GeneratorHealth, GpuHealth
from schemas.requests import GenerationParameters
from serve_graph.assembly import Assembly
from serve_graph.instances import InstanceReport, Instances, Reporter
from serve_graph.jobs.platform import Platform
from serve_graph.metrics import merge, merge_instances, new_registry, snapshot
from serve_graph.settings import ConfigError, Settings, accepted_keys
from serve_graph.stores import prepared
from serve_graph.token_counting import TokenCounter

DEPLOYMENT = "Front"


class Front:
    """One process of it. `app` serves requests; `sweep` looks after what nobody works on.

    gpu: what containers will have, for as long as none is up.
    """

    def __init__(self, settings: Settings, platform: Platform, gpu: GpuHealth | None = None) -> None:
        if accepted_keys(settings) is None and settings.auth != "none":
            raise ConfigError("there are no API keys: make one with `wan-serve key new`, or set WAN_AUTH=none")
        settings = prepared(settings)
        self._registry = new_registry()
        self._assembly = Assembly(
            settings,
            _Elsewhere(settings, self._reports),
            exposition=self._exposition,
            registry=self._registry,
            platform=platform,
            gpu=gpu,
        )
        self._instances = Instances(self._assembly.store)
        self._reporter = Reporter(
            self._instances,
            self._assembly.executor,
            metrics=self._own_metrics,
            generator=None,
            interval_s=settings.queue.lease_s / 3,
        )

    def app(self) -> FastAPI:
        """The application."""
        return self._assembly.app(while_running=self._running)

    async def sweep(self, seconds: float) -> None:
        """Look after jobs, batches, webhooks and what is to be deleted, for so long.

        A lost owner is one whose record stays the same for the time of a lease, so `seconds` is several of these.
        """
        self._assembly.jobs.start()
        await self._assembly.jobs.tidy()
        await asyncio.sleep(seconds)
        await self._assembly.drain()

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        reporting = asyncio.create_task(self._reporter.run())
        yield
        await self._assembly.drain()
        reporting.cancel()
        await self._reporter.report(ended=True)

    async def _reports(self) -> list[InstanceReport]:
        return await asyncio.get_running_loop().run_in_executor(self._assembly.executor, self._instances.others)

    async def _own_metrics(self) -> bytes:
        return merge([(DEPLOYMENT, self._instances.own, snapshot(self._registry))])

    async def _exposition(self) -> bytes:
        pages = {report.instance: report.metrics for report in await self._reports()}
        return merge_instances({**pages, self._instances.own: (await self._own_metrics()).decode()})


class _Elsewhere:
    """The graph as this process sees it: by reports in the store, and by the tokeniser among the weights."""

    def __init__(self, settings: Settings, reports: Callable[[], Awaitable[list[InstanceReport]]]) -> None:
        self._settings = settings
        self._reports = reports

    async def check(self, parameters: GenerationParameters) -> None:
        """Raises PromptTooLong, for either text."""
        await asyncio.to_thread(lambda: self._tokens.check(parameters))

    async def prepare(self, parameters: GenerationParameters) -> PreparedPrompt:
        raise NotImplementedError("a front has no model")  # its jobs run in containers, so nothing asks

    def render(self, task: RenderTask, prompt: PreparedPrompt) -> AsyncGenerator[RenderEvent, None]:
        raise NotImplementedError("a front has no model")  # its jobs run in containers, so nothing asks

    async def health(self) -> GeneratorHealth:
        """Of a container that is up. Raises ModelNotReady where there is none."""
        for report in await self._reports():
            if report.generator is not None:
                return report.generator
        raise ModelNotReady("no container with the model is up; the next job starts one")

    @cached_property
    def _tokens(self) -> TokenCounter:
        from transformers import AutoTokenizer

        from serve_graph.engine.checkpoint_folder import locate_checkpoint

        settings, model = self._settings, self._settings.model
        found = locate_checkpoint(settings.profile, model.path, model.revision)
        tokenizer = AutoTokenizer.from_pretrained(found.folder / "tokenizer")
        return TokenCounter(tokenizer, settings.profile.max_sequence_length)
