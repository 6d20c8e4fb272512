"""What fits on which GPU, how long a clip takes there and what it costs, from arithmetic alone. Pure: no torch, no GPU.

*Peak memory* is what lies on the card (weights, for which see `Placement`), plus the larger of what a forward and what
a decode chunk hold beside them (`serve_graph.architecture`), plus two allowances that are no arithmetic: `SLACK` of
those activations, for kernels' workspaces and what the allocator rounds up and fragments, and `CONTEXT_BYTES` for each
process on the card. It is for one clip at a time; a second decode that is open keeps `Vae.feature_bytes` more. Latents,
embeddings and the text encoder's activations (a third of a GB for eight prompts) are within the allowances.

*Not counted* is what a request's levers add: `batched_guidance` doubles a forward's activations, and with
`first_block_threshold` each job that has begun keeps two tensors of tokens x dim for each of its two predictions (and
in a step the new ones beside them), 2.9 GiB for 14B at 720p and 81 frames in bfloat16. Nor is the saving of weights in
int8, with which a service plans nothing.

*The floor* is the FLOP of all forwards, the decode and the text encoder where it is on the GPU, over the card's dense
bfloat16 peak: no real run is quicker without doing less. *Expected* is the floor over `EFFICIENCY`: an estimate.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, NamedTuple

from schemas.model_profile import ModelProfile, Resolution
from serve_graph.architecture import ARCHITECTURES, Architecture, num_tokens

EFFICIENCY: Final = 0.4
"""Of the dense bfloat16 peak that a real run reaches. An assumption and no measurement of ours. Wan 2.1's README gives
about 4 minutes on an RTX 4090 for 480p and 81 frames with the 1.3B model, which is 0.71 of that card's 165 TFLOP/s;
larger cards are usually further from their peak."""

SLACK: Final = 0.1
"""Of the activations, on top of them. An allowance, not a measurement."""

CONTEXT_BYTES: Final = 600 * 2**20
"""CUDA's context, its kernels and cuBLAS's workspace, for each process on a card. An allowance, not a measurement."""


class Gpu(NamedTuple):
    """A card. memory_bytes: what torch reports, rounded down. flops: dense bfloat16 operations per second."""

    name: str
    memory_bytes: int
    flops: float


GPUS: Final = {
    gpu.name: gpu
    for gpu in (
        Gpu("L4", int(22.0 * 2**30), 121e12),
        Gpu("A100-40GB", int(39.3 * 2**30), 312e12),
        Gpu("A100-80GB", int(79.1 * 2**30), 312e12),
        Gpu("H100", int(79.0 * 2**30), 989.4e12),
    )
}
"""From small to large. Sources of the peaks: NVIDIA's data sheets of the L4 (242 TFLOP/s with sparsity, so half of it
dense), of the A100 (312), of the H100 SXM (1,979 with sparsity; the PCIe card has less, for which the floor still is
one). Of the memory: what torch's errors name as total capacity of such cards."""


def card_named(name: str, memory_bytes: int) -> Gpu | None:
    """The card that torch calls so, such as `NVIDIA A100-SXM4-40GB`; None for one that is not in `GPUS`."""
    words = re.split(r"[ -]", name)
    for card in GPUS.values():
        if card.name.partition("-")[0] in words and memory_bytes < 1.2 * card.memory_bytes:
            return card
    return None


@dataclass(frozen=True)
class Placement:
    """Which dtypes, and what lies on the GPU. The transformer always does.

    text_on_gpu: the text encoder lies there, in a process of its own; else in the host's memory. vae_moves: the VAE is
    there only while it decodes; the engine keeps it there, so this is for comparison. has_bfloat16_vae: a
    second copy of the VAE lies there, for presets. lora_bytes: of LoRA adapters beside the transformer.
    """

    dtype: str = "bfloat16"
    vae_dtype: str = "float32"
    text_dtype: str = "float32"
    text_on_gpu: bool = False
    vae_moves: bool = False
    has_bfloat16_vae: bool = False
    lora_bytes: int = 0


class Clip(NamedTuple):
    """What is asked for, as far as memory and time go. guided_steps: those that take a second forward."""

    width: int
    height: int
    num_frames: int
    steps: int
    guided_steps: int

    @property
    def forwards(self) -> int:
        return self.steps + self.guided_steps

    @property
    def tokens(self) -> int:
        """Latent tokens of one forward."""
        return num_tokens(self.width, self.height, self.num_frames)


