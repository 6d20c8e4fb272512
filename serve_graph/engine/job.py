"""One job inside the engine: what it was asked, how far it is and whom it tells."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from schemas.errors import WanError
from schemas.handoff import PreparedPrompt, Standing, Started
from schemas.jobs import Progress
from schemas.loras import AppliedLora
from schemas.presets import Effort, Levers
from schemas.requests import GenerationParameters
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.decode import Decoding
from serve_graph.engine.denoise import Denoising
from serve_graph.scheduling import Turn, Work, work_of


class FrameSink(Protocol):
    """Takes a job's frames as they are decoded."""

    def write(self, frames: npt.NDArray[np.uint8]) -> None:
        """Take (t, H, W, 3) uint8 RGB. May block for back-pressure. Raises WanError, which fails the job."""
        ...


@dataclass(frozen=True)
class Denoised:
    """Denoising ended. latents: (1, C, T, H, W) float32, still on the device."""

    latents: torch.Tensor


@dataclass(frozen=True)
class Finished:
    """Every frame went into the sink. Seconds of the two stages: wall time, and the device's for this job alone."""

    denoise_s: float
    decode_s: float
    denoise_device_s: float
    decode_device_s: float
    effort: Effort


@dataclass(frozen=True)
class Failed:
    """The job ended without all of its frames; JobCancelled when that was asked for."""

    error: WanError


EngineEvent = Started | Progress | Denoised | Finished | Failed
"""A job's events end with exactly one `Finished` or `Failed`."""


class EngineJob:
    """A job from submission to its last event. Only the device thread touches it after submission.

    notify: called on the device thread for every event; it must be quick and must not raise.
    turn, remaining_s: what `scheduling.order` needs; the engine sets the one and keeps the other up to date.
    """

    def __init__(
        self,
        job_id: str,
        parameters: GenerationParameters,
        prompt: PreparedPrompt,
        sink: FrameSink,
        notify: Callable[[EngineEvent], None],
        standing: Standing = Standing(),  # noqa: B008  # frozen
    ) -> None:
        self.job_id = job_id
        self.parameters = parameters
        self.sink = sink
        self.notify = notify
        self.standing = standing
        self.turn: Turn
        self.work = work_of(parameters)
        self.remaining_s = 0.0
        self.cancelled = False
        self.suspect = False
        self.num_tokens = 0
        self.denoise_s = 0.0
        self.denoise_device_s = 0.0
        self.decode_device_s = 0.0
        self._prompt: PreparedPrompt | None = prompt
        self._denoising: Denoising | None = None
        self._decoding: Decoding | None = None
        self._phase_began = 0.0
        self._effort: Effort | None = None

    @property
    def company(self) -> tuple[tuple[int, int, int], Levers, tuple[AppliedLora, ...]]:
        """What must agree for two jobs to share a forward: shape, the levers that change one, adapters and weights."""
        return self.work.shape, self.parameters.levers.of_a_forward, self.parameters.loras

    @property
    def travels_alone(self) -> bool:
        return self.parameters.reproducible or self.suspect

    @property
    def is_decoding(self) -> bool:
        return self._decoding is not None

    @property
    def has_open_decode(self) -> bool:
        """Whether features of decoded frames are kept for the next."""
        return self._decoding is not None and self._decoding.chunk > 0

    @property
    def denoising(self) -> Denoising:
        if self._denoising is None:
            raise RuntimeError("the job is not denoising")
        return self._denoising

    @property
    def decoding(self) -> Decoding:
        if self._decoding is None:
            raise RuntimeError("the job is not decoding")
        return self._decoding

    def begin(self, parts: GeneratorParts, text_length: int) -> None:
        """Draw the noise and set up the scheduler."""
        if self._prompt is None:
            raise RuntimeError("the job began already")
        self._denoising = Denoising(parts, self.parameters, self._prompt, text_length)
        self._prompt = None
        shape = self._denoising.latents.shape[2:]
        self.num_tokens = prod(n // p for n, p in zip(shape, parts.transformer.config.patch_size, strict=True))
        if self.parameters.levers.batched_guidance and self.parameters.does_guidance:
            self.num_tokens *= 2  # both of a guided step's forwards are one
        self._phase_began = time.monotonic()

    def begin_decoding(self, parts: GeneratorParts) -> None:
        """Leave the denoising state behind and set up the decode."""
        latents = self.denoising.latents
        self._effort = self.denoising.effort
        self.denoise_s = self._phase_seconds()
        self.notify(Denoised(latents))
        vae = parts.vae_for(self.parameters.levers)
        self._decoding = Decoding(vae, latents, may_tile=not self.parameters.reproducible)
        self._denoising = None

    def finish(self) -> None:
        """Tell that all frames are out."""
        if self._effort is None:
            raise RuntimeError("the job was not denoised")
        seconds = (self.denoise_s, self._phase_seconds(), self.denoise_device_s, self.decode_device_s)
        self.notify(Finished(*seconds, self._effort))

    def let_go(self) -> None:
        """Give up the tensors of a job that has ended early, however long somebody keeps the job itself."""
        self._prompt = self._denoising = self._decoding = None

    @property
    def steps_done(self) -> int:
        """Denoising steps taken so far: what is wasted when the job ends without a clip."""
        if self._denoising is not None:
            return self._denoising.step
        return self.parameters.num_inference_steps if self._decoding is not None else 0

    @property
    def work_left(self) -> Work:
        """The forwards and chunks that are left."""
        if self._decoding is not None:
            return self.work._replace(forwards=0, chunks=self._decoding.num_chunks - self._decoding.chunk)
        if self._denoising is not None:
            return self.work._replace(forwards=self._denoising.forwards_left)
        return self.work

    def _phase_seconds(self) -> float:
        now = time.monotonic()
        seconds, self._phase_began = now - self._phase_began, now
        return seconds
