"""The engine against diffusers' own `WanPipeline.__call__`, on the same weights, in float32.

Distances between latents are relative: the largest difference over the stock output's standard deviation. A bound
means something only where a wrong render breaks it, so each comparison also makes three wrong renders (guidance off
by 0.1 either way, two neighbouring steps swapped) and asks each of them to miss the bound a hundredfold.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
    WanPipeline,
)
from engine_runs import BOUND, distance, run
from prometheus_client import CollectorRegistry
from random_wan import RANDOM_WAN

from benchmarks.stock import stock_arguments
from schemas.handoff import PreparedPrompt
from schemas.jobs import Progress
from schemas.official_profiles import WAN_NEGATIVE_PROMPT
from schemas.requests import GenerationParameters
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.denoise import Denoising
from serve_graph.engine.job import EngineEvent, Finished

if TYPE_CHECKING:
    from conftest import MakeEngine, MakeProbe


WRONG = 100 * BOUND

TIE_WIDTH = 0.01
"""How near to a half, in 8-bit levels, a value must be for the two sides to round it differently."""

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

SCHEDULERS: dict[str, SchedulerMixin] = {
    "unipc": UniPCMultistepScheduler(**FLOW),
    "unipc-order-3": UniPCMultistepScheduler(**FLOW, solver_order=3),
    "euler": FlowMatchEulerDiscreteScheduler(),
    "heun": FlowMatchHeunDiscreteScheduler(),
    "dpm-multistep": DPMSolverMultistepScheduler(**FLOW),
    "dpm-singlestep": DPMSolverSinglestepScheduler(**FLOW, lower_order_final=True),
}

CLIP: dict[str, Any] = {"num_frames": 17, "negative_prompt": "blurred, static, ugly"}
"""Random weights hear some words better than others; these tell guidance scales apart clearly."""

STRANGERS: tuple[dict[str, Any], ...] = (
    {"prompt": "a blue bird flying over the sea", "seed": 101, "num_inference_steps": 3, "guidance_scale": 1.0},
    {"prompt": "two dogs running fast", "seed": 102, "num_inference_steps": 9, "negative_prompt": ""},
    {"prompt": "snow on a very large mountain at night", "seed": 103, "num_inference_steps": 5, "flow_shift": 1.0},
    {"prompt": "a train in the rain at night", "seed": 104, "num_inference_steps": 4, "guidance_scale": 1.0},
    {"prompt": "a green box", "seed": 105, "num_inference_steps": 7, "guidance_scale": 6.0, "flow_shift": 8.0},
)

Prepare = Callable[[GenerationParameters], PreparedPrompt]


def stock_render(
    pipeline: WanPipeline, template: SchedulerMixin, parameters: GenerationParameters
) -> tuple[torch.Tensor, npt.NDArray[np.float32]]:
    """What the stock pipeline makes: latents (1, C, T, H, W) and frames (num_frames, H, W, 3) in [0, 1]."""
    shift = "flow_shift" if "flow_shift" in template.config else "shift"
    pipeline.scheduler = type(template).from_config(template.config, **{shift: parameters.flow_shift})
    latents: list[torch.Tensor] = []

    def keep(_: WanPipeline, step: int, timestep: int, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(values["latents"])
        return {}

    frames: npt.NDArray[np.float32] = pipeline(
        **stock_arguments(parameters, RANDOM_WAN.max_sequence_length),
        output_type="np",
        callback_on_step_end=keep,
    ).frames[0]
    return latents[-1], frames


def engine_latents(parts: GeneratorParts, parameters: GenerationParameters, prompt: PreparedPrompt) -> torch.Tensor:
    """What the engine's steps make, without its thread."""
    return run(parts, Denoising(parts, parameters, prompt, RANDOM_WAN.max_sequence_length))


