"""Each lever does what it claims, counted in calls of blocks and in keys, and a job without any is as it was."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from engine_runs import BOUND, bytes_of, distance, run
from live_bytes import peak_bytes
from random_wan import RANDOM_WAN
from torch.overrides import TorchFunctionMode

from schemas.handoff import PreparedPrompt
from schemas.presets import NO_LEVERS, Effort, Levers
from schemas.requests import GenerationParameters
from serve_graph.engine.checkpoint import GeneratorParts, load_generator_parts
from serve_graph.engine.denoise import Denoising, denoise_step, pad_embedding
from serve_graph.engine.job import EngineEvent, Finished, Started
from serve_graph.engine.short_forward import Predicted, predict, relative_change
from serve_graph.engine.text_keys import text_keys
from serve_graph.scheduling import WorkModel

if TYPE_CHECKING:
    from conftest import MakeEngine, MakeProbe

TEXT_LENGTH = RANDOM_WAN.max_sequence_length

ONE_KEY = Levers(one_key_padding=True)
BATCHED = Levers(batched_guidance=True)
CACHED = Levers(first_block_threshold=0.1)
ALL = Levers(
    guidance_interval=(0.0, 0.5), batched_guidance=True, one_key_padding=True, first_block_threshold=0.2,
    bfloat16_decode=True,
)  # fmt: skip

MakeDenoising = Callable[..., Denoising]


@pytest.fixture
def make_denoising(make_denoising: MakeDenoising) -> MakeDenoising:
    """With steps enough for intervals and caches."""
    return partial(make_denoising, num_inference_steps=8)


@pytest.fixture
def block_rows(generator_parts: GeneratorParts) -> Iterator[tuple[list[int], list[int]]]:
    """The rows of each call of the first block and of the last, in order."""
    first: list[int] = []
    last: list[int] = []
    blocks = generator_parts.transformer.blocks
    with ExitStack() as stack:
        for block, rows in ((blocks[0], first), (blocks[-1], last)):
            hook = block.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(len(args[0])))
            stack.enter_context(hook)
        yield first, last


# Guidance on an interval


def test_guidance_on_an_interval_takes_the_second_forward_on_its_steps_only(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising, forward_batches: list[int]
) -> None:
    job = make_denoising(Levers(guidance_interval=(0.25, 0.75)))
    assert job.forwards_left == 8 + 4

    forwards = [denoise_step(generator_parts.transformer, [job]) for _ in range(8)]

    assert forwards == [1, 1, 2, 2, 2, 2, 1, 1]
    assert len(forward_batches) == 12
    assert job.effort == Effort(steps=8, guided_steps=4, forwards=12, cached_forwards=0)
    assert job.forwards_left == 0


def test_an_interval_over_all_steps_changes_no_bit_and_one_over_none_is_guidance_off(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising
) -> None:
    exact, unguided = run(generator_parts, make_denoising()), run(generator_parts, make_denoising(guidance_scale=1.0))

    assert torch.equal(run(generator_parts, make_denoising(Levers(guidance_interval=(0.0, 1.0)))), exact)
    assert torch.equal(run(generator_parts, make_denoising(Levers(guidance_interval=(0.0, 0.0)))), unguided)
    assert distance(unguided, exact) > 100 * BOUND


# Both forwards in one


def test_batched_guidance_makes_one_call_of_both_and_the_same_latents(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising, block_rows: tuple[list[int], list[int]]
) -> None:
    job = make_denoising(BATCHED)
    latents = run(generator_parts, job)

    assert block_rows[0] == [2] * 8
    assert job.effort.forwards == 16
    assert distance(latents, run(generator_parts, make_denoising())) <= BOUND


def test_batched_guidance_takes_rows_of_guided_jobs_only_along(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising, block_rows: tuple[list[int], list[int]]
) -> None:
    denoise_step(generator_parts.transformer, [make_denoising(BATCHED, guidance_scale=s) for s in (3.0, 1.0, 6.0)])

    assert block_rows[0] == [3 + 2]


# One key for the padding


def test_padding_is_the_same_row_in_every_place(generator_parts: GeneratorParts) -> None:
    """What the shortcut rests on."""
    padded = torch.zeros(1, TEXT_LENGTH, generator_parts.transformer.config.text_dim)
    rows = generator_parts.transformer.condition_embedder.text_embedder(padded)

    assert torch.equal(rows, rows[:, :1].expand_as(rows))


@pytest.mark.parametrize("text", ["", "a red circle", "a blue bird flying over the sea and a very large mountain " * 2])
def test_one_key_has_the_paddings_weight_in_every_block(
    text: str,
    generator_parts: GeneratorParts,
    make_parameters: Callable[..., GenerationParameters],
    prepare: Callable[[GenerationParameters], PreparedPrompt],
) -> None:
    transformer, embedding = generator_parts.transformer, prepare(make_parameters(prompt=text)).positive
    padded, num_tokens = pad_embedding(embedding, TEXT_LENGTH), len(embedding.values)
    rows = transformer.condition_embedder.text_embedder(padded)
    keys = text_keys(transformer, padded, num_tokens)
    x = torch.randn(1, 48, rows.shape[2], generator=torch.Generator().manual_seed(1))

    for block, text_of_block in zip(transformer.blocks, keys, strict=True):
        whole, short = block.attn2(x, rows), block.attn2(x, text_of_block)
        without_weight = text_of_block._replace(bias=torch.zeros_like(text_of_block.bias))
        assert text_of_block.keys.shape[1] == num_tokens + 1 < TEXT_LENGTH
        assert distance(short, whole) <= BOUND
        assert distance(block.attn2(x, without_weight), whole) > 100 * BOUND


def test_a_text_without_padding_gets_no_key_for_it(generator_parts: GeneratorParts) -> None:
    text = torch.randn(1, 4, 32)

    keys = text_keys(generator_parts.transformer, text, 4)[0]

    assert keys.keys.shape[1] == 4
    assert torch.equal(keys.bias, torch.zeros(1, 1, 1, 4))


def test_one_key_padding_makes_the_same_latents_alone_and_beside_longer_prompts(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising
) -> None:
    exact = run(generator_parts, make_denoising())
    longer = "two dogs running fast in the rain at night over a very large bridge"

    assert distance(run(generator_parts, make_denoising(ONE_KEY)), exact) <= BOUND
    assert (
        distance(run(generator_parts, make_denoising(ONE_KEY), make_denoising(ONE_KEY, prompt=longer)), exact) <= BOUND
    )


# First-block cache


def test_first_block_cache_leaves_out_the_other_blocks_and_counts_where(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising, block_rows: tuple[list[int], list[int]]
) -> None:
    job = make_denoising(CACHED)
    run(generator_parts, job)

    effort, (first, last) = job.effort, block_rows
    assert sum(first) == effort.forwards == 16
    assert sum(last) == effort.forwards - effort.cached_forwards
    assert 0 < effort.cached_forwards < 14  # the first of both texts' is always whole


def test_first_block_cache_changes_no_bit_where_everything_changes_by_more_than_the_threshold(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising
) -> None:
    job = make_denoising(Levers(first_block_threshold=1e-9))

    assert torch.equal(run(generator_parts, job), run(generator_parts, make_denoising()))
    assert job.effort.cached_forwards == 0


def test_interleaved_jobs_never_see_each_others_cache(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising
) -> None:
    """Diffusers' hooks keep it on the module, where the other job's would be found."""
    changes = [{"seed": 1, "prompt": "a red circle"}, {"seed": 2, "prompt": "snow at night", "guidance_scale": 6.0}]
    alone = [make_denoising(CACHED, **each) for each in changes]
    for job in alone:
        run(generator_parts, job)
    in_turn = [make_denoising(CACHED, **each) for each in changes]

    while not in_turn[0].is_done:
        for job in in_turn:
            denoise_step(generator_parts.transformer, [job])

    for one, other in zip(in_turn, alone, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert one.effort == other.effort
        assert one.effort.cached_forwards > 0


@pytest.mark.parametrize("levers", [CACHED, ALL], ids=["cache", "all"])
def test_jobs_that_share_forwards_decide_each_for_itself(
    levers: Levers, generator_parts: GeneratorParts, make_denoising: MakeDenoising
) -> None:
    late, early = (make_denoising(levers, seed=seed) for seed in (1, 2))
    alone = make_denoising(levers, seed=1)
    for _ in range(3):
        denoise_step(generator_parts.transformer, [early])
    run(generator_parts, alone)

    while not late.is_done:
        denoise_step(generator_parts.transformer, [late] if early.is_done else [early, late])

    assert early.effort.cached_forwards > 0
    assert late.effort == alone.effort
    assert distance(late.latents, alone.latents) <= BOUND


def test_a_forward_that_fails_leaves_the_cache_as_it_was(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising
) -> None:
    job, untroubled = make_denoising(CACHED), make_denoising(CACHED)
    denoise_step(generator_parts.transformer, [job])
    before, calls = dict(job.rows), 0

    def fail_in_the_second_forward(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("boom")

    hook = generator_parts.transformer.blocks[0].register_forward_pre_hook(fail_in_the_second_forward)
    with hook, pytest.raises(RuntimeError, match="boom"):
        denoise_step(generator_parts.transformer, [job])

    assert job.rows == before
    assert torch.equal(run(generator_parts, job), run(generator_parts, untroubled))


def forward_of(parts: GeneratorParts, jobs: list[Denoising], threshold: float | None) -> Callable[[], list[Predicted]]:
    """The next forward of these jobs, with the prompt, to be called; its inputs are there before. Changes no job."""
    latents = torch.cat([job.latents for job in jobs])
    timesteps = torch.stack([job.timesteps[job.step] for job in jobs])
    return partial(predict, parts.transformer, latents, timesteps, [job.rows["cond"] for job in jobs], threshold)


def test_a_forward_without_a_threshold_holds_no_byte_more_than_the_transformers_own(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising
) -> None:
    """The first block's input, and then its output, once stayed there until the last block was done."""
    job = make_denoising(BATCHED, num_frames=81)
    stock = partial(generator_parts.transformer, job.latents, job.timesteps[:1], job.positive, return_dict=False)

    assert peak_bytes(forward_of(generator_parts, [job], None)) <= 1.001 * peak_bytes(stock)