@dataclass(frozen=True)
class Flop:
    """Floating-point operations of one clip. text: of all its prompts, at their longest."""

    denoise: int
    decode: int
    text: int

    @property
    def total(self) -> int:
        return self.denoise + self.decode + self.text


@dataclass(frozen=True)
class Footprint:
    """Bytes. The parts' weights wherever they lie; what lies on the GPU all the time; what is alive beside it."""

    transformer: int
    vae: int
    text_encoder: int
    resident: int
    host: int
    denoise_activations: int
    decode_activations: int
    peak: int


@dataclass(frozen=True)
class ModelPlan:
    """One profile in one placement, on any card. architecture: see `plan_of`."""

    profile: ModelProfile
    architecture: Architecture
    placement: Placement

    def clip(
        self, resolution: Resolution, num_frames: int, steps: int | None = None, guidance_scale: float | None = None
    ) -> Clip:
        """A clip with the profile's defaults where nothing is given."""
        defaults = self.profile.defaults
        steps = defaults.num_inference_steps if steps is None else steps
        guided = (defaults.guidance_scale if guidance_scale is None else guidance_scale) > 1
        return Clip(resolution.width, resolution.height, num_frames, steps, steps if guided else 0)

    def flop(self, clip: Clip) -> Flop:
        """The work of one clip."""
        parts, rows = self.architecture, self.profile.max_sequence_length
        return Flop(
            denoise=clip.forwards * parts.transformer.forward_flop(clip.tokens, rows),
            decode=parts.vae.decode_flop(clip.width, clip.height, clip.num_frames),
            text=(2 if clip.guided_steps else 1) * parts.text_encoder.flop(rows),
        )

    def floor_s(self, clip: Clip, gpu: Gpu) -> float:
        """Seconds that no run of all these forwards beats on this card; a first-block cache ends some early."""
        flop = self.flop(clip)
        return (flop.denoise + flop.decode + (flop.text if self.placement.text_on_gpu else 0)) / gpu.flops

    def footprint(self, clip: Clip) -> Footprint:
        """Bytes of one clip at a time; see the module's docstring for what is counted."""
        rows = self.profile.max_sequence_length
        return _footprint(self.architecture, self.placement, rows, clip.width, clip.height, clip.tokens)

    def fits(self, clip: Clip, memory_bytes: int) -> bool:
        """Whether one such clip fits on a card of so much memory."""
        return self.footprint(clip).peak <= memory_bytes

    def most_frames(self, clip: Clip, memory_bytes: int) -> int | None:
        """The largest legal frame count that fits at this size; None where none does."""
        counts = reversed(self.profile.frame_counts())
        return next((n for n in counts if self.fits(clip._replace(num_frames=n), memory_bytes)), None)

    def fitting_sizes(self, clip: Clip, memory_bytes: int) -> tuple[Resolution, ...]:
        """The profile's sizes at which so many frames fit."""
        return tuple(
            size
            for size in self.profile.resolutions
            if self.fits(clip._replace(width=size.width, height=size.height), memory_bytes)
        )

    def smallest_clip(self) -> Clip:
        """The clip of the profile that needs the least memory."""
        size = min(self.profile.resolutions, key=lambda r: r.width * r.height)
        return self.clip(size, self.profile.min_num_frames)

    def fits_at_all(self, memory_bytes: int) -> bool:
        """Whether any clip of the profile fits on a card of so much memory."""
        return self.fits(self.smallest_clip(), memory_bytes)

    def nearest(self, clip: Clip, memory_bytes: int) -> tuple[str, ...]:
        """What to change, one thing each, so that such a clip fits; the least change first, another card last."""
        return tuple(self._nearest(clip, memory_bytes))

    def _nearest(self, clip: Clip, memory_bytes: int) -> Iterator[str]:
        frames = self.most_frames(clip, memory_bytes)
        if frames is not None:
            yield f"{frames} frames"
        sizes = self.fitting_sizes(clip, memory_bytes)
        if sizes:
            yield max(sizes, key=lambda size: size.width * size.height).name
        for change, words in self._other_placements():
            if replace(self, placement=replace(self.placement, **change)).fits(clip, memory_bytes):
                yield words
                break
        larger = [gpu.name for gpu in GPUS.values() if gpu.memory_bytes > memory_bytes]
        fitting = [name for name in larger if self.fits(clip, GPUS[name].memory_bytes)]
        if fitting:
            yield f"an {fitting[0]}"

    def _other_placements(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Changes to the placement, what is least missed first."""
        off_gpu, half_vae = {"text_on_gpu": False}, {"vae_dtype": "bfloat16"}
        if self.placement.text_on_gpu:
            yield off_gpu, "the text encoder on the CPU (model.text_device: cpu)"
        if self.placement.vae_dtype == "float32":
            yield half_vae, "the VAE in bfloat16 (model.vae_dtype)"
        if self.placement.dtype == "float32":
            yield {"dtype": "bfloat16"}, "the transformer in bfloat16 (model.dtype)"
        if self.placement.text_on_gpu and self.placement.vae_dtype == "float32":
            yield off_gpu | half_vae, "the text encoder on the CPU and the VAE in bfloat16 (model.vae_dtype)"


# Each request asks, and a batch has thousands of one size; counted anew it takes a millisecond.
@lru_cache(maxsize=1_024)
def _footprint(parts: Architecture, placed: Placement, rows: int, width: int, height: int, tokens: int) -> Footprint:
    transformer = parts.transformer.weight_bytes(placed.dtype)
    vae = parts.vae.weight_bytes(placed.vae_dtype)
    text = parts.text_encoder.weight_bytes(placed.text_dtype)
    resident = transformer + (0 if placed.vae_moves else vae) + (text if placed.text_on_gpu else 0)
    if placed.has_bfloat16_vae:
        resident += parts.vae.weight_bytes("bfloat16")
    resident += placed.lora_bytes
    denoise = parts.transformer.activation_bytes(tokens, rows, placed.dtype)
    decode = parts.vae.activation_bytes(width, height, placed.vae_dtype)
    beside = max((1 + SLACK) * denoise, (1 + SLACK) * decode + (vae if placed.vae_moves else 0))
    return Footprint(
        transformer=transformer,
        vae=vae,
        text_encoder=text,
        resident=resident,
        host=(0 if placed.text_on_gpu else text) + (vae if placed.vae_moves else 0),
        denoise_activations=denoise,
        decode_activations=decode,
        peak=resident + int(beside) + CONTEXT_BYTES * (2 if placed.text_on_gpu else 1),
    )


def needs_bfloat16_vae(profile: ModelProfile, vae_dtype: str) -> bool:
    """Whether the service holds a second copy of the VAE, for presets that decode with it."""
    return vae_dtype != "bfloat16" and any(preset.levers.bfloat16_decode for preset in profile.presets.values())


def lora_bytes(profile: ModelProfile) -> int:
    """Of the adapters whose size the profile knows, as their files have it."""
    return sum(lora.size_bytes or 0 for lora in profile.loras.values())


def plan_of(profile: ModelProfile, placement: Placement) -> ModelPlan | None:
    """None for a profile of one's own: nothing is known of its dimensions."""
    architecture = ARCHITECTURES.get(profile.name)
    return None if architecture is None else ModelPlan(profile, architecture, placement)


@dataclass(frozen=True)
class Row:
    """One clip of a plan. floor_s, expected_s: seconds. cost: as the price. nearest: where it doesn't fit."""

    resolution: str
    width: int
    height: int
    num_frames: int
    bytes: Footprint
    flop: Flop
    fits: bool
    floor_s: float
    expected_s: float
    cost: float | None
    nearest: tuple[str, ...]


def rows(
    plan: ModelPlan,
    gpu: Gpu,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    price_per_hour: float | None = None,
) -> list[Row]:
    """A row per size of the profile, at its default and its longest frame count."""
    profile, made = plan.profile, []
    for size in profile.resolutions:
        for num_frames in sorted({profile.defaults.num_frames, profile.max_num_frames}):
            clip = plan.clip(size, num_frames, steps, guidance_scale)
            fits, floor_s = plan.fits(clip, gpu.memory_bytes), plan.floor_s(clip, gpu)
            expected_s = floor_s / EFFICIENCY
            made.append(
                Row(
                    resolution=f"{size.name} {size.aspect_ratio}",
                    width=size.width,
                    height=size.height,
                    num_frames=num_frames,
                    bytes=plan.footprint(clip),
                    flop=plan.flop(clip),
                    fits=fits,
                    floor_s=floor_s,
                    expected_s=expected_s,
                    cost=None if price_per_hour is None else expected_s * price_per_hour / 3_600,
                    nearest=() if fits else plan.nearest(clip, gpu.memory_bytes),
                )
            )
    return made