def with_two_steps_swapped(template: SchedulerMixin) -> SchedulerMixin:
    """The scheduler with two neighbouring steps of its middle in the wrong order."""
    stock_class: Any = type(template)

    class Swapped(stock_class):  # type: ignore[misc]  # chosen at run time
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            second = len(self.timesteps) // 2
            if self.timesteps[second] == self.timesteps[second - 1]:  # both halves of one step of Heun's
                second += 1
            for values in (self.timesteps, self.sigmas):
                values[[second - 1, second]] = values[[second, second - 1]]

    swapped: SchedulerMixin = Swapped.from_config(template.config)
    return swapped


def assert_frames_equal_but_for_ties(
    actual: npt.NDArray[np.uint8], stock: npt.NDArray[np.float32], tie_width: float = TIE_WIDTH
) -> None:
    levels = stock.astype(np.float64) * 255
    assert actual.shape == stock.shape
    differs = actual != np.round(levels).astype(np.uint8)
    assert (np.abs(actual[differs] - levels[differs]) <= 0.5 + tie_width).all()
    assert differs.mean() < 1e-3


def assert_wrong_renders_are_far(
    stock: torch.Tensor, parts: GeneratorParts, parameters: GenerationParameters, prepare: Prepare
) -> None:
    """Shows that the bound can tell: each wrong render misses it a hundredfold."""
    for offset in (-0.1, 0.1):
        wrong = parameters.model_copy(update={"guidance_scale": parameters.guidance_scale + offset})
        if wrong.does_guidance or parameters.does_guidance:
            assert distance(engine_latents(parts, wrong, prepare(wrong)), stock) > WRONG
    swapped = replace(parts, scheduler=with_two_steps_swapped(parts.scheduler))
    assert distance(engine_latents(swapped, parameters, prepare(parameters)), stock) > WRONG


SOLO_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("unipc", {}),
    "seed-0": ("unipc", {"seed": 0}),
    "largest-seed": ("unipc", {"seed": 2**53 - 1}),
    "two-steps": ("unipc", {"num_inference_steps": 2}),
    "thirty-steps": ("unipc", {"num_inference_steps": 30}),
    "guidance-off": ("unipc", {"guidance_scale": 1.0}),
    "guidance-barely-on": ("unipc", {"guidance_scale": 1.1}),
    "guidance-6-shift-8": ("unipc", {"guidance_scale": 6.0, "flow_shift": 8.0}),
    "shift-1": ("unipc", {"flow_shift": 1.0}),
    "empty-negative": ("unipc", {"negative_prompt": ""}),
    "official-negative": ("unipc", {"negative_prompt": WAN_NEGATIVE_PROMPT}),
    "untidy-prompt": ("unipc", {"prompt": "  a  red &amp;lt; circle\u00a0moving\n left "}),
    "wide": ("unipc", {"width": 112, "num_frames": 9}),
    "one-latent-frame-more": ("unipc", {"num_frames": 21}),
    **{name: (name, {}) for name in SCHEDULERS if name not in {"unipc", "heun"}},
    "heun": ("heun", {"flow_shift": 8.0}),  # it divides by the last sigma, and with it by a low shift
    "euler-guidance-off-shift-5": ("euler", {"guidance_scale": 1.0, "flow_shift": 5.0}),
    "dpm-multistep-twelve-steps": ("dpm-multistep", {"num_inference_steps": 12, "seed": 5}),
}


