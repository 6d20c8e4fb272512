"""A finished clip as clients see it."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from schemas.loras import AppliedLora
from schemas.presets import Effort, PresetName


class Timings(BaseModel):
    """Seconds that each stage took. Encoding runs beside decoding, so the parts may add up to more than `total`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queued: float = 0.0
    preprocess: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    upload: float = 0.0
    total: float = 0.0


class Clip(BaseModel):
    """The answer of `POST /generate`. The bytes are behind `output_url` until `expires_at`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip_id: str
    job_id: str
    request_id: str
    output_url: str = Field(description="A presigned URL; anyone who has it can fetch the clip until it expires.")
    expires_at: datetime
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    duration: float = Field(description="Seconds: (num_frames - 1) / fps.")
    seed: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    reproducible: bool
    preset: PresetName = "exact"
    loras: tuple[AppliedLora, ...] = Field(default=(), description="The adapters that it was made with.")
    effort: Effort | None = Field(default=None, description="What it took; null for clips from before it was kept.")
    size_bytes: int
    sha256: str = Field(description="Hex SHA-256 of the MP4 bytes.")
    timings: Timings
