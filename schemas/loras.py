"""LoRA adapters: which a profile allows, and which a clip was made with. Knows no tensor.

A request names adapters of the profile's list and nothing else: neither paths nor hub ids come over the wire.
"""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

MAX_LORAS: Final = 4
"""In one request. Each adds two small products to each of its layers."""

MAX_LORA_WEIGHT: Final = 2.0
"""Of either sign. Beyond it adapters leave what they were trained for."""

LoraName = Annotated[str, Field(max_length=64, pattern=r"^[a-z0-9][a-z0-9._-]*$")]
LoraWeight = Annotated[float, Field(ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT, allow_inf_nan=False)]


class Lora(BaseModel):
    """An adapter that a profile allows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str = Field(default="", description="What it does, for whom may ask for it.")
    weight: LoraWeight = Field(default=1.0, description="Where a request gives none.")
    hub_id: str | None = Field(default=None, description="Its repository on the hub; null where it is no hub's.")
    weight_name: str | None = Field(default=None, description="Its safetensors file in the repository or folder.")
    revision: str | None = Field(default=None, description="The hub's revision; null: the newest.")
    size_bytes: int | None = Field(default=None, ge=0, description="Of the file, for `wan-serve plan`.")


class AppliedLora(BaseModel):
    """An adapter of one clip."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: LoraName
    weight: LoraWeight = Field(description="Its share of the adapter's own strength.")
