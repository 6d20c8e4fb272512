"""One denoising step for a batch of jobs, exactly as diffusers' `WanPipeline.__call__` takes it for one.

Source of the arithmetic and its order: diffusers pipeline_wan.py. Each job owns its scheduler, its seed's noise
and its guidance; only the forwards are shared.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin, WanTransformer3DModel

from schemas.handoff import PreparedPrompt, TextEmbedding
from schemas.requests import GenerationParameters
from serve_graph.engine.checkpoint import DTYPES, GeneratorParts


class Denoising:
    """The state of one job between its noise and its final latents.

    latents: (1, C, 1 + (num_frames - 1) / 4, height / 8, width / 8) float32 on the device.
    """

    def __init__(
        self,
        parts: GeneratorParts,
        parameters: GenerationParameters,
        prompt: PreparedPrompt,
        text_length: int,
    ) -> None:
        dtype = parts.transformer.dtype
        self.guidance_scale = parameters.guidance_scale
        self.positive = pad_embedding(prompt.positive, text_length).to(parts.device, dtype)
        self.negative = (
            None if prompt.negative is None else pad_embedding(prompt.negative, text_length).to(parts.device, dtype)
        )
        self.scheduler: Any = own_scheduler(parts.scheduler, parameters.flow_shift)
        self.scheduler.set_timesteps(parameters.num_inference_steps, device=parts.device)
        self.scheduler.set_begin_index(0)
        self.timesteps: torch.Tensor = self.scheduler.timesteps
        self.latents = initial_latents(parts, parameters)
        self.step = 0

    @property
    def num_steps(self) -> int:
        """Scheduler steps, which a second-order scheduler has more of than was asked for."""
        return len(self.timesteps)

    @property
    def is_done(self) -> bool:
        return self.step == self.num_steps


def initial_latents(parts: GeneratorParts, parameters: GenerationParameters) -> torch.Tensor:
    """The seed's noise, drawn on the CPU so that it is the same on every device."""
    config = parts.vae.config
    shape = (
        1,
        parts.transformer.config.in_channels,
        (parameters.num_frames - 1) // config.scale_factor_temporal + 1,
        parameters.height // config.scale_factor_spatial,
        parameters.width // config.scale_factor_spatial,
    )
    generator = torch.Generator("cpu").manual_seed(parameters.seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(parts.device)


def own_scheduler(template: SchedulerMixin, flow_shift: float) -> SchedulerMixin:
    """A fresh scheduler with this job's shift; diffusers' flow-match schedulers call it `shift`."""
    name = "flow_shift" if "flow_shift" in template.config else "shift"
    scheduler: SchedulerMixin = type(template).from_config(template.config, **{name: flow_shift})
    return scheduler


def pad_embedding(embedding: TextEmbedding, text_length: int) -> torch.Tensor:
    """(num_tokens, text_dim) rows to (1, text_length, text_dim), zeros behind: Wan's cross-attention has no mask."""
    values = embedding.values
    if embedding.dtype == "bfloat16":
        rows = torch.from_numpy(values.astype(np.int16)).view(torch.bfloat16)
    else:
        rows = torch.from_numpy(values.copy()).to(DTYPES[embedding.dtype])
    padded = rows.new_zeros(1, text_length, rows.shape[1])
    padded[0, : rows.shape[0]] = rows
    return padded


@torch.inference_mode()
def denoise_step(transformer: WanTransformer3DModel, batch: Sequence[Denoising]) -> int:
    """Take one step of every job in `batch`; all have latents of one shape. Returns the number of forwards.

    The state of a job changes only after its forwards succeeded, so a batch that ran out of memory can be
    tried again in smaller parts.
    """
    timesteps = torch.stack([job.timesteps[job.step] for job in batch])  # (B,)
    model_input = _stack([job.latents for job in batch]).to(transformer.dtype)  # (B, C, T, H, W)
    noise = _forward(transformer, model_input, timesteps, [job.positive for job in batch])
    guided = [i for i, job in enumerate(batch) if job.negative is not None]
    unconditional: dict[int, torch.Tensor] = {}
    if guided:
        whole = len(guided) == len(batch)
        index = slice(None) if whole else torch.tensor(guided, device=model_input.device)
        negatives = [job.negative for job in batch if job.negative is not None]
        predicted = _forward(transformer, model_input[index], timesteps[index], negatives)
        unconditional = {i: predicted[n : n + 1] for n, i in enumerate(guided)}
    for i, job in enumerate(batch):
        prediction = noise[i : i + 1]
        if i in unconditional:
            prediction = unconditional[i] + job.guidance_scale * (prediction - unconditional[i])
        timestep = job.timesteps[job.step]
        job.latents = job.scheduler.step(prediction, timestep, job.latents, return_dict=False)[0]
        job.step += 1
    return 2 if guided else 1


def _forward(
    transformer: WanTransformer3DModel,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    embeddings: Sequence[torch.Tensor],
) -> torch.Tensor:
    predicted: torch.Tensor = transformer(
        hidden_states=latents,
        timestep=timesteps,
        encoder_hidden_states=_stack(embeddings),
        return_dict=False,
    )[0]
    return predicted


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
