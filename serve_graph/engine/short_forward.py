"""A forward of Wan's transformer that may take text as `TextKeys`, and may end after its first block.

The first-block cache: neighbouring steps differ little, and what the first block adds tells how much. Where it changed
by less than a threshold since the last whole forward, what the other blocks added then is added again. Source of the
idea: ParaAttention's first-block cache, and diffusers' `FirstBlockCacheConfig` after it. Here each prediction has its
own memory, which its job keeps, and rows of one batch decide each for itself.

Source of the arithmetic: `WanTransformer3DModel.forward` in diffusers' transformer_wan.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel

from serve_graph.engine.text_keys import TextKeys, stack_text_keys


@dataclass(frozen=True)
class Memory:
    """Of one prediction's last whole forward. first, rest: what its first block and all others added, (1, S, dim)."""

    first: torch.Tensor
    rest: torch.Tensor


@dataclass(frozen=True)
class Row:
    """One prediction of a batch. text: (1, text_length, text_dim), or each block's keys; all rows' of one kind."""

    text: torch.Tensor | tuple[TextKeys, ...]
    memory: Memory | None = None


@dataclass(frozen=True)
class Predicted:
    """noise: (1, C, T, H, W). memory: for the next forward of the same prediction. cached: the first block only."""

    noise: torch.Tensor
    memory: Memory | None
    cached: bool


@torch.inference_mode()
def predict(
    transformer: WanTransformer3DModel,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    rows: Sequence[Row],
    threshold: float | None,
) -> list[Predicted]:
    """One forward for all rows. latents: (B, C, T, H, W) in the transformer's dtype. timesteps: (B,).

    threshold: a forward ends after its first block below this relative change; None: never.
    """
    rotary = transformer.rope(latents)
    temb, projection, texts = _conditions(transformer, latents, timesteps, rows)
    if threshold is None:
        hidden = _run(transformer.blocks, _embed(transformer, latents), texts, projection, rotary)
        memories, cached = [row.memory for row in rows], [False] * len(rows)
    else:
        known = [row.memory for row in rows]
        hidden, memories, cached = _run_or_remember(
            transformer.blocks, _embed(transformer, latents), texts, projection, rotary, known, threshold
        )
    noise = _head(transformer, hidden, temb, latents.shape)
    return [Predicted(noise[i : i + 1], memories[i], cached[i]) for i in range(len(rows))]


def _embed(transformer: WanTransformer3DModel, latents: torch.Tensor) -> torch.Tensor:
    """(B, S, dim). Handed on unnamed: a name in `predict` would hold these bytes until the last block is done."""
    patches: torch.Tensor = transformer.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
    return patches


def _run_or_remember(
    blocks: Sequence[torch.nn.Module],
    hidden: torch.Tensor,
    texts: Sequence[torch.Tensor | TextKeys],
    projection: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    known: Sequence[Memory | None],
    threshold: float,
) -> tuple[torch.Tensor, list[Memory | None], list[bool]]:
    """All blocks, or for rows that changed little the first and what is known of the others.

    Returns what the last block gives, (B, S, dim), each row's memory for the next forward, and who was cached.
    """
    first_block, *others = blocks
    before, hidden = hidden, first_block(hidden, texts[0], projection, rotary)
    first = hidden - before
    del before
    cached = _little_changed(first, known, threshold)
    memories = list(known)
    after = hidden.clone() if any(cached) else hidden
    for i, memory in enumerate(known):
        if cached[i] and memory is not None:
            after[i : i + 1] += memory.rest
    if not any(cached):
        after = _run(others, hidden, texts[1:], projection, rotary)
    elif not all(cached):
        index = torch.tensor([i for i, is_cached in enumerate(cached) if not is_cached], device=hidden.device)
        chosen = [_chosen(text, index) for text in texts[1:]]
        after[index] = _run(others, hidden[index], chosen, projection[index], rotary)
    for i in [i for i, is_cached in enumerate(cached) if not is_cached]:
        own = slice(i, i + 1)
        own_first = first[own].clone() if len(first) > 1 else first  # a view would hold the other rows
        memories[i] = Memory(own_first, after[own] - hidden[own])
    return after, memories, cached


def _conditions(
    transformer: WanTransformer3DModel, latents: torch.Tensor, timesteps: torch.Tensor, rows: Sequence[Row]
) -> tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor | TextKeys]]:
    """The times' embedding (B, dim), its projection (B, 6, dim), and each block's text."""
    keys = [row.text for row in rows if isinstance(row.text, tuple)]
    texts = [row.text for row in rows if isinstance(row.text, torch.Tensor)]
    nothing = latents.new_zeros(len(rows), 1, transformer.config.text_dim)
    text = torch.cat(texts) if texts else nothing
    temb, projection, embedded, _ = transformer.condition_embedder(timesteps, text, None)
    each_block: Sequence[torch.Tensor | TextKeys] = [embedded] * len(transformer.blocks)
    return temb, projection.unflatten(1, (6, -1)), stack_text_keys(keys) if keys else each_block


def _run(
    blocks: Sequence[torch.nn.Module],
    hidden: torch.Tensor,
    texts: Sequence[torch.Tensor | TextKeys],
    projection: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    for block, text in zip(blocks, texts, strict=True):
        hidden = block(hidden, text, projection, rotary)
    return hidden


def _chosen(text: torch.Tensor | TextKeys, index: torch.Tensor) -> torch.Tensor | TextKeys:
    return TextKeys(*(part[index] for part in text)) if isinstance(text, TextKeys) else text[index]


def _little_changed(first: torch.Tensor, memories: Sequence[Memory | None], threshold: float) -> list[bool]:
    """Row by row: mean |change| over mean |before|, both of what the first block added."""
    known = {i: memory for i, memory in enumerate(memories) if memory is not None}
    if not known:
        return [False] * len(memories)
    changes = torch.stack([relative_change(first[i : i + 1], memory.first) for i, memory in known.items()])
    small = dict(zip(known, (changes < threshold).tolist(), strict=True))  # waits for the device, once per forward
    return [small.get(i, False) for i in range(len(memories))]


def relative_change(values: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Mean |values - last| over mean |last|, in float32, of which there are 4 bytes per element at a time."""
    change = values.to(torch.float32, copy=True).sub_(last).abs_().mean()
    return change / last.to(torch.float32, copy=True).abs_().mean()


def _head(
    transformer: WanTransformer3DModel, hidden: torch.Tensor, temb: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    """The output's norm and projection; (B, S, dim) back to (B, C, T, H, W)."""
    shift, scale = (transformer.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
    normed = (transformer.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    patches = transformer.proj_out(normed)
    sizes = transformer.config.patch_size
    counts = [n // p for n, p in zip(shape[2:], sizes, strict=True)]
    patches = patches.reshape(shape[0], *counts, *sizes, -1)
    whole: torch.Tensor = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return whole
