"""What every peer serves: diffusers' `WanPipeline`, one prompt or several in a call, and an MP4 for each.

Runs in a peer's worker process. Knows nothing of servers.
"""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.utils import logging as diffusers_logging

from benchmarks.peers import worker_files
from schemas.official_profiles import WAN_TINY
from serve_graph.encode import Mp4Writer
from serve_graph.settings import EncodeSettings


@dataclass(frozen=True)
class Asked:
    """One clip. The seed is its number in the benchmark, so it also names the clip."""

    prompt: str
    seed: int
    num_inference_steps: int


class Pipeline:
    """One pipeline on one device. Not re-entrant, as diffusers' isn't: the scheduler is the pipeline's."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        diffusers_logging.disable_progress_bar()
        self._folder = Path(os.environ[worker_files.FOLDER_VARIABLE])
        (self._folder / worker_files.WORKER_FILE).write_text(str(os.getpid()))
        self._steps = (self._folder / worker_files.STEPS_FILE).open("ab", buffering=0)
        self._pipeline = WanPipeline.from_pretrained(
            os.environ[worker_files.CHECKPOINT_VARIABLE], torch_dtype=torch.float32, disable_mmap=True
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._pipeline.scheduler = UniPCMultistepScheduler.from_config(
            self._pipeline.scheduler.config, flow_shift=WAN_TINY.defaults.flow_shift
        )

    def clips(self, asked: Sequence[Asked], stop: threading.Event | None = None) -> list[Path]:
        """MP4 files, one for each; all in one call of the pipeline, so with as many steps. The caller deletes them.

        stop: once set, the steps that are left are skipped, in the way that diffusers documents.
        """

        began = time.monotonic()

        def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal began
            seeds, ended = [clip.seed for clip in asked], time.monotonic()
            self._steps.write(worker_files.step_lines(seeds, began, ended))
            began = ended
            if stop is not None and stop.is_set():
                pipeline._interrupt = True
            return tensors

        defaults = WAN_TINY.defaults
        (steps,) = {clip.num_inference_steps for clip in asked}
        (size,) = [size for size in WAN_TINY.resolutions if size.name == defaults.resolution]
        images = self._pipeline(
            prompt=[clip.prompt for clip in asked],
            negative_prompt=defaults.negative_prompt,
            width=size.width,
            height=size.height,
            num_frames=defaults.num_frames,
            num_inference_steps=steps,
            guidance_scale=defaults.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(clip.seed) for clip in asked],
            max_sequence_length=WAN_TINY.max_sequence_length,
            output_type="np",
            callback_on_step_end=after_step,
        ).frames  # (B, T, H, W, 3) in [0, 1]
        frames = (images * 255).round().astype(np.uint8)
        return [self._write(clip, one) for clip, one in zip(asked, frames, strict=True)]

    def _write(self, asked: Asked, frames: np.ndarray) -> Path:
        path = self._folder / f"{asked.seed}-{time.monotonic_ns()}.mp4"
        height, width = frames.shape[1:3]
        with Mp4Writer(
            path, width=width, height=height, fps=WAN_TINY.defaults.fps, settings=EncodeSettings(), metadata={}
        ) as writer:
            writer.write(frames)
        return path


def taken(path: Path) -> bytes:
    """The file's bytes; the file is deleted."""
    body = path.read_bytes()
    path.unlink()
    return body
