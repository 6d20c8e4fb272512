"""`python -m benchmarks.gpu`: Wan 2.1 in its real dimensions on a GPU, diffusers' pipeline beside the engine's levers.

For a machine without a network: random weights are made on the card, and besides the repository only torch, diffusers,
transformers and PyAV are needed (with numpy, pydantic, psutil and rich); no Ray, no server. A row that fails says why
and the run goes on; the report is written anew after each row, so a machine that is taken away leaves what there is.
`--small` tries all of it on the CPU, with a tiny architecture.
"""

import argparse
import gc
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.video_processor import VideoProcessor
from rich.console import Console

from benchmarks.block import PROMPT_TOKENS
from benchmarks.figures import spread
from benchmarks.gpu_report import (
    Assumption,
    Card,
    ClipRow,
    GpuReport,
    Held,
    StageRow,
    StepRow,
    print_gpu_report,
    write_gpu_report,
)
from benchmarks.machine import machine
from benchmarks.random_parts import (
    random_embedding,
    random_text_encoder,
    random_transformer,
    random_vae,
    wan_scheduler,
)
from schemas.handoff import PreparedPrompt
from schemas.model_profile import ModelProfile, Resolution
from schemas.official_profiles import WAN_1_3B, WAN_14B
from schemas.presets import NO_LEVERS, Levers
from schemas.requests import GenerateRequest, GenerationParameters
from serve_graph.architecture import ARCHITECTURES, Architecture, TextEncoder, Transformer, Vae
from serve_graph.encode import Mp4Writer
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.decode import Decoding, denormalize
from serve_graph.engine.denoise import Denoising, denoise_step, own_scheduler, pad_embedding
from serve_graph.engine.tuning import choose_attention, tune
from serve_graph.plan import CONTEXT_BYTES, EFFICIENCY, SLACK, Clip, ModelPlan, Placement, card_named

OTHER_PEAKS: Final = {"H200": 989.4e12}
"""Dense bfloat16 peaks of cards that `serve_graph.plan` has not. Source: NVIDIA's data sheet of the H200 (1,979 TFLOP/s
with sparsity)."""

NEGATIVE_TOKENS: Final = 120
"""About as many as the official negative prompt has."""

NEVER, ALWAYS = 1e-30, 1e30
"""Thresholds of the first-block cache."""

SIZES = (
    Resolution(name="480p", aspect_ratio="16:9", width=832, height=480),
    Resolution(name="720p", aspect_ratio="16:9", width=1280, height=720),
)
MODELS: Final = {"1.3b": WAN_1_3B, "14b": WAN_14B}

SMALL_SIZES = (
    Resolution(name="32p", aspect_ratio="1:1", width=32, height=32),
    Resolution(name="48p", aspect_ratio="1:1", width=48, height=48),
)
SMALL = WAN_1_3B.model_copy(update={"name": "small", "max_sequence_length": 160})
SMALL_ARCHITECTURE = Architecture(
    Transformer(num_attention_heads=2, ffn_dim=48, num_layers=2, attention_head_dim=12, text_dim=32, freq_dim=64),
    Vae(base_dim=3, decoder_base_dim=3, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
    TextEncoder(vocab_size=512, d_model=32, d_kv=16, num_heads=2, d_ff=64, num_layers=2),
)

_RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "diffusers", "transformers", "av", "torchao", "triton")
_CPU = torch.device("cpu")


class EncodeDefaults(NamedTuple):
    """The service's, whose settings need packages that this benchmark does without."""

    crf: int = 18
    preset: str = "veryfast"
    num_threads: int = 1


@dataclass(frozen=True)
class Model:
    """One to measure, at the sizes that this benchmark has for it."""

    name: str
    plan: ModelPlan

    @property
    def transformer(self) -> Transformer:
        return self.plan.architecture.transformer

    def clip(self, size: Resolution, num_frames: int, steps: int | None = None) -> Clip:
        return self.plan.clip(size, num_frames, steps)


