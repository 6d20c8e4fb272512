"""The two contenders without a service: diffusers' `WanPipeline` and our engine, each alone in its process.

Both are loaded once and make the same clips from the same requests; `number` names one, see `workload.request`.
Neither knows what it is measured against.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.utils import logging as diffusers_logging

from benchmarks.stock import stock_arguments
from benchmarks.workload import Block, closed_loop, request
from schemas.handoff import PreparedPrompt, RenderEvent, RenderTask, TextItem
from schemas.jobs import RenderedClip, clip_id_of, new_job_id
from schemas.presets import Effort
from schemas.requests import GenerateRequest, GenerationParameters
from serve_graph.encode import X264_PARAMS
from serve_graph.engine.checkpoint import GeneratorParts, load_generator_parts
from serve_graph.engine.checkpoint_folder import locate_checkpoint
from serve_graph.engine.job import Denoised, EngineEvent, EngineJob, Failed, Finished
from serve_graph.engine.loop import Engine, EngineLimits
from serve_graph.engine.text_checkpoint import load_text_parts
from serve_graph.metrics import GeneratorMetrics, PreprocessorMetrics, new_registry
from serve_graph.render import Renderer
from serve_graph.settings import Settings
from serve_graph.stores import open_store
from serve_graph.text_encoding import TextEncoder
from storage.keys import clip_key

Frames = npt.NDArray[np.uint8]
Asked = Callable[[int], GenerateRequest]
"""The request with a number; a function of a module, since it goes through a pipe."""

_CPU = torch.device("cpu")


class Stock:
    """`WanPipeline.__call__`, and its frames written to an MP4 file after it has returned."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.engine.num_threads)
        diffusers_logging.disable_progress_bar()
        self._settings = settings
        checkpoint = locate_checkpoint(settings.profile, None, None).folder
        self._folder = settings.data_dir / "stock"
        self._folder.mkdir(parents=True)
        self._pipeline = WanPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, disable_mmap=True)
        self._pipeline.set_progress_bar_config(disable=True)
        flow_shift = settings.profile.defaults.flow_shift
        self._pipeline.scheduler = UniPCMultistepScheduler.from_config(
            self._pipeline.scheduler.config, flow_shift=flow_shift
        )

    def frames(self, number: int) -> Frames:
        """One clip's frames, for comparison. (T, H, W, 3) uint8 RGB."""
        return self.frames_of(self._settings.profile.resolve(request(number)))

    def frames_of(self, parameters: GenerationParameters) -> Frames:
        """The same of any request."""
        return (self._images(parameters) * 255).round().astype(np.uint8)

    def clip(self, number: int) -> float:
        """Make one clip. Returns the seconds from its prompt to its MP4."""
        parameters = self._settings.profile.resolve(request(number))
        began = time.perf_counter()
        self._write(self.frames_of(parameters), parameters, self._folder / f"{number}.mp4")
        return time.perf_counter() - began

    def _images(self, parameters: GenerationParameters) -> npt.NDArray[np.float32]:
        """(T, H, W, 3) in [0, 1]."""
        images: npt.NDArray[np.float32] = self._pipeline(
            **stock_arguments(parameters, self._settings.profile.max_sequence_length),
            output_type="np",
        ).frames[0]
        return images

    def _write(self, frames: Frames, parameters: GenerationParameters, path: Path) -> None:
        """The codec settings of `serve_graph.encode`, in the fewest calls that PyAV needs for them."""
        encode = self._settings.encode
        options = {"crf": str(encode.crf), "preset": encode.preset, "x264-params": X264_PARAMS}
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=parameters.fps, options=options)
            stream.width, stream.height, stream.pix_fmt = parameters.width, parameters.height, "yuv420p"
            context = stream.codec_context
            context.thread_count = encode.num_threads
            context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))


