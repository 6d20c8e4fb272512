"""Wan's own modules in given dimensions with random weights, made on the device in their dtype: no file, no host copy.

What takes time and memory is as in the release; what they make is noise.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from schemas.handoff import TextEmbedding
from serve_graph.architecture import TextEncoder, Transformer, Vae
from serve_graph.engine.text_keys import take_text_keys

_SEED = 2_127


def random_transformer(dims: Transformer, device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    """As `load_generator_parts` would have it: diffusers keeps some parts in float32."""
    with _made_on(device, dtype):
        model = WanTransformer3DModel(
            num_attention_heads=dims.num_attention_heads,
            attention_head_dim=dims.attention_head_dim,
            in_channels=dims.in_channels,
            out_channels=dims.in_channels,
            text_dim=dims.text_dim,
            freq_dim=dims.freq_dim,
            ffn_dim=dims.ffn_dim,
            num_layers=dims.num_layers,
        )
    kept = set(WanTransformer3DModel._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if kept.intersection(name.split(".")):
            parameter.data = parameter.data.float()
    take_text_keys(model)
    return model.eval().requires_grad_(False)


def random_vae(dims: Vae, device: torch.device, dtype: torch.dtype) -> AutoencoderKLWan:
    """Encoder and decoder."""
    with _made_on(device, dtype):
        vae = AutoencoderKLWan(
            base_dim=dims.base_dim,
            decoder_base_dim=dims.decoder_base_dim,
            z_dim=dims.z_dim,
            dim_mult=list(dims.dim_mult),
            num_res_blocks=dims.num_res_blocks,
            temperal_downsample=list(dims.temporal_downsample),
        )
    return vae.eval().requires_grad_(False)


def random_text_encoder(dims: TextEncoder, device: torch.device, dtype: torch.dtype) -> UMT5EncoderModel:
    """The encoder of a UMT5."""
    config = UMT5Config(
        vocab_size=dims.vocab_size,
        d_model=dims.d_model,
        d_kv=dims.d_kv,
        num_heads=dims.num_heads,
        d_ff=dims.d_ff,
        num_layers=dims.num_layers,
        relative_attention_num_buckets=dims.relative_attention_num_buckets,
    )
    with _made_on(device, dtype):
        return UMT5EncoderModel(config).eval().requires_grad_(False)


def wan_scheduler() -> UniPCMultistepScheduler:
    """Wan 2.1's. Source: the release's `scheduler_config.json`; each job gives it a shift of its own."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def random_embedding(num_tokens: int, text_dim: int, seed: int) -> TextEmbedding:
    """A prompt of so many tokens, encoded in bfloat16."""
    rows = torch.randn(num_tokens, text_dim, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return TextEmbedding(values=rows.view(torch.int16).numpy(), dtype="bfloat16", solo=True)


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(_SEED)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
