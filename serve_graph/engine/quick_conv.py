"""Wan's VAE convolutions for the CPU: the same sums by oneDNN, several times quicker there.

torch leaves a float32 3-D convolution of a single clip to a kernel that unfolds its input first, unless that is large
(`use_mkldnn` in ATen's Convolution.cpp asks for over 20,480 rows). Measured with one thread at the shipped tiny
model's sizes: 1.1 to 5.2 times quicker; results differ by float rounding (2.4e-6 at most, of values up to 4).
"""

from functools import partial

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d


def quicken_convolutions(vae: torch.nn.Module) -> None:
    """Give the VAE's causal convolutions that other kernel, for a VAE on the CPU; their weights stay as they are."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch has no annotation there
        return
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module._conv_forward = partial(_convolve, module)


def _convolve(
    module: WanCausalConv3d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(B, C, T, H, W), padded already, as `torch.nn.Conv3d` convolves it."""
    return torch.mkldnn_convolution(x, weight, bias, module.padding, module.stride, module.dilation, module.groups)
