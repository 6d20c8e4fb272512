"""One block of the real Wan 2.1 1.3B's width with random weights: which levers still pay at size. Measures only."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from benchmarks.random_parts import random_transformer
from schemas.official_profiles import WAN_1_3B
from serve_graph.architecture import ARCHITECTURES, num_tokens
from serve_graph.engine.text_keys import TextKeys
from serve_graph.engine.tuning import fuse_projections

TEXT_TOKENS, PROMPT_TOKENS = 512, 40
TOKENS_PER_LATENT_FRAME = num_tokens(832, 480, 1)
"""At 480p: 30 x 52 patches of 16 x 16 pixels. A clip of 81 frames has 21 latent frames, 32,760 tokens."""

_DIMS = ARCHITECTURES[WAN_1_3B.name].transformer


def block_times(
    latent_frames: int, rounds: int, advance: Callable[[], None], *, with_compile: bool = False
) -> dict[str, list[float]]:
    """Seconds of a guided step's part in one block, by lever, in turns. bfloat16, this process's torch threads.

    with_compile: also compiled by inductor, which happens in the warm-up.
    """
    tokens = latent_frames * TOKENS_PER_LATENT_FRAME
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        block, fused = _block(), _block()
        fuse_projections(fused)
        hidden = torch.randn(1, tokens, _DIMS.dim, generator=generator).bfloat16()
        text = torch.randn(1, TEXT_TOKENS, _DIMS.dim, generator=generator).bfloat16()
        times = torch.randn(1, 6, _DIMS.dim, generator=generator).bfloat16()
        rotary = tuple(torch.rand(1, tokens, 1, _DIMS.attention_head_dim, generator=generator) for _ in range(2))
        heads = (1, PROMPT_TOKENS + 1, _DIMS.num_attention_heads, _DIMS.attention_head_dim)
        keys = TextKeys(torch.randn(heads).bfloat16(), torch.randn(heads).bfloat16(), torch.zeros(1, 1, 1, heads[1]))

        def twice(module: torch.nn.Module, given: torch.Tensor | TextKeys) -> None:
            module(hidden, given, times, rotary)
            module(hidden, given, times, rotary)

        doubled = [torch.cat([part, part]) for part in (hidden, text, times)]
        ways: dict[str, Callable[[], object]] = {
            "none": lambda: twice(block, text),
            "batched_guidance": lambda: block(*doubled, rotary),
            "guidance_interval, outside": lambda: block(hidden, text, times, rotary),
            "one_key_padding": lambda: twice(block, keys),
            "fuse_qkv": lambda: twice(fused, text),
        }
        if with_compile:
            compiled = _block()
            compiled.compile(fullgraph=True)
            ways["engine.compile regional"] = lambda: twice(compiled, text)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):  # the first is the warm-up
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if turn:
                    found[name].append(time.perf_counter() - began)
                advance()
    return found


def _block() -> WanTransformerBlock:
    return random_transformer(replace(_DIMS, num_layers=1), torch.device("cpu"), torch.bfloat16).blocks[0]
