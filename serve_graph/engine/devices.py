"""Where a part of the model runs, and in which numbers."""

import torch

from schemas.errors import ModelNotReady

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(name: str, setting: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ModelNotReady for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelNotReady(f"{setting} is {name}, and torch sees no GPU: use cpu or auto")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16, Wan's own, on a GPU and float32 on the CPU."""
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" else "float32"
