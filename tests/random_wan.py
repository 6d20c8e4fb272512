"""The suite's own model: the real classes with random weights, so small that a clip takes milliseconds.

Its profile allows much more than the shipped tiny Wan's, since what it renders is texture anyway.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from schemas.model_profile import ModelProfile, Resolution
from schemas.official_profiles import WAN_1_3B, WAN_TINY

RANDOM_WAN = WAN_TINY.model_copy(
    update={
        "name": "wan-random",
        "min_num_frames": WAN_1_3B.min_num_frames,
        "max_num_frames": WAN_1_3B.max_num_frames,
        "resolutions": (
            Resolution(name="64p", aspect_ratio="1:1", width=64, height=64),
            Resolution(name="64p", aspect_ratio="16:9", width=112, height=64),
            Resolution(name="64p", aspect_ratio="9:16", width=64, height=112),
            Resolution(name="128p", aspect_ratio="1:1", width=128, height=128),
        ),
    }
)


def model_settings(profile: ModelProfile = RANDOM_WAN) -> dict[str, Any]:
    """The settings `model.*` of a service that serves it. The checkpoint is made where it isn't there yet."""
    from random_checkpoint import build_random_checkpoint

    folder = build_random_checkpoint(Path(tempfile.gettempdir()) / f"wan-tests-{os.getuid()}")
    return {"profile": profile.model_dump(mode="json"), "path": str(folder)}


def model_variables(profile: ModelProfile = RANDOM_WAN) -> dict[str, str]:
    """The same, as variables of the environment."""
    settings = model_settings(profile)
    return {"WAN_MODEL__PROFILE": json.dumps(settings["profile"]), "WAN_MODEL__PATH": settings["path"]}
