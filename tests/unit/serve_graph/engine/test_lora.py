"""LoRA adapters: the merged weights' results for who has them, and not a bit of difference for who has none.

The reference merges W + weight * alpha / rank * B A into a copy of the stock transformer by itself.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from engine_runs import BOUND, distance, run
from lora_files import ALL, ATTENTION, CROSS, RANK, Pairs, random_pairs, save_diffusers, save_musubi, save_original
from random_wan import RANDOM_WAN
from safetensors.torch import load_file, save_file

from benchmarks.stock import stock_arguments
from schemas.errors import ModelNotReady, RenderFailed
from schemas.jobs import Progress
from schemas.loras import AppliedLora
from schemas.presets import NO_LEVERS, Levers
from serve_graph.engine import lora
from serve_graph.engine.checkpoint import GeneratorParts, load_generator_parts, load_scheduler, moved
from serve_graph.engine.denoise import Denoising, denoise_step
from serve_graph.engine.job import EngineEvent, Failed, Finished
from serve_graph.engine.lora import applied, load_adapter
from serve_graph.engine.tuning import tune

if TYPE_CHECKING:
    from conftest import MakeEngine, MakeProbe

ALPHA = 2.0
OUTSIDE = ("condition_embedder.text_embedder.linear_1", "condition_embedder.time_proj", "proj_out")

STYLE = AppliedLora(name="style", weight=0.75)
MOTION = AppliedLora(name="motion", weight=-0.5)
BOTH = (MOTION, STYLE)

ALL_LEVERS = Levers(
    guidance_interval=(0.0, 0.75), batched_guidance=True, one_key_padding=True, first_block_threshold=0.1
)

MakeDenoising = Callable[..., Denoising]


@pytest.fixture(scope="module")
def pairs(generator_parts: GeneratorParts) -> dict[str, Pairs]:
    """Of two adapters; one reaches beyond the blocks."""
    return {
        "style": random_pairs(generator_parts.transformer, 1, ALL, OUTSIDE),
        "motion": random_pairs(generator_parts.transformer, 2, (*ATTENTION, *CROSS)),
    }


@pytest.fixture(scope="module")
def files(pairs: dict[str, Pairs], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {name: save_diffusers(folder / f"{name}.safetensors", own, ALPHA) for name, own in pairs.items()}


@pytest.fixture(scope="module")
def parts(generator_parts: GeneratorParts, files: dict[str, Path]) -> GeneratorParts:
    """The shared parts with both adapters, on the very same transformer."""
    loras = {name: load_adapter(file, generator_parts.transformer) for name, file in files.items()}
    return replace(generator_parts, loras=loras)


@pytest.fixture
def make_denoising(make_denoising: Callable[..., Denoising]) -> MakeDenoising:
    """With these adapters."""

    def make(parts: GeneratorParts, *loras: AppliedLora, levers: Levers = NO_LEVERS, **changes: Any) -> Denoising:
        return make_denoising(levers, parts=parts, loras=loras, **{"num_inference_steps": 6, **changes})

    return make


def merged(
    parts: GeneratorParts, pairs: Mapping[str, Pairs], *loras: AppliedLora, alpha: float = ALPHA
) -> GeneratorParts:
    """Parts without adapters whose transformer has these in its weights."""
    transformer: WanTransformer3DModel = copy.deepcopy(parts.transformer)
    for applied_lora in loras:
        for path, (down, up) in pairs[applied_lora.name].items():
            transformer.get_submodule(path).weight += applied_lora.weight * alpha / RANK * up @ down
    return replace(parts, transformer=transformer, loras={})


# What they make


@pytest.mark.parametrize("loras", [(STYLE,), (MOTION,), BOTH], ids=["one", "negative", "two"])
def test_a_clip_with_adapters_equals_the_stock_pipeline_with_them_in_its_weights(
    loras: tuple[AppliedLora, ...],
    parts: GeneratorParts,
    pairs: dict[str, Pairs],
    stock_pipeline: WanPipeline,
    make_engine: "MakeEngine",
    make_probe: "MakeProbe",
) -> None:
    reference = merged(parts, pairs, *loras)
    probe = make_probe(loras=loras, num_frames=17, num_inference_steps=6)
    pipeline = WanPipeline(**(stock_pipeline.components | {"transformer": reference.transformer}))
    pipeline.set_progress_bar_config(disable=True)
    asked = probe.job.parameters
    pipeline.scheduler = type(parts.scheduler).from_config(parts.scheduler.config, flow_shift=asked.flow_shift)

    make_engine(parts).submit(probe.job)

    assert isinstance(probe.end(), Finished)
    stock = pipeline(
        **stock_arguments(asked, RANDOM_WAN.max_sequence_length),
        output_type="latent",
    ).frames
    assert distance(probe.latents, stock) <= BOUND


def test_that_bound_can_tell_adapters_their_weights_and_their_absence(
    parts: GeneratorParts, pairs: dict[str, Pairs], make_denoising: MakeDenoising
) -> None:
    expected = run(merged(parts, pairs, STYLE), make_denoising(merged(parts, pairs, STYLE)))

    for wrong in ((), (MOTION,), BOTH, (STYLE.model_copy(update={"weight": 0.76}),)):
        assert distance(run(parts, make_denoising(parts, *wrong)), expected) > 100 * BOUND


@pytest.mark.parametrize(
    "levers",
    [
        Levers(one_key_padding=True),
        Levers(batched_guidance=True),
        Levers(first_block_threshold=0.1),
        ALL_LEVERS,
    ],
    ids=["one-key", "batched", "cache", "all"],
)
def test_levers_do_with_adapters_what_they_do_with_merged_weights(
    levers: Levers, parts: GeneratorParts, pairs: dict[str, Pairs], make_denoising: MakeDenoising
) -> None:
    reference = merged(parts, pairs, *BOTH)
    job, expected = make_denoising(parts, *BOTH, levers=levers), make_denoising(reference, levers=levers)

    assert distance(run(parts, job), run(reference, expected)) <= BOUND
    assert job.effort == expected.effort


@pytest.mark.parametrize("levers", [NO_LEVERS, ALL_LEVERS], ids=["plain", "levers"])
def test_fused_projections_take_each_adapter_s_part_of_them(
    levers: Levers,
    tiny_folder: Path,
    parts: GeneratorParts,
    files: dict[str, Path],
    pairs: dict[str, Pairs],
    make_denoising: MakeDenoising,
) -> None:
    fused = load_generator_parts(tiny_folder, torch.device("cpu"), "float32", "float32", loras=files)
    tune(fused, fuse_qkv=True)
    reference = merged(parts, pairs, *BOTH)
    expected = run(reference, make_denoising(reference, levers=levers))

    assert distance(run(fused, make_denoising(fused, *BOTH, levers=levers)), expected) <= BOUND
    plain = run(parts, make_denoising(parts, levers=levers))
    assert distance(run(fused, make_denoising(fused, levers=levers)), plain) <= BOUND


# What strangers see of them


@pytest.mark.parametrize("levers", [NO_LEVERS, ALL_LEVERS], ids=["plain", "levers"])
def test_interleaved_jobs_with_other_adapters_or_none_change_no_bit_of_each_other(
    levers: Levers, parts: GeneratorParts, generator_parts: GeneratorParts, make_denoising: MakeDenoising
) -> None:
    choices = ((), (STYLE,), (MOTION,), BOTH, (STYLE.model_copy(update={"weight": 1.0}),))
    alone = [run(parts, make_denoising(parts, *loras, levers=levers)) for loras in choices]
    in_turn = [make_denoising(parts, *loras, levers=levers) for loras in choices]

    while not in_turn[0].is_done:
        for job in in_turn:
            denoise_step(parts.transformer, [job])

    for job, expected in zip(in_turn, alone, strict=True):
        assert torch.equal(job.latents, expected)
    assert torch.equal(alone[0], run(generator_parts, make_denoising(generator_parts, levers=levers)))
    assert len({latents.sum().item() for latents in alone}) == len(choices)


def test_a_forward_that_fails_leaves_no_adapter_behind(parts: GeneratorParts, make_denoising: MakeDenoising) -> None:
    expected = run(parts, make_denoising(parts))

    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    with parts.transformer.proj_out.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="boom"):
        denoise_step(parts.transformer, [make_denoising(parts, *BOTH)])

    assert not any(module._forward_hooks for module in parts.transformer.modules())
    assert torch.equal(run(parts, make_denoising(parts)), expected)


def test_jobs_share_forwards_with_those_of_the_same_adapters_and_weights_only(
    parts: GeneratorParts, make_engine: "MakeEngine", make_probe: "MakeProbe", forward_batches: list[int]
) -> None:
    other = STYLE.model_copy(update={"weight": 0.5})
    choices: list[tuple[AppliedLora, ...]] = [(), (), (STYLE,), (STYLE,), (STYLE,), (other,), (MOTION,), BOTH]
    alone = [make_probe(f"alone-{i}", seed=i, loras=loras, reproducible=True) for i, loras in enumerate(choices)]
    together = [make_probe(f"job-{i}", seed=i, loras=loras) for i, loras in enumerate(choices)]
    engine = make_engine(parts, max_jobs_in_flight=len(choices))
    for probe in alone:
        engine.submit(probe.job)
        assert isinstance(probe.end(), Finished)
    forward_batches.clear()
    late = list(together[1:])

    def all_join(event: EngineEvent) -> None:
        if isinstance(event, Progress):
            while late:
                engine.submit(late.pop(0).job)

    first = together[0] = make_probe("job-0", seed=0, on_event=all_join)
    engine.submit(first.job)

    assert all(isinstance(probe.end(), Finished) for probe in together)
    assert max(forward_batches) == 3  # the three of one adapter and weight
    for probe, expected in zip(together, alone, strict=True):
        assert distance(probe.latents, expected.latents) <= BOUND
    for i in (5, 6, 7):  # nobody shared with these
        assert torch.equal(together[i].latents, alone[i].latents)


def test_a_job_whose_adapter_is_gone_fails_and_no_other_does(
    generator_parts: GeneratorParts, make_engine: "MakeEngine", make_probe: "MakeProbe"
) -> None:
    engine, gone, other = make_engine(), make_probe("gone", loras=(STYLE,)), make_probe("other")
    for probe in (gone, other):
        engine.submit(probe.job)

    ended = gone.end()
    assert isinstance(ended, Failed)
    assert isinstance(ended.error, RenderFailed)
    assert "style is not served" in ended.error.detail
    assert isinstance(other.end(), Finished)


# Files


@pytest.mark.parametrize("alpha", [ALPHA, 8.0, 0.01])
@pytest.mark.parametrize(
    "save",
    [save_diffusers, save_original, save_musubi],
    ids=["diffusers", "original", "musubi"],
)
def test_files_of_every_format_hold_the_same_adapter(
    save: Callable[[Path, Pairs, float], Path], alpha: float, generator_parts: GeneratorParts, tmp_path: Path
) -> None:
    own = random_pairs(generator_parts.transformer, 3)

    adapter = load_adapter(save(tmp_path / "x.safetensors", own, alpha), generator_parts.transformer)

    assert adapter.keys() == own.keys()
    for path, (down, up) in own.items():
        x = torch.randn(2, down.shape[1], generator=torch.Generator().manual_seed(4))
        assert distance(adapter[path].of(x), alpha / RANK * x @ down.T @ up.T) <= BOUND


def test_a_file_without_alpha_is_taken_at_full_strength(generator_parts: GeneratorParts, tmp_path: Path) -> None:
    own = random_pairs(generator_parts.transformer, 3)

    adapter = load_adapter(save_diffusers(tmp_path / "x.safetensors", own), generator_parts.transformer)

    assert all(torch.equal(adapter[path].up, up) for path, (_, up) in own.items())


def test_a_bias_of_an_original_file_is_added_too(generator_parts: GeneratorParts, tmp_path: Path) -> None:
    own, bias = random_pairs(generator_parts.transformer, 3, ("attn1.to_q", "attn1.to_k")), torch.arange(24.0)
    path = save_original(tmp_path / "x.safetensors", own, RANK)
    beside = {f"diffusion_model.blocks.1.self_attn.{name}.diff_b": bias.clone() for name in "kv"}  # of v nothing else
    save_file(load_file(path) | beside, path)

    adapter = load_adapter(path, generator_parts.transformer)

    assert adapter.keys() - own.keys() == {"blocks.1.attn1.to_v"}
    for layer in ("blocks.1.attn1.to_k", "blocks.1.attn1.to_v"):
        assert torch.equal(adapter[layer].of(torch.zeros(1, 24))[0], bias)


def test_changes_of_norms_are_left_out_and_told_where_they_are_any(
    generator_parts: GeneratorParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(lora, "log_event", lambda event, **fields: told.append({"event": event, **fields}))
    own = random_pairs(generator_parts.transformer, 3)
    path = save_original(tmp_path / "x.safetensors", own, RANK)
    norms = {f"diffusion_model.blocks.{i}.norm3.diff": torch.full((24,), float(i)) for i in (0, 1)}
    save_file(load_file(path) | norms, path)

    assert load_adapter(path, generator_parts.transformer).keys() == own.keys()
    assert told == [{"event": "lora_tensors_left_out", "level": logging.WARNING, "file": "x.safetensors", "tensors": 1}]


def bad_files(folder: Path, own: Pairs) -> Iterator[tuple[str, Path]]:
    """What the refusal says, and the file."""
    whole = load_file(save_diffusers(folder / "whole.safetensors", own))
    name = "transformer.blocks.0.attn1.to_q"

    def saved(number: int, tensors: Mapping[str, torch.Tensor]) -> Path:
        save_file(dict(tensors), folder / f"{number}.safetensors")
        return folder / f"{number}.safetensors"

    yield "missing or can't be read", folder / "no-such.safetensors"
    (folder / "text.safetensors").write_text("no tensors")
    yield "missing or can't be read", folder / "text.safetensors"
    yield "holds nothing", saved(1, {})
    yield "is a DoRA", saved(2, whole | {f"{name}.dora_scale": torch.ones(24)})
    yield "has no use", saved(3, whole | {"transformer.blocks.9.attn1.to_q.lora_A.weight": torch.ones(4, 24)})
    yield "has no use", saved(4, {key: value for key, value in whole.items() if key != f"{name}.lora_B.weight"})
    yield "has no use", saved(5, whole | {"text_encoder.layer.weight": torch.ones(4)})
    yield "another size: blocks.0.attn1.to_q", saved(6, whole | {f"{name}.lora_A.weight": torch.ones(4, 25)})
    yield "none of Wan's", saved(7, {"diffusion_model.double_blocks.0.lora_A.weight": torch.ones(4, 25)})
    yield "none of Wan's", saved(8, {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(4, 25)})


def test_a_file_that_is_no_adapter_of_this_model_is_refused_in_one_line(
    generator_parts: GeneratorParts, tmp_path: Path
) -> None:
    for says, file in bad_files(tmp_path, random_pairs(generator_parts.transformer, 3)):
        with pytest.raises(ModelNotReady, match=says) as refused:
            load_adapter(file, generator_parts.transformer)
        assert file.name in refused.value.detail
        assert "\n" not in refused.value.detail
        assert str(tmp_path) not in refused.value.detail


def test_adapters_come_in_the_transformer_s_dtype_and_move_with_it(tiny_folder: Path, files: dict[str, Path]) -> None:
    cpu = torch.device("cpu")
    loaded = load_generator_parts(tiny_folder, cpu, "bfloat16", "float32", loras=files)

    deltas = loaded.loras["style"]
    assert deltas["blocks.0.ffn.net.2"].up.dtype == torch.bfloat16
    assert {delta.down.device.type for delta in moved(loaded, torch.device("meta")).loras["style"].values()} == {"meta"}


# Few steps


def test_euler_takes_few_even_steps_along_the_flow_with_one_forward_each(
    parts: GeneratorParts, tiny_folder: Path, make_denoising: MakeDenoising, forward_batches: list[int]
) -> None:
    """As LightX2V does: Euler's steps at 1000, 750, 500 and 250 of 1000 times, shifted; ours begin at 999."""
    loaded = replace(parts, scheduler=load_scheduler(tiny_folder, "euler"))
    job = make_denoising(loaded, STYLE, num_inference_steps=4, guidance_scale=1.0, flow_shift=5.0)
    latents = job.latents
    actual = run(loaded, job)
    assert forward_batches == [1, 1, 1, 1]

    shifted = [5 * t / (1 + 4 * t) for t in (0.999, 0.74925, 0.4995, 0.24975)]
    assert job.timesteps.tolist() == [int(1000 * t) for t in shifted]
    with torch.inference_mode(), applied(job.loras):
        for now, then in zip(shifted, [*shifted[1:], 0.0], strict=True):
            time = torch.tensor([int(1000 * now)])
            flow = loaded.transformer(
                hidden_states=latents, timestep=time, encoder_hidden_states=job.positive, return_dict=False
            )[0]
            latents = latents + (then - now) * flow
    assert distance(actual, latents) <= BOUND