@dataclass(frozen=True)
class Way:
    """How a variant denoises. steps: of a clip; None: the profile's default. tuning: what `tune` is asked for."""

    levers: Levers = NO_LEVERS
    steps: int | None = None
    tuning: dict[str, Any] = field(default_factory=dict)
    is_stock: bool = False


def main_ways(profile: ModelProfile) -> dict[str, Way]:
    """diffusers' own loop, and the presets."""
    presets = {name: Way(preset.levers, preset.num_inference_steps) for name, preset in profile.presets.items()}
    return {"stock": Way(is_stock=True), **presets}


def lever_ways(compile_backend: str) -> dict[str, Way]:
    """Each lever that changes a step, alone."""
    return {
        "batched_guidance": Way(Levers(batched_guidance=True)),
        "one_key_padding": Way(Levers(one_key_padding=True)),
        "guidance_interval 0 to 0.8": Way(Levers(guidance_interval=(0.0, 0.8))),
        "first_block_threshold": Way(Levers(first_block_threshold=NEVER)),
        "engine.fuse_qkv": Way(tuning={"fuse_qkv": True}),
        "engine.attention_backend _native_cudnn": Way(tuning={"attention_backend": "_native_cudnn"}),
        "engine.int8_weights": Way(tuning={"int8_weights": True}),
        "engine.compile regional": Way(tuning={"compile_mode": "regional", "compile_backend": compile_backend}),
    }


DECODES: Final = {
    "stock": ("float32", False),
    "exact": ("float32", False),
    "bfloat16_decode": ("bfloat16", False),
    "engine.vae_channels_last": ("float32", True),
    "bfloat16_decode, engine.vae_channels_last": ("bfloat16", True),
}
"""By variant: the VAE's dtype, and whether its convolutions have the channels last."""


@dataclass
class Budget:
    """Seconds for everything.

    rates: FLOP per second by kind of row: a guess, until `saw` puts what one has reached, overheads included, there.
    """

    seconds: float
    began: float
    rates: dict[str, float]
    spent: bool = False

    def allows(self, kind: str, flop: float, fixed_s: float) -> bool:
        """Whether a row may begin. Once one may not, none may."""
        estimate = fixed_s + 1.2 * flop / self.rates[kind]
        self.spent = self.spent or time.monotonic() - self.began + estimate > self.seconds
        return not self.spent

    def saw(self, kind: str, flop: float, seconds: float) -> None:
        """What a row took."""
        self.rates[kind] = flop / max(seconds, 1e-9)


