"""Model profiles: what a checkpoint may be asked for. Knows nothing of weights, devices or HTTP.

A profile turns a `GenerateRequest` into `GenerationParameters` or refuses it with the legal values nearest to
what was asked; nothing is rounded or corrected. It is the only place that knows which values are legal.
"""

import secrets
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from schemas.errors import FieldError, InvalidRequest
from schemas.loras import MAX_LORA_WEIGHT, MAX_LORAS, AppliedLora, Lora, LoraName
from schemas.presets import EXACT, Preset, PresetName
from schemas.requests import MAX_SEED, GenerateRequest, GenerationParameters

T = TypeVar("T")

TEMPORAL_STRIDE = 4
"""Wan's VAE packs 4 frames into one latent frame after the first: frame counts are 4k+1."""

DRAWN_SEED_BITS = 32


class Resolution(BaseModel):
    """A legal frame size. width, height: pixels, multiples of 16."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(examples=["480p"])
    aspect_ratio: str = Field(examples=["16:9"])
    width: int = Field(examples=[832])
    height: int = Field(examples=[480])

    def __str__(self) -> str:
        return f"{self.name} {self.aspect_ratio} ({self.width}x{self.height})"


class Defaults(BaseModel):
    """What a request gets where it is silent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: str
    aspect_ratio: str
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    negative_prompt: str
    loras: tuple[AppliedLora, ...] = Field(
        default=(), description="Adapters of every clip, unless a request gives one another weight; 0 leaves it out."
    )


