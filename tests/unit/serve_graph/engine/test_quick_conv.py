"""The VAE's convolutions by another kernel: the same values but for rounding."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.decode import Decoding
from serve_graph.engine.quick_conv import quicken_convolutions

SLOW, QUICK = "aten::slow_conv3d_forward", "aten::mkldnn_convolution"
PADDED_COPY = "aten::constant_pad_nd"


def kernels_of(decoding: Decoding) -> tuple[torch.Tensor, set[str]]:
    """The next chunk, and what torch called for it."""
    with torch.profiler.profile() as profile:
        frames = decoding.next_chunk()
    return frames, {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (1, 0), ((3, 1, 1), (1, 0, 0))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_quick_convolution_equals_the_stock_one_with_and_without_earlier_frames(
    kernel: int | tuple[int, ...], padding: int | tuple[int, ...], dtype: torch.dtype
) -> None:
    convolution = WanCausalConv3d(16, 8, kernel, padding=padding).to(dtype)
    x, earlier = torch.randn(1, 16, 3, 12, 20).to(dtype), torch.randn(1, 16, 2, 12, 20).to(dtype)
    expected = [convolution(x), convolution(x, earlier)]

    quicken_convolutions(torch.nn.Sequential(convolution))

    for actual, stock in zip([convolution(x), convolution(x, earlier)], expected, strict=True):
        assert actual.dtype == dtype
        assert torch.allclose(actual, stock, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_a_decode_uses_the_quick_kernel_throughout_and_keeps_its_frames(
    tiny_folder: Path, generator_parts: GeneratorParts
) -> None:
    vae = AutoencoderKLWan.from_pretrained(tiny_folder / "vae", disable_mmap=True).eval().requires_grad_(False)
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    stock, stock_kernels = kernels_of(Decoding(vae, latents))

    quicken_convolutions(vae)
    quick, kernels = kernels_of(Decoding(vae, latents))

    assert SLOW in stock_kernels
    assert SLOW not in kernels
    assert QUICK in kernels
    assert (quick - stock).abs().max() < 1e-5
    assert stock.std() > 0.01
    weights = [parameter for parameter in vae.decoder.parameters() if parameter.ndim == 5]
    assert all(weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights)
    assert SLOW not in kernels_of(Decoding(generator_parts.vae, latents))[1]  # as a checkpoint is loaded on the CPU


def test_a_quick_decode_that_knows_its_earlier_frames_pads_nothing(generator_parts: GeneratorParts) -> None:
    decoding = Decoding(generator_parts.vae, torch.randn(1, 16, 3, 8, 8))

    kernels = [kernels_of(decoding)[1] for _ in range(3)]

    assert PADDED_COPY in kernels[0]  # the frames before the first are zeros
    assert PADDED_COPY not in kernels[2]
