"""`ChannelNorm` against the module of diffusers that it replaces."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

from serve_graph.engine.channel_norm import ChannelNorm, quicken_norms
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.decode import Decoding


def stock_norm(images: bool, bias: bool, dtype: torch.dtype) -> WanRMS_norm:
    norm = WanRMS_norm(6, images=images, bias=bias)
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return norm.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
def test_channel_norm_equals_the_stock_norm(images: bool, bias: bool, dtype: torch.dtype, bound: float) -> None:
    norm = stock_norm(images, bias, dtype)
    x = torch.randn((2, 6, 5, 4) if images else (2, 6, 3, 5, 4), generator=torch.Generator().manual_seed(2)).to(dtype)

    normed = ChannelNorm(norm)(x)

    assert normed.dtype == dtype
    assert (normed - norm(x)).abs().max() <= bound
    assert (normed - x).abs().max() > 0.1  # it did something


def test_channel_norm_of_zeros_is_zero() -> None:
    assert torch.equal(
        ChannelNorm(stock_norm(True, False, torch.float32))(torch.zeros(1, 6, 2, 2)), torch.zeros(1, 6, 2, 2)
    )


def test_quicken_norms_replaces_every_norm_of_the_decoder_and_keeps_its_frames(
    tiny_folder: Path, generator_parts: GeneratorParts
) -> None:
    vae = AutoencoderKLWan.from_pretrained(tiny_folder / "vae", disable_mmap=True).eval()
    latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    stock = Decoding(vae, latents).next_chunk()
    num_norms = sum(isinstance(module, WanRMS_norm) for module in vae.modules())

    quicken_norms(vae)

    kinds = [type(module) for module in vae.modules()]
    assert kinds.count(ChannelNorm) == num_norms > 0
    assert WanRMS_norm not in kinds
    assert (Decoding(vae, latents).next_chunk() - stock).abs().max() < 1e-5
    assert stock.std() > 0.01


def test_a_cpu_checkpoint_is_loaded_with_quick_norms(generator_parts: GeneratorParts) -> None:
    assert not any(isinstance(module, WanRMS_norm) for module in generator_parts.vae.modules())