class ModelProfile(BaseModel):
    """A model's name, where its checkpoint comes from, and what it may be asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    hub_id: str | None = Field(description="The checkpoint on the hub, in diffusers' layout; null where there is none.")
    max_sequence_length: int = Field(description="Text tokens; prompts are padded to this many and never cut.")
    resolutions: tuple[Resolution, ...]
    min_num_frames: int
    max_num_frames: int
    fps: tuple[int, ...] = Field(description="Playback rates; Wan's motion is made for 16.")
    min_num_inference_steps: int = Field(default=1, ge=1)
    max_num_inference_steps: int
    min_guidance_scale: float = 1.0
    max_guidance_scale: float
    min_flow_shift: float
    max_flow_shift: float
    defaults: Defaults
    scheduler: Literal["euler"] | None = Field(
        default=None,
        description="`euler`: first-order steps at evenly spaced times, shifted, as few-step models are trained for; "
        "null: the checkpoint's own.",
    )
    loras: dict[LoraName, Lora] = Field(default={}, description="Adapters that a request may name.")
    presets: dict[PresetName, Preset] = Field(
        default={"exact": EXACT},
        description="What a request's `preset` may name, and what it means; `exact` is always there and has no levers.",
    )

    @field_validator("presets")
    @classmethod
    def _exact_is_exact(cls, presets: dict[PresetName, Preset]) -> dict[PresetName, Preset]:
        if presets.get("exact", EXACT) != EXACT:
            raise ValueError("exact does without nothing: give your levers to balanced or fast")
        return {"exact": EXACT, **presets}

    @model_validator(mode="after")
    def _presets_can_be_served(self) -> "ModelProfile":
        for name, preset in self.presets.items():
            steps = _or(preset.num_inference_steps, self.min_num_inference_steps)
            if steps > self.max_num_inference_steps:
                raise ValueError(f"preset {name} takes more than max_num_inference_steps")
            if steps < self.min_num_inference_steps:
                raise ValueError(f"preset {name} takes fewer than min_num_inference_steps")
        return self

    @model_validator(mode="after")
    def _default_loras_are_known(self) -> "ModelProfile":
        unknown = [lora.name for lora in self.defaults.loras if lora.name not in self.loras]
        if unknown:
            raise ValueError(f"defaults.loras names {', '.join(unknown)}, which loras lacks")
        return self

    def resolve(
        self,
        request: GenerateRequest,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(DRAWN_SEED_BITS),
    ) -> GenerationParameters:
        """Fill in the defaults and check every value. Raises InvalidRequest with one FieldError per bad field."""
        errors: list[FieldError] = []
        preset = self._preset(request, errors)
        size = self._size(request, errors)
        fps = request.fps if request.fps is not None else self.defaults.fps
        fps_is_legal = fps in self.fps
        if not fps_is_legal:
            errors.append(self._refusal("fps", f"{fps} is not offered", nearest_values(fps, self.fps)))
        num_frames = self._num_frames(request, fps if fps_is_legal else None, errors)
        steps = _or(request.num_inference_steps, _or(preset.num_inference_steps, self.defaults.num_inference_steps))
        fewest, most = self.min_num_inference_steps, self.max_num_inference_steps
        self._check_range("num_inference_steps", steps, fewest, most, errors)
        guidance_scale = _or(request.guidance_scale, self.defaults.guidance_scale)
        self._check_range("guidance_scale", guidance_scale, self.min_guidance_scale, self.max_guidance_scale, errors)
        flow_shift = _or(request.flow_shift, self.defaults.flow_shift)
        self._check_range("flow_shift", flow_shift, self.min_flow_shift, self.max_flow_shift, errors)
        loras = self._loras(request, errors)
        if errors or size is None or num_frames is None:
            raise InvalidRequest(errors)
        return GenerationParameters(
            prompt=request.prompt,
            negative_prompt=_or(request.negative_prompt, self.defaults.negative_prompt),
            width=size.width,
            height=size.height,
            num_frames=num_frames,
            fps=fps,
            seed=request.seed if request.seed is not None else draw_seed(),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            flow_shift=flow_shift,
            reproducible=request.reproducible or request.preset == "exact",
            preset=request.preset or "exact",
            levers=preset.levers,
            loras=loras,
        )

    def legal(self, field: str) -> str | None:
        """What `field` may hold, in words; None for a field that no profile bounds."""
        sizes = ", ".join(f"{r.width}x{r.height}" for r in self.resolutions)
        lengths = f"4k+1 from {self.min_num_frames} to {self.max_num_frames}"
        if self.min_num_frames == self.max_num_frames:
            lengths = str(self.min_num_frames)
        words = {
            "num_frames": lengths,
            "duration": f"(num_frames - 1) / fps seconds, num_frames {lengths}",
            "fps": "one of " + ", ".join(map(str, self.fps)),
            "resolution": "one of " + ", ".join(unique(r.name for r in self.resolutions)),
            "aspect_ratio": "one of " + ", ".join(unique(r.aspect_ratio for r in self.resolutions)),
            "width": f"with height, one of {sizes}",
            "height": f"with width, one of {sizes}",
            "num_inference_steps": f"{self.min_num_inference_steps} to {self.max_num_inference_steps}",
            "guidance_scale": f"{self.min_guidance_scale:g} to {self.max_guidance_scale:g}",
            "flow_shift": f"{self.min_flow_shift:g} to {self.max_flow_shift:g}",
            "seed": f"0 to {MAX_SEED}",
            "preset": "one of " + ", ".join(self.presets),
            "loras": f"up to {MAX_LORAS} of {', '.join(self.loras)}, weights from {-MAX_LORA_WEIGHT:g} to "
            f"{MAX_LORA_WEIGHT:g}"
            if self.loras
            else "none",
        }
        return words.get(field)

    def _refusal(self, field: str, message: str, nearest: tuple[float | int | str, ...] = ()) -> FieldError:
        hint = f"; nearest: {', '.join(map(_plain, nearest))}" if nearest else ""
        legal = self.legal(field)
        return FieldError(field=field, message=f"{message}; legal: {legal}{hint}", legal=legal, nearest=nearest or None)

    def _check_range(self, field: str, value: float, low: float, high: float, errors: list[FieldError]) -> None:
        if not low <= value <= high:
            bound = low if value < low else high
            errors.append(self._refusal(field, f"{value:g} is out of range", (bound,)))

    def _preset(self, request: GenerateRequest, errors: list[FieldError]) -> Preset:
        """The one that is named; a request that names none gets what `exact` does."""
        if request.preset is not None and request.preset not in self.presets:
            errors.append(self._refusal("preset", f"{self.name} has no {request.preset!r}", tuple(self.presets)))
        return self.presets.get(request.preset or "exact", EXACT)

    def _loras(self, request: GenerateRequest, errors: list[FieldError]) -> tuple[AppliedLora, ...]:
        """The profile's own and the request's, whose weights go first."""
        weights = {lora.name: lora.weight for lora in self.defaults.loras}
        for choice in request.loras or ():
            if choice.name in self.loras:
                weights[choice.name] = _or(choice.weight, self.loras[choice.name].weight)
            else:
                errors.append(self._refusal("loras", f"{self.name} has no {choice.name!r}"))
        return tuple(AppliedLora(name=name, weight=weight) for name, weight in sorted(weights.items()) if weight)

    def _size(self, request: GenerateRequest, errors: list[FieldError]) -> Resolution | None:
        if request.width is not None and request.height is not None:
            return self._size_by_pixels(request.width, request.height, errors)
        name = request.resolution or self.defaults.resolution
        named = [r for r in self.resolutions if r.name == name]
        if not named:
            errors.append(self._refusal("resolution", f"{name!r} is not one of {self.name}"))
            return None
        ratio = request.aspect_ratio or self.defaults.aspect_ratio
        for resolution in named:
            if resolution.aspect_ratio == ratio:
                return resolution
        ratios = tuple(r.aspect_ratio for r in named)
        errors.append(self._refusal("aspect_ratio", f"{name} has no {ratio!r}", ratios))
        return None

    def _size_by_pixels(self, width: int, height: int, errors: list[FieldError]) -> Resolution | None:
        for resolution in self.resolutions:
            if (resolution.width, resolution.height) == (width, height):
                return resolution
        by_distance = sorted(self.resolutions, key=lambda r: abs(r.width - width) + abs(r.height - height))
        nearest = tuple(f"{r.width}x{r.height}" for r in by_distance[:2])
        for field in ("width", "height"):
            errors.append(self._refusal(field, f"{width}x{height} is not a size of {self.name}", nearest))
        return None

    def _num_frames(self, request: GenerateRequest, fps: int | None, errors: list[FieldError]) -> int | None:
        """fps: None where it was refused; a duration can't be judged then."""
        if request.duration is not None:
            if fps is None:
                return None
            wanted = request.duration * fps + 1
            legal = [n for n in self.frame_counts() if abs(n - wanted) < 1e-6]
            if not legal:
                seconds = tuple((n - 1) / fps for n in nearest_values(wanted, self.frame_counts()))
                reason = f"{request.duration:g} s at {fps} fps is not a legal length"
                errors.append(self._refusal("duration", reason, seconds))
                return None
            return legal[0]
        num_frames = _or(request.num_frames, self.defaults.num_frames)
        if num_frames not in self.frame_counts():
            nearest = nearest_values(num_frames, self.frame_counts())
            errors.append(self._refusal("num_frames", f"{num_frames} is not legal", nearest))
            return None
        return num_frames

    def frame_counts(self) -> range:
        """All legal `num_frames`."""
        return range(self.min_num_frames, self.max_num_frames + 1, TEMPORAL_STRIDE)


def nearest_values(value: float, legal: Iterable[int]) -> tuple[int, ...]:
    """The legal neighbours of `value`, ascending: the one below and the one above, where there are any."""
    ordered = sorted(legal)
    below = [v for v in ordered if v <= value][-1:]
    above = [v for v in ordered if v > value][:1]
    return tuple(below + above)


def unique(values: Iterable[str]) -> list[str]:
    """The distinct values in their order."""
    return list(dict.fromkeys(values))


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _plain(value: float | int | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
