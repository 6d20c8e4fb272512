"""LoRA files of random adapters for the suite's own model, in the formats that people publish."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
FFN = ("ffn.net.0.proj", "ffn.net.2")
ALL = ATTENTION + CROSS + FFN
RANK = 4

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By the layer's path: A (rank, in) and B (out, rank)."""

_ORIGINAL = {
    **{f"attn1.to_{name}": f"self_attn.{name}" for name in "qkv"},
    **{f"attn2.to_{name}": f"cross_attn.{name}" for name in "qkv"},
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def random_pairs(
    transformer: WanTransformer3DModel, seed: int, layers: Sequence[str] = ALL, outside: Sequence[str] = ()
) -> Pairs:
    """For these layers of each block and these outside of them, large enough to change every clip."""
    generator = torch.Generator().manual_seed(seed)
    paths = [f"blocks.{i}.{layer}" for i in range(len(transformer.blocks)) for layer in layers]
    pairs = {}
    for path in (*paths, *outside):
        linear = transformer.get_submodule(path)
        down = torch.randn(RANK, linear.in_features, generator=generator) / linear.in_features**0.5
        pairs[path] = down, torch.randn(linear.out_features, RANK, generator=generator) * 0.5
    return pairs


def save_diffusers(path: Path, pairs: Pairs, alpha: float | None = None) -> Path:
    """As `WanPipeline.save_lora_weights` does, alpha in the header."""
    tensors = {}
    for layer, (down, up) in pairs.items():
        tensors[f"transformer.{layer}.lora_A.weight"] = down
        tensors[f"transformer.{layer}.lora_B.weight"] = up
    about = {"transformer.r": RANK, "transformer.lora_alpha": alpha, "transformer.alpha_pattern": {}}
    save_file(tensors, path, {"format": "pt"} | ({} if alpha is None else {"lora_adapter_metadata": json.dumps(about)}))
    return path


def save_original(path: Path, pairs: Pairs, alpha: float) -> Path:
    """As lightx2v's are: the original Wan's names, and an alpha per layer."""
    return _save_with_alphas(
        path, {f"diffusion_model.{_original(layer)}": pair for layer, pair in pairs.items()}, alpha
    )


def save_musubi(path: Path, pairs: Pairs, alpha: float) -> Path:
    """As musubi-tuner writes them; it has every layer of every block."""
    named = {f"lora_unet_{_original(layer).replace('.', '_')}": pair for layer, pair in pairs.items()}
    return _save_with_alphas(path, named, alpha)


def _save_with_alphas(path: Path, named: Pairs, alpha: float) -> Path:
    tensors = {}
    for name, (down, up) in named.items():
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def _original(layer: str) -> str:
    _, block, name = layer.split(".", 2)
    return f"blocks.{block}.{_ORIGINAL[name]}"