class Bench:
    """One run: what is on the device, and what was found. tell: called with a line for each row, after it."""

    def __init__(self, options: argparse.Namespace, tell: Callable[[str], None]) -> None:
        self._options, self._tell = options, tell
        self._began, self._created_at, self._machine = time.monotonic(), datetime.now(UTC), machine()
        self._versions = _versions()
        self._device = _CPU if options.small else torch.device("cuda", 0)
        self.card = None if options.small else _card()
        peak = self.card.flops if self.card is not None and self.card.flops is not None else 100e12
        rates = {"steps": EFFICIENCY * peak, "decode": 0.05 * peak, "text": 0.1 * peak}
        self._budget = Budget(options.budget_s, self._began, rates)
        self._num_frames = 5 if options.small else WAN_1_3B.max_num_frames
        self._sizes = SMALL_SIZES if options.small else SIZES
        self._models = _models(options)
        self._held_key: tuple[str, str] | None = None
        self._transformer: WanTransformer3DModel | None = None
        self._vae: AutoencoderKLWan | None = None
        self.steps: list[StepRow] = []
        self.stages: list[StageRow] = []
        self.missing: list[str] = []
        self._context_bytes: int | None = None

    def run(self) -> GpuReport:
        """Measure everything, what takes least first."""
        self._text_rows()
        for _, group in sorted(self._groups(), key=lambda one: one[0]):
            group()
        self._drop()
        return self.report()

    def report(self) -> GpuReport:
        """What was found so far."""
        return GpuReport(
            created_at=self._created_at,
            duration_s=time.monotonic() - self._began,
            try_out=self.card is None,
            machine=self._machine,
            card=self.card,
            versions=self._versions,
            num_frames=self._num_frames,
            steps_timed=self._options.steps_timed,
            budget_s=self._options.budget_s,
            steps=tuple(self.steps),
            stages=tuple(self.stages),
            clips=tuple(self._clips()),
            context_bytes=self._context_bytes,
            assumptions=tuple(self._assumptions()),
            missing=tuple(self.missing),
        )

    def _groups(self) -> Iterator[tuple[float, Callable[[], None]]]:
        """Rows that belong together, and about how much work they are."""
        vae = self._models[0].plan.architecture.vae
        for size in self._sizes:
            flop = vae.decode_flop(size.width, size.height, self._num_frames)
            yield 4.0 * len(DECODES) * flop, partial(self._decode_rows, size)
        compile_backend = "eager" if self._options.small else "inductor"
        for model in self._models:
            for size in self._sizes:
                clip = model.clip(size, self._num_frames)
                if self.card is not None and not model.plan.fits(clip, self.card.memory_bytes):
                    needed = model.plan.footprint(clip).peak / 2**30
                    self.missing.append(f"{model.name} {size.name}: needs {needed:.1f} GiB by `serve_graph.plan`")
                    continue
                for ways in (main_ways(model.plan.profile), lever_ways(compile_backend)):
                    flop = model.plan.flop(clip).denoise / clip.forwards
                    yield 6.0 * len(ways) * flop, partial(self._step_rows, model, size, ways)

    # ---- steps

    def _step_rows(self, model: Model, size: Resolution, ways: dict[str, Way]) -> None:
        forward_flop = model.transformer.forward_flop(
            model.clip(size, self._num_frames).tokens, model.plan.profile.max_sequence_length
        )
        for name, way in ways.items():
            label, flop = f"{model.name} {size.name}, {name}", self._forwards_run(way) * forward_flop
            if not self._may_begin(label, "steps", flop, self._fixed_s(model, way)):
                continue
            began = time.monotonic()
            row = self._step_row(model, size, name, way, forward_flop)
            if row.failed is None and not way.tuning:  # which may have compiled for a minute
                self._budget.saw("steps", flop, time.monotonic() - began)
            self.steps.append(row)
            if self.card is not None:
                self._context_bytes = max(self._context_bytes or 0, _context_bytes())
            self._done(label, row.failed, None if row.guided_s is None else row.guided_s.median)

    def _forwards_run(self, way: Way) -> int:
        """Forwards that the row takes, the warm-up included."""
        timed, first_block = self._options.steps_timed, way.levers.first_block_threshold is not None
        return 2 * (1 + timed) + (timed if way.levers.guidance_interval is not None else 0) + (2 if first_block else 0)

    def _fixed_s(self, model: Model, way: Way) -> float:
        """Seconds beside the forwards: making the weights, and compiling."""
        if self.card is None:
            return 0.0
        compiling = 60.0 if "compile_mode" in way.tuning else 0.0
        return 1.0 + model.transformer.num_parameters / 3e9 + compiling

    def _step_row(self, model: Model, size: Resolution, name: str, way: Way, forward_flop: int) -> StepRow:
        steps = way.steps or model.plan.profile.defaults.num_inference_steps
        row = StepRow(
            model=model.name,
            size=size.name,
            variant=name,
            steps=steps,
            guided_steps=way.levers.guided_steps(steps),
        )
        try:
            found, held = self._step_seconds(model, size, name, way)
        except Exception as error:  # a lever that can't be had here, or no memory for it: the row says so
            failed = _reason(error)
        else:
            return self._filled(row, found, held, forward_flop)
        self._drop()
        return row.model_copy(update={"failed": failed})

    def _step_seconds(
        self, model: Model, size: Resolution, name: str, way: Way
    ) -> tuple[dict[str, list[float]], Held | None]:
        """Seconds of single steps: guided, alone and cached, see `StepRow`."""
        timed = self._options.steps_timed
        try:
            parts = self._parts(model, name if way.tuning else "", way.tuning)
            before = self._begin()
            if way.is_stock:
                return {"guided": self._stock_steps(parts, model, size, timed)}, self._held(before)
            threshold = None if way.levers.first_block_threshold is None else NEVER
            levers = way.levers.model_copy(update={"guidance_interval": None, "first_block_threshold": threshold})
            found = {"guided": self._engine_steps(parts, model, size, levers, warm=1)}
            if way.levers.guidance_interval is not None:
                found["alone"] = self._engine_steps(parts, model, size, levers, warm=0, guided=False)
            held = self._held(before)
            if threshold is not None:
                always = levers.model_copy(update={"first_block_threshold": ALWAYS})
                found["cached"] = self._engine_steps(parts, model, size, always, warm=1, cached=True)
            return found, held
        finally:
            if "attention_backend" in way.tuning and self._transformer is not None:
                choose_attention(self._transformer, "native")  # diffusers made the other one the process's default
            if way.tuning:
                self._drop()
                torch._dynamo.reset()

    def _engine_steps(
        self,
        parts: GeneratorParts,
        model: Model,
        size: Resolution,
        levers: Levers,
        *,
        warm: int,
        guided: bool = True,
        cached: bool = False,
    ) -> list[float]:
        """Of the engine's own steps. Raises RuntimeError where forwards ended early and should not, or the reverse."""
        prompt = self._prompt(model)
        job = Denoising(
            parts,
            self._parameters(model, size).model_copy(update={"levers": levers}),
            prompt if guided else PreparedPrompt(prompt.positive, None),
            model.plan.profile.max_sequence_length,
        )
        seconds = []
        for _ in range(warm + self._options.steps_timed):
            self._wait()
            began = time.perf_counter()
            denoise_step(parts.transformer, [job])
            self._wait()
            seconds.append(time.perf_counter() - began)
        if job.cached_forwards != (2 * self._options.steps_timed if cached else 0):
            raise RuntimeError(f"{job.cached_forwards} forwards ended after the first block")
        return seconds[warm:]

    def _stock_steps(self, parts: GeneratorParts, model: Model, size: Resolution, timed: int) -> list[float]:
        """Of `WanPipeline.__call__`'s loop: from one step's end to the next one's."""
        parameters, prompt = self._parameters(model, size), self._prompt(model)
        rows, dtype = model.plan.profile.max_sequence_length, parts.transformer.dtype
        pipeline = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=parts.vae,
            scheduler=own_scheduler(parts.scheduler, parameters.flow_shift),
            transformer=parts.transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        ends: list[float] = []

        def mark(_pipeline: object, _step: int, _timestep: object, given: dict[str, Any]) -> dict[str, Any]:
            self._wait()
            ends.append(time.perf_counter())
            return given

        pipeline(
            prompt_embeds=pad_embedding(prompt.positive, rows).to(self._device, dtype),
            negative_prompt_embeds=pad_embedding(prompt.negative or prompt.positive, rows).to(self._device, dtype),
            width=size.width,
            height=size.height,
            num_frames=self._num_frames,
            num_inference_steps=1 + timed,
            guidance_scale=parameters.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(parameters.seed),
            output_type="latent",
            callback_on_step_end=mark,
        )
        return [end - before for before, end in pairwise(ends)]

    def _filled(self, row: StepRow, found: dict[str, list[float]], held: Held | None, forward_flop: int) -> StepRow:
        """The row with what was found, and what follows from it."""
        guided = median(found["guided"])
        alone = median(found["alone"]) if "alone" in found else None
        unguided_steps = row.steps - row.guided_steps
        denoise_s = row.guided_steps * guided + unguided_steps * (alone or 0.0)
        half = None if "cached" not in found else denoise_s * (1 + median(found["cached"]) / guided) / 2
        like = [one for one in self.steps if (one.model, one.size, one.variant) == (row.model, row.size, "stock")]
        stock_s = like[0].denoise_s if like else denoise_s if row.variant == "stock" else None
        flops = None if self.card is None else self.card.flops
        return row.model_copy(
            update={
                "guided_s": spread(found["guided"]),
                "alone_s": spread(found["alone"]) if "alone" in found else None,
                "cached_s": spread(found["cached"]) if "cached" in found else None,
                "denoise_s": denoise_s,
                "half_cached_denoise_s": half,
                "of_floor": None if flops is None else 2 * forward_flop / flops / guided,
                "of_stock": None if stock_s is None else denoise_s / stock_s,
                "held": held,
            }
        )

    def _parts(self, model: Model, tuned_as: str, tuning: dict[str, Any]) -> GeneratorParts:
        """With a transformer that has this tuning: that of the last row where it is the same, else a new one."""
        key = (model.name, tuned_as)
        if self._held_key != key or self._transformer is None:
            self._drop()
            self._transformer = random_transformer(model.transformer, self._device, torch.bfloat16)
            self._held_key = key
        if self._vae is None:
            self._vae = random_vae(model.plan.architecture.vae, self._device, torch.float32)
        parts = GeneratorParts(self._transformer, self._vae, wan_scheduler(), self._device)
        if tuning:
            tune(parts, **tuning)
        return parts

    def _drop(self) -> None:
        """Let go of the models."""
        self._transformer = self._vae = self._held_key = None
        self._begin()

    def _parameters(self, model: Model, size: Resolution) -> GenerationParameters:
        asked = GenerateRequest(
            prompt="random", width=size.width, height=size.height, num_frames=self._num_frames, seed=1
        )
        return model.plan.profile.resolve(asked)

    def _prompt(self, model: Model) -> PreparedPrompt:
        text_dim = model.transformer.text_dim
        return PreparedPrompt(
            random_embedding(PROMPT_TOKENS, text_dim, 1), random_embedding(NEGATIVE_TOKENS, text_dim, 2)
        )

    # ---- the other stages

    def _text_rows(self) -> None:
        """The text encoder alone on the card, before anything else is there."""
        plan = self._models[0].plan
        dims, rows = plan.architecture.text_encoder, plan.profile.max_sequence_length
        ways = {
            f"stock: prompt and negative prompt, {rows} rows each": ((PROMPT_TOKENS, rows), (NEGATIVE_TOKENS, rows)),
            f"engine: {PROMPT_TOKENS} tokens, the negative prompt is cached": ((PROMPT_TOKENS, PROMPT_TOKENS),),
        }
        encoder = None
        for name, texts in ways.items():
            flop = sum(dims.flop(length) for _, length in texts)
            fixed_s = 0.0 if self.card is None else 1.0 + dims.num_parameters / 3e9
            if not self._may_begin(f"text, {name}", "text", 3 * flop, fixed_s):
                continue
            try:
                if encoder is None:
                    encoder = random_text_encoder(dims, self._device, torch.bfloat16)
                given = [self._token_ids(dims.vocab_size, *text) for text in texts]
                self._timed_stage("text", "", name, partial(_encode, encoder, given), flop)
            except Exception as error:  # no memory for it: the row says so
                self._failed_stage("text", "", name, error)

    def _token_ids(self, vocab_size: int, num_tokens: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, (1, length) each."""
        ids = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(3))
        mask = (torch.arange(length) < num_tokens).long()[None]
        return ids.to(self._device), mask.to(self._device)

    def _decode_rows(self, size: Resolution) -> None:
        """The VAE alone on the card; and the MP4 of as many frames."""
        self._drop()
        dims = self._models[0].plan.architecture.vae
        flop = dims.decode_flop(size.width, size.height, self._num_frames)
        shape = (1, dims.z_dim, (self._num_frames - 1) // 4 + 1, size.height // 8, size.width // 8)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(self._device)
        for name, (dtype, channels_last) in DECODES.items():
            if not self._may_begin(f"decode {size.name}, {name}", "decode", 1.2 * flop, self._fixed_s_of_decode()):
                continue
            began = time.monotonic()
            try:
                vae = random_vae(dims, self._device, getattr(torch, dtype))
                if channels_last:
                    nothing = torch.nn.Module()  # `tune` leaves the transformer alone
                    tune(GeneratorParts(nothing, vae, wan_scheduler(), self._device), vae_channels_last=True)
                decode = partial(_stock_decode if name == "stock" else _engine_decode, vae)
                decode(latents[:, :, :3])  # the warm-up
                self._timed_stage("decode", size.name, name, partial(decode, latents), flop, warm=False)
                self._budget.saw("decode", 1.2 * flop, time.monotonic() - began)
            except Exception as error:  # no memory for it: the row says so
                self._failed_stage("decode", size.name, name, error)
            vae = decode = None
        self._mp4_row(size)

    def _fixed_s_of_decode(self) -> float:
        return 0.0 if self.card is None else 2.0

    def _mp4_row(self, size: Resolution) -> None:
        if not self._may_begin(f"mp4 {size.name}", "decode", 0.0, 0.0 if self.card is None else 5.0):
            return
        name = f"x264 {EncodeDefaults().preset}, a moving pattern"

        def write(frames: npt.NDArray[np.uint8]) -> None:
            with (
                tempfile.TemporaryDirectory(prefix="wan-bench-") as folder,
                Mp4Writer(
                    Path(folder) / "clip.mp4",
                    width=size.width,
                    height=size.height,
                    fps=16,
                    settings=EncodeDefaults(),  # not the service's class, but all that the writer reads
                    metadata={},
                ) as writer,
            ):
                writer.write(frames)

        try:
            frames = _moving_frames(size, self._num_frames)
            self._timed_stage("mp4", size.name, name, partial(write, frames), None)
        except Exception as error:  # no encoder, or no room for the file: the row says so
            self._failed_stage("mp4", size.name, name, error)

    def _timed_stage(
        self, stage: str, size: str, name: str, work: Callable[[], object], flop: int | None, *, warm: bool = True
    ) -> None:
        if warm:
            work()
        before = self._begin()
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        seconds = time.perf_counter() - began
        flops = None if self.card is None or flop is None else self.card.flops
        of_floor = None if flops is None or flop is None else flop / flops / seconds
        held = None if stage == "mp4" else self._held(before)
        self.stages.append(
            StageRow(stage=stage, size=size, variant=name, seconds=spread([seconds]), of_floor=of_floor, held=held)
        )
        self._done(f"{stage} {size}".strip() + f", {name}", None, seconds)

    def _failed_stage(self, stage: str, size: str, name: str, error: Exception) -> None:
        self.stages.append(StageRow(stage=stage, size=size, variant=name, failed=_reason(error)))
        self._done(f"{stage} {size}".strip() + f", {name}", _reason(error), None)

    # ---- what follows from the rows

    def _clips(self) -> Iterator[ClipRow]:
        """A whole clip of stock and of each preset, where all of its stages were measured."""
        text = {s.variant.partition(":")[0]: s.seconds.median for s in self.stages if s.stage == "text" and s.seconds}
        decode = {(s.size, s.variant): s.seconds.median for s in self.stages if s.stage == "decode" and s.seconds}
        for model in self._models:
            ways = main_ways(model.plan.profile)
            for row in self.steps:
                if row.model != model.name or row.variant not in ways or row.denoise_s is None:
                    continue
                way = ways[row.variant]
                quick = way.levers.bfloat16_decode
                decoded_by = "stock" if way.is_stock else "bfloat16_decode" if quick else "exact"
                text_s, decode_s = text.get("stock" if way.is_stock else "engine"), decode.get((row.size, decoded_by))
                if text_s is None or decode_s is None:
                    continue
                yield ClipRow(
                    model=row.model,
                    size=row.size,
                    variant=row.variant,
                    decode=decoded_by,
                    text_s=text_s,
                    denoise_s=row.denoise_s,
                    half_cached_denoise_s=row.half_cached_denoise_s,
                    decode_s=decode_s,
                    of_floor=self._of_floor(model, row, text_s + row.denoise_s + decode_s),
                )

    def _of_floor(self, model: Model, row: StepRow, seconds: float) -> float | None:
        """Of the FLOP of the steps that the row takes, none cached, and the decode."""
        if self.card is None or self.card.flops is None:
            return None
        flop = model.plan.flop(model.clip(self._size(row.size), self._num_frames, 1))  # of one guided step
        forwards = row.steps + row.guided_steps
        return (forwards * flop.denoise / 2 + flop.decode) / self.card.flops / seconds

    def _assumptions(self) -> Iterator[Assumption]:
        if self._context_bytes is not None:
            yield _gib("CONTEXT_BYTES", "the process", CONTEXT_BYTES, self._context_bytes)
        decodes = {s.size: s for s in self.stages if (s.stage, s.variant) == ("decode", "exact")}
        for model in self._models:
            for row in self.steps:
                if (row.model, row.variant) == (model.name, "exact") and row.size in decodes:
                    clip = model.clip(self._size(row.size), self._num_frames)
                    yield from assumptions(model.plan, clip, row, decodes[row.size], self.card, self._context_bytes)

    def _size(self, name: str) -> Resolution:
        return next(size for size in self._sizes if size.name == name)

    # ---- the device

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _begin(self) -> int:
        """Free what can be freed and count the peak from here. Returns the bytes that are held."""
        if self._device.type != "cuda":
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _held(self, before: int) -> Held | None:
        if self._device.type != "cuda":
            return None
        allocated, reserved = (
            torch.cuda.max_memory_allocated(self._device),
            torch.cuda.max_memory_reserved(self._device),
        )
        return Held(before=before, allocated=allocated, reserved=reserved)

    def _may_begin(self, label: str, kind: str, flop: float, fixed_s: float) -> bool:
        allowed = self._budget.allows(kind, flop, fixed_s)
        if not allowed:
            self.missing.append(f"{label}: beyond the budget of {self._options.budget_s:.0f} s")
        return allowed

    def _done(self, label: str, failed: str | None, seconds: float | None) -> None:
        """A row is there: say so, and write what there is."""
        spent = time.monotonic() - self._began
        self._tell(f"{spent:6.1f} s  {label}: {f'failed: {failed}' if failed else f'{seconds:.3f} s'}")
        write_gpu_report(self.report(), self._options.out)


def assumptions(
    plan: ModelPlan, clip: Clip, step: StepRow, decode: StageRow, card: Card | None, context_bytes: int | None
) -> Iterator[Assumption]:
    """The plan's figures for one clip beside those of `exact`'s rows, where there are any."""
    where, planned = f"{step.model} {step.size}", plan.footprint(clip)
    if card is not None and card.flops is not None and step.denoise_s is not None and decode.seconds is not None:
        flop, seconds = plan.flop(clip), step.denoise_s + decode.seconds.median
        measured = (flop.denoise + flop.decode) / card.flops / seconds
        yield Assumption(name="EFFICIENCY, steps and decode", where=where, assumed=EFFICIENCY, measured=measured)
    if step.held is None or decode.held is None:
        return
    yield _gib("weights on the card", where, planned.resident, step.held.before)
    stages = {"forward": (step.held, planned.denoise_activations), "decode": (decode.held, planned.decode_activations)}
    for name, (held, activations) in stages.items():
        yield _gib(f"activations of a {name}", where, activations, held.allocated - held.before)
        slack = (held.reserved - held.before) / activations - 1
        yield Assumption(name=f"SLACK of a {name}", where=where, assumed=SLACK, measured=slack)
    if context_bytes is not None:
        beside = max(held.reserved - held.before for held in (step.held, decode.held))
        yield _gib("peak of a clip", where, planned.peak, step.held.before + beside + context_bytes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0; 2 where there is no GPU and `--small` was not asked for."""
    options = _parser().parse_args(arguments)
    console = Console()
    if not options.small and not torch.cuda.is_available():
        console.print("no GPU: torch sees none here. --small tries the script on the CPU, with a tiny architecture")
        return 2
    found = Bench(options, lambda line: console.print(line, highlight=False, markup=False)).run()
    write_gpu_report(found, options.out)
    print_gpu_report(found, console)
    return 0


@torch.inference_mode()
def _encode(encoder: torch.nn.Module, texts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """To the host, as the engine's go."""
    return [encoder(ids, mask).last_hidden_state.cpu() for ids, mask in texts]


@torch.inference_mode()
def _stock_decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
    """As the end of `WanPipeline.__call__`, and then to 8 bits. (T, H, W, 3)."""
    video = vae.decode(denormalize(vae, latents), return_dict=False)[0]
    images = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="np")[0]
    frames: npt.NDArray[np.uint8] = (images * 255).round().astype(np.uint8)
    return frames


def _engine_decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> list[npt.NDArray[np.uint8]]:
    decoding, chunks = Decoding(vae, latents), []
    while not decoding.is_done:
        chunks.append(decoding.next_frames())
    return chunks


def _moving_frames(size: Resolution, num_frames: int) -> npt.NDArray[np.uint8]:
    """Waves that move: (T, H, W, 3). Noise, which random weights make, would be no measure of x264."""
    y, x = np.mgrid[: size.height, : size.width] / 24
    phases = np.arange(num_frames)[:, None, None] / 3
    channels = [127.5 + 127.5 * np.sin(x * a + phases) * np.cos(y * b + phases) for a, b in ((1, 1), (2, 1), (1, 3))]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _models(options: argparse.Namespace) -> list[Model]:
    if options.small:
        profile = SMALL.model_copy(update={"resolutions": SMALL_SIZES})
        return [Model("small", ModelPlan(profile, SMALL_ARCHITECTURE, Placement()))]
    chosen = {name: MODELS[name].model_copy(update={"resolutions": SIZES}) for name in options.models}
    return [
        Model(name, ModelPlan(profile, ARCHITECTURES[profile.name], Placement())) for name, profile in chosen.items()
    ]


def _card() -> Card:
    properties = torch.cuda.get_device_properties(0)
    known = card_named(properties.name, properties.total_memory)
    others = (flops for name, flops in OTHER_PEAKS.items() if name in properties.name.split())
    return Card(
        name=properties.name,
        memory_bytes=properties.total_memory,
        driver=_driver(),
        flops=known.flops if known is not None else next(others, None),
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.split("\n")[0].strip()


def _context_bytes() -> int:
    """What is taken of the card and is not torch's; other processes' bytes, too, where there are any."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first[:120].replace("|", "/")


def _gib(name: str, where: str, assumed: int, measured: int) -> Assumption:
    return Assumption(name=name, where=where, assumed=assumed / 2**30, measured=measured / 2**30, unit="GiB")


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(MODELS)}")
    return names


def _positive(text: str) -> int:
    """Not `benchmarks.command`'s, which needs the packages of the service's settings."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--models", type=_names, default=list(MODELS), help="of 1.3b,14b (both)")
    parser.add_argument("--steps-timed", type=_positive, default=2, help="after a warm-up, of each row (%(default)s)")
    parser.add_argument(
        "--budget-s", type=float, default=540.0, help="no row begins that would end later (%(default)s)"
    )
    parser.add_argument("--small", action="store_true", help="a try-out on the CPU, with a tiny architecture")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="folder for gpu.json and gpu.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