class BareEngine:
    """The text encoder, the engine and the renderer as their deployments put them together, without Ray and HTTP.

    A clip ends in the store, as the service's do. tuning: done to the model before its first clip.
    """

    def __init__(self, settings: Settings, tuning: Callable[[GeneratorParts], None] = lambda parts: None) -> None:
        torch.set_num_threads(settings.engine.num_threads)
        self._settings = settings
        self._profile = settings.profile
        folder = locate_checkpoint(self._profile, None, None).folder
        parts = load_generator_parts(folder, _CPU, "float32", "float32", presets=self._profile.presets.values())
        tuning(parts)
        self._text_encoder = TextEncoder(
            load_text_parts(folder, _CPU, "float32", int8_weights=settings.text.int8_weights),
            self._profile.max_sequence_length,
            settings.text.cache_bytes,
            PreprocessorMetrics(new_registry()),
        )
        self._text_encoder.encode([TextItem(self._profile.defaults.negative_prompt, solo=True)])
        self._text_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wan-text")
        self._encode_threads = ThreadPoolExecutor(2 * settings.max_dispatched_jobs, thread_name_prefix="wan-encode")
        metrics = GeneratorMetrics(new_registry())
        engine = settings.engine
        limits = EngineLimits(engine.max_jobs_in_flight, engine.max_batch_tokens, self._profile.max_sequence_length)
        self._engine = Engine(parts, limits, metrics)
        self._renderer = Renderer(
            self._engine,
            open_store(settings),
            model=self._profile.name,
            spool=settings.spool_dir,
            encode=settings.encode,
            executor=self._encode_threads,
            metrics=metrics,
            patience_s=settings.storage.patience_s,
        )
        self._loop = asyncio.Runner()

    def frames(self, number: int) -> Frames:
        """One clip's frames, for comparison. (T, H, W, 3) uint8 RGB."""
        return self.outcome_of(self._profile.resolve(request(number))).frames

    def outcome_of(self, parameters: GenerationParameters) -> "Outcome":
        """What any request gives, for comparison; nothing is stored."""
        prompt = self._loop.run(self._prepare(parameters))
        collector = _Collector()
        self._engine.submit(EngineJob(new_job_id(), parameters, prompt, collector, collector.notify))
        return collector.outcome.result()

    def clip(self, number: int, asked: Asked = request) -> tuple[float, RenderedClip]:
        """Make one clip. Returns the seconds from its prompt to its object in the store, and what it is."""
        return self.clip_of(self._profile.resolve(asked(number)))

    def clip_of(self, parameters: GenerationParameters) -> tuple[float, RenderedClip]:
        """The same of any request."""
        began = time.perf_counter()
        rendered = self._loop.run(self._render_of(parameters))
        return time.perf_counter() - began, rendered

    def block(self, first: int, num_timed: int, asked: Asked = request) -> Block:
        """A closed loop, see `workload.closed_loop`."""
        return self._loop.run(closed_loop(partial(self._render, asked=asked), first, num_timed=num_timed))

    async def _prepare(self, parameters: GenerationParameters) -> PreparedPrompt:
        items = [TextItem(text, solo=False) for text in (parameters.prompt, parameters.negative_prompt)]
        loop = asyncio.get_running_loop()
        positive, negative = await loop.run_in_executor(self._text_thread, self._text_encoder.encode, items)
        return PreparedPrompt(positive, negative)

    async def _render(self, number: int, asked: Asked = request) -> RenderedClip:
        return await self._render_of(self._profile.resolve(asked(number)))

    async def _render_of(self, parameters: GenerationParameters) -> RenderedClip:
        job_id = new_job_id()
        task = RenderTask(job_id, job_id, clip_key(clip_id_of(job_id), "bench"), parameters)
        events: AsyncGenerator[RenderEvent, None] = self._renderer.render(task, await self._prepare(parameters))
        async with aclosing(events):
            async for event in events:
                if isinstance(event, RenderedClip):
                    return event
        raise RuntimeError("the renderer ended without a clip")


@dataclass(frozen=True)
class Outcome:
    """latents: (1, C, T, H, W) float32. frames: (T, H, W, 3) uint8 RGB."""

    latents: torch.Tensor
    frames: Frames
    effort: Effort


class _Collector:
    """Keeps what one engine job gives."""

    def __init__(self) -> None:
        self.outcome: Future[Outcome] = Future()
        self._chunks: list[Frames] = []
        self._latents: torch.Tensor | None = None

    def write(self, frames: Frames) -> None:
        self._chunks.append(frames)

    def notify(self, event: EngineEvent) -> None:
        if isinstance(event, Denoised):
            self._latents = event.latents
        elif isinstance(event, Failed):
            self.outcome.set_exception(event.error)
        elif isinstance(event, Finished) and self._latents is not None:
            self.outcome.set_result(Outcome(self._latents, np.concatenate(self._chunks), event.effort))
