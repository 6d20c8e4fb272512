"""Presets: how much of the exact computation a clip may do without, and what doing without it saved.

A profile says what each name means (`ModelProfile.presets`). `exact` is everywhere the same: it does without nothing,
and equals diffusers' `WanPipeline`, unless the process quantises (`engine.int8_weights`, some attention backends).
Knows no tensor; `serve_graph.engine` does what is said here.
"""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PresetName = Literal["exact", "balanced", "fast"]

Share = Annotated[float, Field(ge=0, le=1)]


class Levers(BaseModel):
    """What a preset does without, or does in another way; as it is made here, nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    guidance_interval: tuple[Share, Share] | None = Field(
        default=None,
        description="Guidance only from this share of the steps to that one; null: on all of them. "
        "Source: Kynkäänniemi et al. 2024, Applying guidance in a limited interval.",
    )
    batched_guidance: bool = Field(
        default=False, description="Both of a guided step's forwards as one of twice the rows."
    )
    one_key_padding: bool = Field(
        default=False,
        description="A prompt's padding as one key of as much weight, and keys of the prompt made once per clip; "
        "the same but for rounding.",
    )
    first_block_threshold: float | None = Field(
        default=None,
        gt=0,
        description="A forward ends after its first block where that changed by less than this share since the last "
        "whole one, whose rest is taken again; null: never.",
    )
    bfloat16_decode: bool = Field(default=False, description="Frames by a copy of the VAE in bfloat16.")

    @model_validator(mode="after")
    def _interval_ascends(self) -> "Levers":
        if self.guidance_interval is not None and self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError("guidance_interval begins behind its end")
        return self

    @property
    def of_a_forward(self) -> "Levers":
        """Those that change what one forward computes; the others are each job's own affair."""
        return self.model_copy(update={"guidance_interval": None, "bfloat16_decode": False})

    def guides(self, step: int, num_steps: int) -> bool:
        """Whether guidance, where it is on, applies at a step (from 0): the interval holds the middle of the step."""
        if self.guidance_interval is None:
            return True
        first, last = self.guidance_interval
        return first <= (step + 0.5) / num_steps <= last

    def guided_steps(self, num_steps: int) -> int:
        """How many of so many steps have guidance where it is on."""
        return sum(self.guides(step, num_steps) for step in range(num_steps))


NO_LEVERS: Final = Levers()


class Preset(BaseModel):
    """A preset of a profile. What a request says itself goes before its steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_inference_steps: int | None = Field(default=None, ge=1, description="In place of the profile's default.")
    levers: Levers = NO_LEVERS


EXACT: Final = Preset()


class Effort(BaseModel):
    """What rendering a clip took.

    forwards: of the transformer, one per step and another per guided step, also where the two are one call.
    cached_forwards: those of them that ended after the first block.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(description="Denoising steps.")
    guided_steps: int = Field(description="Those with guidance, which takes a second forward.")
    forwards: int = Field(description="Forwards of the transformer, both of a guided step counted.")
    cached_forwards: int = Field(description="Those that ended after the first block.")
