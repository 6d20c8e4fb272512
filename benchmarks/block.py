"""One block of the real Wan 2.1 1.3B's width with random weights: which levers still pay at size. Measures only."""

import time
from collections.abc import Callable
from statistics import median

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from serve_graph.engine.text_keys import TextKeys, TextKeysProcessor
from serve_graph.engine.tuning import fuse_projections

DIM, HEADS, FFN_DIM = 1_536, 12, 8_960
"""Of one of the 30 blocks. Source: the release's configuration of the 1.3B model."""

TEXT_TOKENS, PROMPT_TOKENS = 512, 40
TOKENS_PER_LATENT_FRAME = 1_560
"""At 480p: 30 x 52 patches of 16 x 16 pixels. A clip of 81 frames has 21 latent frames, 32,760 tokens."""


def block_times(latent_frames: int, rounds: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of a guided step's part in one block, by lever, in turns. bfloat16, this process's torch threads."""
    tokens = latent_frames * TOKENS_PER_LATENT_FRAME
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        block, fused = _block(generator), _block(generator)
        fuse_projections(fused)
        hidden = torch.randn(1, tokens, DIM, generator=generator).bfloat16()
        text = torch.randn(1, TEXT_TOKENS, DIM, generator=generator).bfloat16()
        times = torch.randn(1, 6, DIM, generator=generator).bfloat16()
        rotary = tuple(torch.rand(1, tokens, 1, DIM // HEADS, generator=generator) for _ in range(2))
        heads = (1, PROMPT_TOKENS + 1, HEADS, DIM // HEADS)
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
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):  # the first is the warm-up
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if turn:
                    found[name].append(time.perf_counter() - began)
                advance()
    return found


def ratios_to_none(found: dict[str, list[float]]) -> dict[str, float]:
    """Each lever's median ratio to the block without, of runs side by side."""
    plain = found["none"]
    return {name: median(one / base for one, base in zip(times, plain, strict=True)) for name, times in found.items()}


def _block(generator: torch.Generator) -> WanTransformerBlock:
    block = WanTransformerBlock(DIM, FFN_DIM, HEADS, "rms_norm_across_heads", True).eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    block = block.bfloat16()
    for norm in (block.norm1, block.norm2, block.norm3):
        norm.float()
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    block.attn2.set_processor(TextKeysProcessor())
    return block
