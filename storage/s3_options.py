"""How to reach an S3 bucket: everything but secrets, safe to hand to a deployment, to log and to show."""

import re
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MIN_PART_BYTES: Final = 5 * 2**20
MAX_PART_BYTES: Final = 5 * 2**30
"""S3's bounds for a part, and 5 GiB for one PUT."""

MAX_PREFIX_CHARS: Final = 200
"""A key has 512 characters at most (`storage.keys`), S3's names 1024 bytes, a lifecycle rule's id 255."""

_PREFIX: Final = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)*")


def _origin(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL such as https://s3.example.com or http://127.0.0.1:9000")
    if "@" in parts.netloc:
        raise ValueError("must not hold credentials: they come from the environment")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("must be scheme, host and port only; the bucket has its own setting")
    return f"{parts.scheme}://{parts.netloc}"


def _folder_prefix(prefix: str) -> str:
    if not _PREFIX.fullmatch(prefix):
        raise ValueError("must be empty, or segments of letters, digits, `_`, `-` and `.`, each followed by `/`")
    return prefix


Origin = Annotated[str, AfterValidator(_origin)]


class S3Options(BaseModel):
    """Where the bucket is, and how patient the service is with it.

    A request that is never answered costs `connect_timeout_s` or `read_timeout_s`, once: what failed is only
    repeated within `read_timeout_s` of its beginning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: Origin = Field(description="The S3 server: scheme, host and port.")
    public_endpoint: Origin | None = Field(
        default=None, description="What clients call the same server; presigned URLs begin with it. Else `endpoint`."
    )
    region: str = Field(default="us-east-1", pattern=r"^[A-Za-z0-9_-]{1,63}$", description="Part of each signature.")
    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", description="The bucket's name.")
    prefix: Annotated[str, AfterValidator(_folder_prefix)] = Field(
        default="", max_length=MAX_PREFIX_CHARS, description="Everything of ours lies below it, such as `wan/`."
    )
    ca_file: Path | None = Field(
        default=None, description="Certificate authorities in PEM, trusted instead of the public ones."
    )
    connect_timeout_s: float = Field(default=2.0, gt=0, description="For the TCP and TLS handshake.")
    read_timeout_s: float = Field(default=30.0, gt=0, description="For each silence of the server.")
    check_timeout_s: float = Field(default=5.0, gt=0, description="The same for the readiness check.")
    retries: int = Field(default=2, ge=0, description="How often a failed request is repeated.")
    part_size_bytes: int = Field(
        default=32 * 2**20,
        ge=MIN_PART_BYTES,
        le=MAX_PART_BYTES,
        description="Larger clips go up in parts of this size, each held in memory.",
    )
    max_connections: int = Field(default=32, ge=1, description="Kept open; as many as threads use the store.")
    quoted_etags: bool = Field(
        default=True,
        description="Whether If-Match quotes the ETag, as HTTP wants it; `s3_setup.prepare_bucket` finds out.",
    )
