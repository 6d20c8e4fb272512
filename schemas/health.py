"""What `GET /health` answers."""

from datetime import datetime
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


class LastError(_Part):
    """The last job that failed through no fault of its request: the problem's type, without its prefix, and when."""

    error: str
    job_id: str
    at: datetime


class Health(_Part):
    status: Literal["ok", "unavailable"]
    reason: str | None
    model: ModelHealth
    gpu: GpuHealth | None
    queue: QueueHealth
    storage: StorageHealth
    last_error: LastError | None
    uptime_s: float
    versions: dict[str, str]
