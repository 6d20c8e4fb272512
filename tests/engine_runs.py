"""The engine's steps without its thread, and how far apart two results are."""

import torch

from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.denoise import Denoising, denoise_step

BOUND = 1e-5
"""Of a `distance`, where two ways of computing are the same but for rounding. Measured: at most 3.2e-6 against the
stock pipeline, alone and batched. The text encoder makes most of it: ours sees the real tokens only, the stock
pipeline's sees the padding under its mask, too."""


def run(parts: GeneratorParts, *jobs: Denoising) -> torch.Tensor:
    """All steps of jobs that share every forward. Returns the first one's latents."""
    while not jobs[0].is_done:
        denoise_step(parts.transformer, jobs)
    return jobs[0].latents


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in units of the expected output's standard deviation; NaN counts as far."""
    return float(((actual - expected).abs().max() / expected.std()).nan_to_num(nan=float("inf")))


def bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
