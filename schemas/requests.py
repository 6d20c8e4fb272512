"""What a client may send, and what it means once the model's profile has had its say."""

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from schemas.loras import MAX_LORA_WEIGHT, MAX_LORAS, AppliedLora
from schemas.presets import NO_LEVERS, Levers, PresetName
from schemas.webhook_url import MAX_WEBHOOK_URL_CHARS, WebhookUrl

MAX_PROMPT_CHARS = 2_000
MAX_SEED = 2**53 - 1
"""The largest integer that every JSON parser keeps exactly (RFC 8259, section 6); bounds every integer here."""

MIN_URL_TTL_S = 1
MAX_URL_TTL_S = 7 * 24 * 3600
"""S3's own bounds for a presigned URL."""

MAX_DEADLINE_S = 7 * 24 * 3600

Priority = Literal["low", "normal", "high"]
"""A class: among jobs that have not waited for too long, any of a higher one goes before all of a lower."""


def _without_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain the NUL character")
    return text


def _whole_or_float(value: object) -> object:
    """JSON has one number type: 5 is a duration as good as 5.0. Strings and booleans stay refused."""
    return float(value) if type(value) is int and abs(value) <= MAX_SEED else value


_ANY_TEXT = WithJsonSchema({"type": "string"})
_SOME_TEXT = WithJsonSchema({"type": "string", "minLength": 1})
"""A maximum holds once white space around the text is gone, which JSON Schema has no word for: descriptions say it."""

Text = Annotated[str, Field(strict=True, max_length=MAX_PROMPT_CHARS), AfterValidator(_without_nul), _ANY_TEXT]
Prompt = Annotated[
    str,
    Field(strict=True, min_length=1, max_length=MAX_PROMPT_CHARS),
    AfterValidator(_without_nul),
    _SOME_TEXT,
]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=16), _SOME_TEXT]
Int = Annotated[int, Field(strict=True, le=MAX_SEED)]
Float = Annotated[float, BeforeValidator(_whole_or_float), Field(strict=True, allow_inf_nan=False)]


class LoraChoice(BaseModel):
    """An adapter that a request asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    name: Annotated[str, Field(strict=True, min_length=1, max_length=64), _SOME_TEXT] = Field(
        description="One of the profile's; `GET /models` lists them."
    )
    weight: Float | None = Field(
        default=None,
        ge=-MAX_LORA_WEIGHT,
        le=MAX_LORA_WEIGHT,
        description="Times the adapter's own strength; the profile's when absent, 0 leaves out one of its defaults.",
    )


def _each_once(loras: "tuple[LoraChoice, ...]") -> "tuple[LoraChoice, ...]":
    if len({lora.name for lora in loras}) < len(loras):
        raise ValueError("names an adapter twice")
    return loras


Loras = Annotated[tuple[LoraChoice, ...], Field(max_length=MAX_LORAS), AfterValidator(_each_once)]


class GenerateRequest(BaseModel):
    """One clip. Everything but `prompt` has a default in the model's profile, which also says what is legal."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        str_strip_whitespace=True,
        json_schema_extra={
            "examples": [
                {"prompt": "a red circle moving left"},
                {"prompt": "a red circle moving left", "duration": 1, "seed": 7, "url_ttl_s": 600},
                {"prompt": "a red circle moving left", "priority": "high", "deadline_s": 60},
                {"prompt": "a red circle moving left", "preset": "exact"},
            ]
        },
    )

    prompt: Prompt = Field(
        description=f"What to show; at most {MAX_PROMPT_CHARS} characters.", examples=["a red circle moving left"]
    )
    negative_prompt: Text | None = Field(
        default=None, description=f"What to avoid, at most {MAX_PROMPT_CHARS} characters; the model's own when absent."
    )
    duration: Float | None = Field(
        default=None, gt=0, description="Seconds, counted as Wan does: (num_frames - 1) / fps."
    )
    num_frames: Int | None = Field(default=None, ge=1, description="Instead of `duration`; 4k+1.")
    resolution: Name | None = Field(default=None, description="A name of the profile, such as `480p`.")
    aspect_ratio: Name | None = Field(default=None, description="With `resolution`, such as `16:9`.")
    width: Int | None = Field(default=None, ge=1, description="Pixels, with `height`, instead of `resolution`.")
    height: Int | None = Field(default=None, ge=1, description="Pixels, with `width`.")
    fps: Int | None = Field(default=None, ge=1, description="Playback rate, frames per second.")
    seed: Int | None = Field(default=None, ge=0, le=MAX_SEED, description="Drawn and reported when absent.")
    num_inference_steps: Int | None = Field(default=None, ge=1)
    guidance_scale: Float | None = Field(default=None, description="1 turns guidance off.")
    flow_shift: Float | None = Field(default=None)
    preset: PresetName | None = Field(
        default=None,
        description="`balanced` and `fast` take fewer forwards and render another clip; `GET /models` says how. "
        "`exact` equals diffusers' own pipeline, as does a request without a preset, and implies `reproducible`.",
    )
    loras: Loras | None = Field(
        default=None, description="LoRA adapters of the profile's list, beside those that it always takes."
    )
    url_ttl_s: Int | None = Field(
        default=None, ge=MIN_URL_TTL_S, le=MAX_URL_TTL_S, description="Seconds that `output_url` works."
    )
    reproducible: bool = Field(
        default=False,
        strict=True,
        description="Share no forward with other requests, so that the bytes depend on this request alone.",
    )
    webhook_url: WebhookUrl | None = Field(
        default=None,
        description=f"Gets a signed POST once the job ended; at most {MAX_WEBHOOK_URL_CHARS} characters.",
        examples=["https://example.com/hook"],
    )
    priority: Priority = Field(default="normal", description="Jobs of a higher class go first.")
    deadline_s: Float | None = Field(
        default=None,
        gt=0,
        le=MAX_DEADLINE_S,
        description="Seconds from submission after which the clip is of no use: the job then fails. "
        "Jobs with a near deadline go first within their class.",
    )

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> "GenerateRequest":
        if self.duration is not None and self.num_frames is not None:
            raise ValueError("give duration or num_frames, not both")
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together")
        if self.width is not None and (self.resolution is not None or self.aspect_ratio is not None):
            raise ValueError("give resolution with aspect_ratio, or width and height, not both")
        return self


class GenerationParameters(BaseModel):
    """Everything the output depends on, with every default filled in. Made by `ModelProfile.resolve` only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    reproducible: bool
    preset: PresetName = "exact"
    levers: Levers = Field(default=NO_LEVERS, description="What the preset meant when the request was taken.")
    loras: tuple[AppliedLora, ...] = Field(default=(), description="In the order of their names; none of weight 0.")

    @property
    def duration(self) -> float:
        """Seconds as Wan counts them: (num_frames - 1) / fps."""
        return (self.num_frames - 1) / self.fps

    @property
    def does_guidance(self) -> bool:
        """Whether a second, unconditional forward is needed. Source: diffusers pipeline_wan.py."""
        return self.guidance_scale > 1.0

    @property
    def guided_steps(self) -> int:
        """Steps that need it."""
        return self.levers.guided_steps(self.num_inference_steps) if self.does_guidance else 0


def url_ttl(request: GenerateRequest, default: timedelta) -> timedelta:
    """How long this request's URLs work."""
    return default if request.url_ttl_s is None else timedelta(seconds=request.url_ttl_s)
