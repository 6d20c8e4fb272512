"""One job's denoising state, and steps that several share."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from random_wan import RANDOM_WAN

from schemas.handoff import PreparedPrompt, TextEmbedding
from schemas.requests import GenerationParameters
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.denoise import Denoising, denoise_step, initial_latents, own_scheduler, pad_embedding

TEXT_LENGTH = RANDOM_WAN.max_sequence_length

MakeDenoising = Callable[..., Denoising]


def test_initial_latents_are_the_seeds_noise_drawn_on_the_cpu(
    generator_parts: GeneratorParts, make_parameters: Callable[..., GenerationParameters]
) -> None:
    latents = initial_latents(generator_parts, make_parameters(seed=7, num_frames=17, width=112))

    expected = torch.randn(1, 16, 5, 8, 14, generator=torch.Generator("cpu").manual_seed(7))
    assert latents.dtype == torch.float32
    assert torch.equal(latents, expected)


def test_own_scheduler_is_a_new_object_with_the_jobs_shift() -> None:
    template = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)

    own = own_scheduler(template, 8.0)

    assert own is not template
    assert isinstance(own, UniPCMultistepScheduler)
    assert own.config.flow_shift == 8.0
    assert template.config.flow_shift == 3.0


def test_own_scheduler_sets_shift_when_the_scheduler_calls_it_so() -> None:
    own = own_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), 8.0)

    assert own.config.shift == 8.0


def test_denoising_counts_a_second_order_schedulers_own_steps(
    generator_parts: GeneratorParts,
    make_parameters: Callable[..., GenerationParameters],
    prepare: Callable[[GenerationParameters], PreparedPrompt],
) -> None:
    parts = replace(generator_parts, scheduler=FlowMatchHeunDiscreteScheduler())
    parameters = make_parameters(num_inference_steps=4)

    assert Denoising(parts, parameters, prepare(parameters), TEXT_LENGTH).num_steps == 2 * 4 - 1


def test_pad_embedding_puts_zeros_behind_the_rows() -> None:
    rows = np.arange(1, 7, dtype=np.float32).reshape(2, 3)

    padded = pad_embedding(TextEmbedding(rows, "float32", solo=True), 4)

    assert padded.tolist() == [[[1, 2, 3], [4, 5, 6], [0, 0, 0], [0, 0, 0]]]


def test_pad_embedding_keeps_every_bfloat16_bit() -> None:
    bits = np.arange(2**16, dtype=np.uint16).view(np.int16).reshape(256, 256)  # NaNs and infinities, too

    padded = pad_embedding(TextEmbedding(bits, "bfloat16", solo=True), 300)

    assert padded.dtype == torch.bfloat16
    assert np.array_equal(padded[0, :256].view(torch.int16).numpy(), bits)


def test_pad_embedding_takes_rows_that_numpy_may_not_write_to() -> None:
    """Arrays that come out of Ray's object store are read-only."""
    rows = np.ones((2, 3), dtype=np.float32)
    rows.setflags(write=False)

    assert pad_embedding(TextEmbedding(rows, "float32", solo=True), 2).sum() == 6


def test_denoise_step_counts_one_forward_when_no_job_has_guidance(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising, forward_batches: list[int]
) -> None:
    batch = [make_denoising(guidance_scale=1.0, seed=seed) for seed in (1, 2)]

    assert denoise_step(generator_parts.transformer, batch) == 1
    assert forward_batches == [2]


def test_denoise_step_runs_the_unconditional_forward_for_guided_jobs_only(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising, forward_batches: list[int]
) -> None:
    batch = [make_denoising(guidance_scale=scale) for scale in (1.0, 3.0, 6.0, 1.0)]

    assert denoise_step(generator_parts.transformer, batch) == 2
    assert forward_batches == [4, 2]


def test_denoise_step_changes_no_job_when_a_forward_fails(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising
) -> None:
    """What allows the engine to try again with each job alone."""
    batch = [make_denoising(seed=seed) for seed in (1, 2)]
    denoise_step(generator_parts.transformer, batch)
    before = [job.latents.clone() for job in batch]
    calls = 0

    def fail_in_the_second_forward(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("boom")

    hook = generator_parts.transformer.register_forward_pre_hook(fail_in_the_second_forward)
    with hook, pytest.raises(RuntimeError, match="boom"):
        denoise_step(generator_parts.transformer, batch)

    assert [job.step for job in batch] == [1, 1]
    assert all(torch.equal(job.latents, latents) for job, latents in zip(batch, before, strict=True))
    for job, seed in zip(batch, (1, 2), strict=True):
        untroubled = make_denoising(seed=seed)
        while not job.is_done:
            denoise_step(generator_parts.transformer, [job])
        while not untroubled.is_done:
            denoise_step(generator_parts.transformer, [untroubled])
        assert torch.allclose(job.latents, untroubled.latents, rtol=0, atol=1e-5)
