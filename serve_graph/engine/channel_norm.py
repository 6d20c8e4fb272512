"""Wan's VAE normalisation for the CPU: the same formula as diffusers' `WanRMS_norm`, many times quicker there.

`torch.nn.functional.normalize` reduces over a strided dimension one element at a time on the CPU. A sum of squares
over the same dimension runs along the memory. Measured with one thread: 17 to 40 times quicker at the tiny model's
sizes, 4 times at 96 channels of 60x104; results differ by float rounding (1.2e-7 at most, of values up to 1).
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

_EPSILON = 1e-12
"""Source: the default of `torch.nn.functional.normalize`."""


class ChannelNorm(torch.nn.Module):
    """Takes the place of one channel-first `WanRMS_norm`, and shares its parameters."""

    def __init__(self, norm: WanRMS_norm) -> None:
        super().__init__()
        self.scale: float = norm.scale
        self.gamma = norm.gamma
        self.bias = norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, …) to the same, each vector over C scaled to length sqrt(C); half precision is summed in float32."""
        values = x.float()
        length = values.square().sum(1, keepdim=True).sqrt_().clamp_min_(_EPSILON)
        normed = (values / length).to(x.dtype).mul_(self.scale).mul_(self.gamma)
        return normed if isinstance(self.bias, float) else normed.add_(self.bias)


def quicken_norms(vae: AutoencoderKLWan) -> None:
    """Replace the VAE's channel-first norms, for a VAE on the CPU; the activations after them work in place."""
    for parent in list(vae.modules()):
        if isinstance(parent, torch.nn.SiLU):
            parent.inplace = True
        for name, child in parent.named_children():
            if isinstance(child, WanRMS_norm) and child.channel_first:
                setattr(parent, name, ChannelNorm(child))
