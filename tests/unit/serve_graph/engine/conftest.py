"""What several of the engine's tests make."""

from collections.abc import Callable
from typing import Any

import pytest
from random_wan import RANDOM_WAN

from schemas.handoff import PreparedPrompt
from schemas.presets import NO_LEVERS, Levers
from schemas.requests import GenerationParameters
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.denoise import Denoising


@pytest.fixture
def make_denoising(
    generator_parts: GeneratorParts,
    make_parameters: Callable[..., GenerationParameters],
    prepare: Callable[[GenerationParameters], PreparedPrompt],
) -> Callable[..., Denoising]:
    """Make a job's denoising state, on the shared parts or others; keywords as in `make_parameters`."""

    def make(levers: Levers = NO_LEVERS, *, parts: GeneratorParts = generator_parts, **changes: Any) -> Denoising:
        parameters = make_parameters(levers=levers, **changes)
        return Denoising(parts, parameters, prepare(parameters), RANDOM_WAN.max_sequence_length)

    return make
