"""The key scheme: how objects are named, and which names there can be. Knows no store.

jobs/{job_id}.json                    a job's record
clips/{clip_id}/{attempt_token}.mp4   the clip that one attempt at the job made
"""

import re
from typing import Final, NamedTuple

from schemas.jobs import ID_PATTERN
from storage.store import InvalidKey

MAX_KEY_CHARS: Final = 512
MAX_SEGMENT_CHARS: Final = 255
"""NAME_MAX of the usual file systems; S3 has no such bound."""

_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_KEY: Final = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_JOB_ID: Final = re.compile(rf"job_{ID_PATTERN}")
_CLIP: Final = re.compile(rf"clips/(clip_{ID_PATTERN})/([A-Za-z0-9_-]{{1,64}})\.mp4")


class ClipName(NamedTuple):
    """What a clip's key says."""

    clip_id: str
    attempt_token: str


def check_key(key: str) -> str:
    """Return `key`. Raises InvalidKey.

    A key is at most 512 characters: segments of ASCII letters, digits, `_`, `-` and, not in front, `.`,
    joined by `/`. So it has no empty or hidden segment and no `..`, and joined to a folder it stays inside.
    """
    if len(key) > MAX_KEY_CHARS or not _KEY.fullmatch(key) or ".." in key:
        raise InvalidKey
    if any(len(segment) > MAX_SEGMENT_CHARS for segment in key.split("/")):
        raise InvalidKey
    return key


def job_key(job_id: str) -> str:
    """The key of a job's record. Raises InvalidKey for anything but `job_` and 32 hex digits."""
    if not _JOB_ID.fullmatch(job_id):
        raise InvalidKey
    return f"jobs/{job_id}.json"


def clip_key(clip_id: str, attempt_token: str) -> str:
    """The key of a clip. Raises InvalidKey unless `parse_clip_key` would give back the same parts."""
    key = f"clips/{clip_id}/{attempt_token}.mp4"
    if parse_clip_key(key) != (clip_id, attempt_token):
        raise InvalidKey
    return key


def parse_clip_key(key: str) -> ClipName:
    """The parts of a clip's key: `clip_` and 32 hex digits, and a token of 1 to 64 letters, digits, `_`, `-`.

    Raises InvalidKey.
    """
    match = _CLIP.fullmatch(key)
    if match is None:
        raise InvalidKey
    return ClipName(match[1], match[2])
