"""What diffusers' own pipeline is asked for, by the benchmarks and the tests."""

from typing import Any

import torch

from schemas.requests import GenerationParameters


def stock_arguments(parameters: GenerationParameters, max_sequence_length: int) -> dict[str, Any]:
    """`WanPipeline`'s, all but the form of its output; flow shift is its scheduler's."""
    return {
        "prompt": parameters.prompt,
        "negative_prompt": parameters.negative_prompt,
        "width": parameters.width,
        "height": parameters.height,
        "num_frames": parameters.num_frames,
        "num_inference_steps": parameters.num_inference_steps,
        "guidance_scale": parameters.guidance_scale,
        "generator": torch.Generator("cpu").manual_seed(parameters.seed),
        "max_sequence_length": max_sequence_length,
    }
