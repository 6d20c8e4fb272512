"""A text's keys and values for cross-attention, made once per clip, its padding as a single key.

Wan pads the text with zero rows and its cross-attention has no mask. So all N rows of padding have the same key k and
value v in each block, and their part of the softmax, N times exp(q k), is that of one key whose score has log(N)
added: the same sums but for rounding. A prompt of 20 tokens then has 21 keys in place of 512.
"""

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor


class TextKeys(NamedTuple):
    """One block's. keys, values: (B, N, heads, head_dim). bias: (B, 1, 1, N) float32, added to the scores."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor


class TextKeysProcessor(WanAttnProcessor):  # type: ignore[misc]  # diffusers' is not typed
    """diffusers' own, and cross-attention over `TextKeys` where a block is given them for a text."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | TextKeys | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(B, S, dim) to the same."""
        if not isinstance(encoder_hidden_states, TextKeys):
            attended: torch.Tensor = super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
            return attended
        text = encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        bias = text.bias.type_as(query)  # CUDA's kernels refuse another dtype, or read its bytes as the query's
        heads = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), text.keys.transpose(1, 2), text.values.transpose(1, 2), attn_mask=bias
        )  # (B, heads, S, head_dim)
        projected: torch.Tensor = attn.to_out[0](heads.transpose(1, 2).flatten(2, 3).type_as(query))
        return projected


def take_text_keys(transformer: WanTransformer3DModel) -> None:
    """Let the blocks' cross-attention take `TextKeys`, too."""
    for block in transformer.blocks:
        block.attn2.set_processor(TextKeysProcessor())


@torch.inference_mode()
def text_keys(transformer: WanTransformer3DModel, text: torch.Tensor, num_tokens: int) -> tuple[TextKeys, ...]:
    """Each block's keys of one text. text: (1, text_length, text_dim), zeros from row `num_tokens` on."""
    num_padding = text.shape[1] - num_tokens
    rows = transformer.condition_embedder.text_embedder(text[:, : num_tokens + min(num_padding, 1)])
    bias = rows.new_zeros(1, 1, 1, rows.shape[1], dtype=torch.float32)
    if num_padding:
        bias[..., -1] = log(num_padding)
    return tuple(TextKeys(*_keys_and_values(block.attn2, rows), bias) for block in transformer.blocks)


def stack_text_keys(texts: Sequence[tuple[TextKeys, ...]]) -> tuple[TextKeys, ...]:
    """Those of several texts for one forward; the shorter ones get keys that nothing attends to."""
    if len(texts) == 1:
        return texts[0]
    longest = max(text[0].keys.shape[1] for text in texts)
    return tuple(
        TextKeys(
            torch.cat([_extended(text.keys, longest) for text in block]),
            torch.cat([_extended(text.values, longest) for text in block]),
            torch.cat([_extended(text.bias.transpose(1, 3), longest, -torch.inf).transpose(1, 3) for text in block]),
        )
        for block in zip(*texts, strict=True)
    )


def _keys_and_values(attn: WanAttention, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, N, heads, head_dim) each."""
    if attn.fused_projections:
        key, value = attn.to_kv(rows).chunk(2, dim=-1)
    else:
        key, value = attn.to_k(rows), attn.to_v(rows)
    return attn.norm_k(key).unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))


def _extended(x: torch.Tensor, length: int, filling: float = 0.0) -> torch.Tensor:
    """Along the second dimension."""
    padding = x.new_full((x.shape[0], length - x.shape[1], *x.shape[2:]), filling)
    return torch.cat([x, padding], dim=1)
