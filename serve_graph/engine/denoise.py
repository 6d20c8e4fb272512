"""One denoising step for a batch of jobs, exactly as diffusers' `WanPipeline.__call__` takes it for one.

Source of the arithmetic and its order: diffusers pipeline_wan.py. Each job owns its scheduler, its seed's noise
and its guidance; only the forwards are shared. Jobs with levers that change the forward itself take `short_forward`'s
in place of the transformer's own; what such a forward remembers is the job's as well. LoRA adapters are there for
the forwards of jobs that have them, and for no other.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from diffusers import SchedulerMixin, WanTransformer3DModel

from schemas.handoff import PreparedPrompt, TextEmbedding
from schemas.presets import Effort
from schemas.requests import GenerationParameters
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.devices import DTYPES
from serve_graph.engine.lora import applied
from serve_graph.engine.short_forward import Predicted, Row, predict
from serve_graph.engine.text_keys import text_keys

Text = Literal["cond", "uncond"]
"""Which of a job's two texts a prediction is made with: the prompt, or the negative one."""


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
        self.levers = parameters.levers
        self.guidance_scale = parameters.guidance_scale
        self.positive = pad_embedding(prompt.positive, text_length).to(parts.device, dtype)
        self.negative = (
            None if prompt.negative is None else pad_embedding(prompt.negative, text_length).to(parts.device, dtype)
        )
        self.loras = parts.parts_of(parameters.loras)
        self.rows: dict[Text, Row] = {}
        if self.takes_short_forwards:
            with applied(self.loras):
                self.rows["cond"] = self._row(parts.transformer, self.positive, prompt.positive)
                if self.negative is not None and prompt.negative is not None:
                    self.rows["uncond"] = self._row(parts.transformer, self.negative, prompt.negative)
        self.scheduler: Any = own_scheduler(parts.scheduler, parameters.flow_shift)
        self.scheduler.set_timesteps(parameters.num_inference_steps, device=parts.device)
        self.scheduler.set_begin_index(0)
        self.timesteps: torch.Tensor = self.scheduler.timesteps
        self.latents = initial_latents(parts, parameters)
        self.step = 0
        self.guided_steps = 0
        self.cached_forwards = 0

    @property
    def takes_short_forwards(self) -> bool:
        """Whether the levers ask for another forward than the transformer's own."""
        levers = self.levers
        return levers.one_key_padding or levers.batched_guidance or levers.first_block_threshold is not None

    @property
    def num_steps(self) -> int:
        """Scheduler steps, which a second-order scheduler has more of than was asked for."""
        return len(self.timesteps)

    @property
    def is_done(self) -> bool:
        return self.step == self.num_steps

    @property
    def is_guided(self) -> bool:
        """Whether the next step needs the unconditional forward."""
        return self._guides(self.step)

    @property
    def forwards_left(self) -> int:
        """Of the steps that are left, both of a guided step counted."""
        return sum(1 + self._guides(step) for step in range(self.step, self.num_steps))

    @property
    def effort(self) -> Effort:
        """What was done so far."""
        return Effort(
            steps=self.step,
            guided_steps=self.guided_steps,
            forwards=self.step + self.guided_steps,
            cached_forwards=self.cached_forwards,
        )

    def _row(self, transformer: WanTransformer3DModel, text: torch.Tensor, embedding: TextEmbedding) -> Row:
        one_key = self.levers.one_key_padding
        return Row(text_keys(transformer, text, len(embedding.values)) if one_key else text)

    def _guides(self, step: int) -> bool:
        return self.negative is not None and self.levers.guides(step, self.num_steps)


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
    """Take one step of every job in `batch`; all have latents of one shape, levers of one `of_a_forward`
    and the same adapters.

    Returns the number of forwards, where any job has guidance 2, though they may be one call.

    The state of a job changes only after its forwards succeeded, so a batch that ran out of memory can be
    tried again in smaller parts.
    """
    timesteps = torch.stack([job.timesteps[job.step] for job in batch])  # (B,)
    model_input = _stack([job.latents for job in batch]).to(transformer.dtype)  # (B, C, T, H, W)
    guided = [i for i, job in enumerate(batch) if job.is_guided]
    unconditional: dict[int, torch.Tensor] = {}
    predicted: dict[tuple[int, Text], Predicted] = {}
    with applied(batch[0].loras):
        if batch[0].takes_short_forwards:
            predicted = _short_forwards(transformer, model_input, timesteps, batch, guided)
            noise = _stack([predicted[i, "cond"].noise for i in range(len(batch))])
            unconditional = {i: predicted[i, "uncond"].noise for i in guided}
        else:
            noise = _forward(transformer, model_input, timesteps, [job.positive for job in batch])
            if guided:
                index = _index(guided, model_input)
                negatives = [job.negative for job in batch if job.is_guided and job.negative is not None]
                without = _forward(transformer, model_input[index], timesteps[index], negatives)
                unconditional = {i: without[n : n + 1] for n, i in enumerate(guided)}
    for i, job in enumerate(batch):
        prediction = noise[i : i + 1]
        if i in unconditional:
            prediction = unconditional[i] + job.guidance_scale * (prediction - unconditional[i])
            job.guided_steps += 1
        timestep = job.timesteps[job.step]
        job.latents = job.scheduler.step(prediction, timestep, job.latents, return_dict=False)[0]
        job.step += 1
    for (i, kind), one in predicted.items():
        batch[i].rows[kind] = replace(batch[i].rows[kind], memory=one.memory)
        batch[i].cached_forwards += one.cached
    for job in batch:
        if job.forwards_left == job.num_steps - job.step:  # guidance is over, and what was kept for it
            job.rows.pop("uncond", None)
    return 2 if guided else 1


def _short_forwards(
    transformer: WanTransformer3DModel,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    batch: Sequence[Denoising],
    guided: Sequence[int],
) -> dict[tuple[int, Text], Predicted]:
    """Each job's predictions by its place in the batch."""
    levers = batch[0].levers
    with_prompts: list[tuple[int, Text]] = [(i, "cond") for i in range(len(batch))]
    without: list[tuple[int, Text]] = [(i, "uncond") for i in guided]
    calls = [with_prompts, without] if guided else [with_prompts]
    if guided and levers.batched_guidance:
        calls = [with_prompts + without]
    predicted: dict[tuple[int, Text], Predicted] = {}
    for call in calls:
        index = _index([i for i, _ in call], latents)
        rows = [batch[i].rows[kind] for i, kind in call]
        found = predict(transformer, latents[index], timesteps[index], rows, levers.first_block_threshold)
        predicted |= zip(call, found, strict=True)
    return predicted


def _index(places: Sequence[int], latents: torch.Tensor) -> torch.Tensor | slice:
    """For rows of a batch; a slice, which copies nothing, for all of them."""
    whole = list(places) == list(range(len(latents)))
    return slice(None) if whole else torch.tensor(places, device=latents.device)


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
