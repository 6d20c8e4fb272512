"""What `GET /health` answers."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelHealth(_Part):
    profile: str
    revision: str | None
    loaded: bool
    dtype: str | None
    device: str | None


class GpuHealth(_Part):
    name: str
    memory_total_bytes: int
    memory_used_bytes: int


class QueueHealth(_Part):
    waiting: int
    running: int
    capacity: int


class StorageHealth(_Part):
    kind: str
    reachable: bool


class GeneratorHealth(_Part):
    """The generator's own word, as it crosses the handle."""

    model: ModelHealth
    gpu: GpuHealth | None
    last_error: str | None


class Health(_Part):
    status: Literal["ok", "unavailable"]
    reason: str | None
    model: ModelHealth
    gpu: GpuHealth | None
    queue: QueueHealth
    storage: StorageHealth
    last_error: str | None
    uptime_s: float
    versions: dict[str, str]