def test_a_change_is_measured_with_four_bytes_per_element() -> None:
    """It once took 12 beside the two tensors."""
    values, last = (torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (1, 2))
    floats, last_floats = values.float(), last.float()
    expected = (floats - last_floats).abs().mean() / last_floats.abs().mean()

    assert peak_bytes(lambda: relative_change(values, last)) <= 4 * values.numel() + 64
    assert torch.equal(relative_change(values, last), expected)
    assert torch.equal(relative_change(floats, last_floats), expected)
    assert torch.equal(floats, values.float())  # left as they were
    assert torch.equal(last_floats, last.float())


def test_what_is_kept_of_a_shared_forward_holds_no_other_jobs_rows(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising
) -> None:
    jobs = [make_denoising(CACHED, seed=seed) for seed in (1, 2)]

    memories = [one.memory for one in forward_of(generator_parts, jobs, 0.1)()]

    assert None not in memories
    for kept in [tensor for memory in memories if memory is not None for tensor in (memory.first, memory.rest)]:
        assert kept.untyped_storage().nbytes() == kept.nbytes


# Decoding in bfloat16


def test_a_bfloat16_decode_runs_on_a_copy_of_half_the_bytes_and_shows_the_same(
    generator_parts: GeneratorParts, make_engine: "MakeEngine", make_probe: "MakeProbe"
) -> None:
    exact, quick = make_probe("exact"), make_probe("quick", preset="fast", levers=Levers(bfloat16_decode=True))
    engine, calls = make_engine(), [0, 0]
    assert generator_parts.quick_vae is not None

    def count(place: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[place] += 1

        return hook

    with (
        generator_parts.vae.decoder.register_forward_pre_hook(count(0)),
        generator_parts.quick_vae.decoder.register_forward_pre_hook(count(1)),
    ):
        for probe in (exact, quick):
            engine.submit(probe.job)
            assert isinstance(probe.end(), Finished)

    assert calls == [3, 3]  # latent frames of each
    assert torch.equal(exact.latents, quick.latents)
    difference = np.abs(exact.frames.astype(int) - quick.frames.astype(int))
    assert 0 < difference.mean() < 4  # levels of 255; random weights round badly
    assert bytes_of(generator_parts.quick_vae) == bytes_of(generator_parts.vae) / 2


def test_no_copy_is_held_where_no_preset_needs_one_or_the_vae_is_in_bfloat16_already(
    tiny_folder: Path, generator_parts: GeneratorParts
) -> None:
    cpu = torch.device("cpu")
    without = load_generator_parts(tiny_folder, cpu, "float32", "float32")
    already = load_generator_parts(tiny_folder, cpu, "float32", "bfloat16", presets=RANDOM_WAN.presets.values())

    assert without.quick_vae is None
    assert without.vae_for(ALL) is without.vae  # a job that a service with another profile has admitted
    assert already.quick_vae is already.vae
    assert generator_parts.vae_for(NO_LEVERS) is generator_parts.vae


# Presets side by side


def test_exact_is_bit_for_bit_the_same_alone_and_among_fast_jobs_and_shares_no_forward_with_them(
    generator_parts: GeneratorParts,
    make_engine: "MakeEngine",
    make_probe: "MakeProbe",
    forward_batches: list[int],
    block_rows: tuple[list[int], list[int]],
) -> None:
    def fast(job_id: str, **changes: Any) -> Any:
        return make_probe(job_id, preset="fast", levers=ALL, num_inference_steps=8, **changes)

    engine = make_engine()
    alone = make_probe("alone", num_inference_steps=6)
    engine.submit(alone.job)
    assert isinstance(alone.end(), Finished)
    strangers = [fast(f"stranger-{seed}", seed=seed) for seed in range(2, 5)]
    crowded = make_probe("crowded", num_inference_steps=6)
    began = len(forward_batches)
    block_rows[0].clear()

    def bring_all(event: EngineEvent) -> None:
        while waiting:
            engine.submit(waiting.pop().job)

    waiting = [crowded, *strangers]
    leader = fast("leader", on_event=bring_all)
    engine.submit(leader.job)

    for probe in (leader, crowded, *strangers):
        assert isinstance(probe.end(), Finished)
    assert torch.equal(crowded.latents, alone.latents)
    assert np.array_equal(crowded.frames, alone.frames)
    assert forward_batches[began:] == [1] * 12  # the stock forwards are crowded's alone
    assert max(block_rows[0]) >= 2 * 3  # and the fast ones shared theirs
    told = leader.end()
    assert isinstance(told, Finished)
    assert told.effort.guided_steps == 4
    assert told.effort.cached_forwards > 0


def test_jobs_that_differ_in_when_they_are_guided_share_forwards(
    make_engine: "MakeEngine", make_probe: "MakeProbe", block_rows: tuple[list[int], list[int]]
) -> None:
    engine = make_engine()
    other = make_probe("other", levers=ONE_KEY, num_inference_steps=6)
    leader = make_probe(
        "leader",
        levers=Levers(one_key_padding=True, guidance_interval=(0.0, 0.5)),
        num_inference_steps=8,
        on_event=lambda event: engine.submit(other.job) if isinstance(event, Started) else None,
    )
    engine.submit(leader.job)

    found = [leader.end(), other.end()]
    assert all(isinstance(end, Finished) for end in found)
    assert [end.effort.guided_steps for end in found if isinstance(end, Finished)] == [4, 6]
    assert set(block_rows[0]) == {1, 2}


def test_tokens_of_a_job_whose_guided_steps_are_one_forward_count_twice(
    generator_parts: GeneratorParts, make_probe: "MakeProbe"
) -> None:
    jobs = [make_probe(levers=BATCHED).job, make_probe(levers=BATCHED, guidance_scale=1.0).job, make_probe().job]
    for job in jobs:
        job.begin(generator_parts, TEXT_LENGTH)
    batched, unguided, plain = (job.num_tokens for job in jobs)

    assert batched == 2 * plain
    assert unguided == plain


def test_a_step_of_a_guided_and_an_unguided_job_is_learnt_as_three_forwards(
    make_engine: "MakeEngine", make_probe: "MakeProbe", monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[int] = []
    monkeypatch.setattr(
        WorkModel, "saw_forwards", lambda model, work, num_forwards, seconds: learnt.append(num_forwards)
    )
    engine = make_engine()
    unguided = make_probe("unguided", guidance_scale=1.0, num_inference_steps=8)
    guided = make_probe(
        "guided",
        num_inference_steps=8,
        on_event=lambda event: engine.submit(unguided.job) if isinstance(event, Started) else None,
    )
    engine.submit(guided.job)

    assert isinstance(guided.end(), Finished)
    assert isinstance(unguided.end(), Finished)
    assert sum(learnt) == 8 * 2 + 8
    assert 3 in learnt


def test_what_the_cache_keeps_for_guidance_is_let_go_when_guidance_is_over(
    generator_parts: GeneratorParts, make_denoising: MakeDenoising
) -> None:
    job = make_denoising(Levers(first_block_threshold=0.1, guidance_interval=(0.0, 0.5)))
    for kept in (True, True, True, False, False, False, False, False):
        denoise_step(generator_parts.transformer, [job])
        assert ("uncond" in job.rows) is kept


def test_the_one_keys_bias_has_the_dtype_of_the_queries(
    tiny_folder: Path,
    make_parameters: Callable[..., GenerationParameters],
    prepare: Callable[[GenerationParameters], PreparedPrompt],
) -> None:
    """torch on a CPU takes float32 beside bfloat16; on CUDA one kernel refuses it and another misreads it."""
    parts = load_generator_parts(tiny_folder, torch.device("cpu"), "bfloat16", "float32")
    parameters = make_parameters(levers=ONE_KEY)
    seen: set[tuple[torch.dtype, torch.dtype]] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            bias = (kwargs or {}).get("attn_mask")
            if func is torch.nn.functional.scaled_dot_product_attention and bias is not None:
                seen.add((args[0].dtype, bias.dtype))
            return func(*args, **(kwargs or {}))

    with Watch():
        denoise_step(parts.transformer, [Denoising(parts, parameters, prepare(parameters), TEXT_LENGTH)])

    assert seen == {(torch.bfloat16, torch.bfloat16)}