@pytest.mark.parametrize("case", SOLO_CASES)
def test_engine_equals_the_stock_pipeline_when_alone(
    case: str,
    stock_pipeline: WanPipeline,
    generator_parts: GeneratorParts,
    make_engine: "MakeEngine",
    make_probe: "MakeProbe",
    prepare: Prepare,
) -> None:
    scheduler, changes = SOLO_CASES[case]
    parts = replace(generator_parts, scheduler=SCHEDULERS[scheduler])
    probe = make_probe(**{**CLIP, "num_inference_steps": 6, **changes})
    stock_latents, stock_frames = stock_render(stock_pipeline, parts.scheduler, probe.job.parameters)

    make_engine(parts).submit(probe.job)

    assert isinstance(probe.end(), Finished)
    assert distance(probe.latents, stock_latents) <= BOUND
    assert_frames_equal_but_for_ties(probe.frames, stock_frames)
    assert_wrong_renders_are_far(stock_latents, parts, probe.job.parameters, prepare)


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "heun"])
def test_engine_equals_the_stock_pipeline_when_strangers_join_late(
    scheduler: str,
    stock_pipeline: WanPipeline,
    generator_parts: GeneratorParts,
    make_engine: "MakeEngine",
    make_probe: "MakeProbe",
    prepare: Prepare,
    forward_batches: list[int],
) -> None:
    parts = replace(generator_parts, scheduler=SCHEDULERS[scheduler])
    engine = make_engine(parts)
    waiting = [make_probe(f"stranger-{i}", **{**CLIP, **changes}) for i, changes in enumerate(STRANGERS)]
    strangers = list(waiting)

    def one_joins(event: EngineEvent) -> None:
        if isinstance(event, Progress) and waiting:
            engine.submit(waiting.pop(0).job)

    first = make_probe("first", **CLIP, num_inference_steps=10, on_event=one_joins)

    engine.submit(first.job)

    for probe in (first, *strangers):
        assert isinstance(probe.end(), Finished)
        stock_latents, stock_frames = stock_render(stock_pipeline, parts.scheduler, probe.job.parameters)
        assert distance(probe.latents, stock_latents) <= BOUND
        assert_frames_equal_but_for_ties(probe.frames, stock_frames)
        assert_wrong_renders_are_far(stock_latents, parts, probe.job.parameters, prepare)
    assert max(forward_batches) >= 3  # they did share forwards


def test_engine_equals_the_stock_pipeline_when_two_timesteps_are_equal(
    stock_pipeline: WanPipeline,
    generator_parts: GeneratorParts,
    make_parameters: Callable[..., GenerationParameters],
    prepare: Prepare,
) -> None:
    """Many steps and a high shift round neighbours to one integer: who looks a step up by it can lose the place."""
    parameters = make_parameters(num_inference_steps=100, flow_shift=20.0)
    stock_latents, _ = stock_render(stock_pipeline, generator_parts.scheduler, parameters)
    timesteps = stock_pipeline.scheduler.timesteps.tolist()

    latents = engine_latents(generator_parts, parameters, prepare(parameters))

    assert len(set(timesteps)) < len(timesteps)
    assert distance(latents, stock_latents) <= BOUND


def test_frames_depend_on_the_latents(
    stock_pipeline: WanPipeline,
    generator_parts: GeneratorParts,
    make_parameters: Callable[..., GenerationParameters],
) -> None:
    """Else equal frames would say nothing."""
    one, other = (
        stock_render(stock_pipeline, generator_parts.scheduler, make_parameters(seed=seed))[1] for seed in (1, 2)
    )

    assert (np.round(one * 255) != np.round(other * 255)).mean() > 0.1


def test_jobs_of_one_shape_take_fewer_forwards_than_one_by_one(
    make_engine: "MakeEngine",
    make_probe: "MakeProbe",
    forward_batches: list[int],
    registry: CollectorRegistry,
) -> None:
    num_jobs, num_steps = 6, 4
    engine = make_engine()
    followers = [make_probe(f"job-{i}", seed=i) for i in range(1, num_jobs)]

    def bring_the_others(event: EngineEvent) -> None:
        if isinstance(event, Progress) and event.step == 1 and event.stage == "denoise":
            for follower in followers:
                engine.submit(follower.job)

    first = make_probe("job-0", on_event=bring_the_others)

    engine.submit(first.job)

    assert all(isinstance(probe.end(), Finished) for probe in (first, *followers))
    # the first alone, then all together, then the others' last step; each step is two forwards
    assert forward_batches == [1, 1, *[num_jobs] * 2 * (num_steps - 1), num_jobs - 1, num_jobs - 1]
    assert len(forward_batches) < num_jobs * num_steps * 2
    counted = [registry.get_sample_value("wan_forwards_total", {"kind": kind}) for kind in ("cond", "uncond")]
    assert counted == [num_steps + 1, num_steps + 1]
