"""What a check of `wan-serve doctor` ends with."""

from dataclasses import dataclass
from enum import Enum


class Mark(Enum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One finding. advice: what to do; empty where nothing needs doing."""

    name: str
    mark: Mark
    found: str
    advice: str = ""
