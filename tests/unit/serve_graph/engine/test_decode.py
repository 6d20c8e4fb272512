"""Decoding in chunks against `AutoencoderKLWan.decode` in one go: bit for bit."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.decode import Decoding, denormalize, to_uint8


def noise(seed: int, num_latent_frames: int = 4, height: int = 8, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 16, num_latent_frames, height, width, generator=generator)


@torch.inference_mode()
def decoded_whole(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """(T, H, W, 3) in [0, 1], as `VideoProcessor` scales it."""
    video = vae.decode(denormalize(vae, latents), return_dict=False)[0]
    return (video * 0.5 + 0.5).clamp(0, 1)[0].permute(1, 2, 3, 0)


def decoded_in_chunks(decoding: Decoding) -> torch.Tensor:
    chunks = []
    while not decoding.is_done:
        chunks.append(decoding.next_chunk())
    return torch.cat(chunks)


@pytest.fixture(scope="module")
def vae_with_patches() -> AutoencoderKLWan:
    """A VAE that predicts 2x2 patches, and whose latents have means and deviations of their own."""
    torch.manual_seed(7)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[i / 10 for i in range(16)],
        latents_std=[1 + i / 10 for i in range(16)],
    )
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize(("num_latent_frames", "height", "width"), [(1, 8, 8), (2, 8, 14), (5, 8, 8), (3, 14, 8)])
def test_decoding_in_chunks_is_bit_equal_to_decoding_whole(
    generator_parts: GeneratorParts, num_latent_frames: int, height: int, width: int
) -> None:
    latents = noise(1, num_latent_frames, height, width)

    frames = decoded_in_chunks(Decoding(generator_parts.vae, latents))

    assert frames.shape == (4 * num_latent_frames - 3, 8 * height, 8 * width, 3)
    assert torch.equal(frames, decoded_whole(generator_parts.vae, latents))


def test_decoding_is_bit_equal_when_the_vae_has_patches_and_statistics(vae_with_patches: AutoencoderKLWan) -> None:
    latents = noise(2)

    frames = decoded_in_chunks(Decoding(vae_with_patches, latents))

    assert torch.equal(frames, decoded_whole(vae_with_patches, latents))


def test_decoding_is_bit_equal_when_two_decodes_take_turns(generator_parts: GeneratorParts) -> None:
    vae = generator_parts.vae
    one, other = Decoding(vae, noise(3)), Decoding(vae, noise(4, height=14))
    chunks: dict[Decoding, list[torch.Tensor]] = {one: [], other: []}
    for _ in range(4):
        for decoding in (one, other):
            chunks[decoding].append(decoding.next_chunk())

    assert torch.equal(torch.cat(chunks[one]), decoded_whole(vae, noise(3)))
    assert torch.equal(torch.cat(chunks[other]), decoded_whole(vae, noise(4, height=14)))


def test_decoding_is_untouched_when_the_vae_decodes_whole_in_between(generator_parts: GeneratorParts) -> None:
    vae = generator_parts.vae
    decoding = Decoding(vae, noise(5))
    first = decoding.next_chunk()
    decoded_whole(vae, noise(6))

    frames = torch.cat([first, decoded_in_chunks(decoding)])

    assert torch.equal(frames, decoded_whole(vae, noise(5)))


def test_decoding_gives_one_frame_and_then_four_at_a_time(generator_parts: GeneratorParts) -> None:
    decoding = Decoding(generator_parts.vae, noise(8))

    assert decoding.num_chunks == 4
    assert [len(decoding.next_chunk()) for _ in range(4)] == [1, 4, 4, 4]
    assert decoding.is_done


def test_to_uint8_rounds_to_the_nearest_level() -> None:
    levels = torch.tensor([0.0, 0.4, 0.6, 127.4, 127.6, 254.4, 255.0])
    frames = (levels / 255).view(1, 1, 7, 1).expand(1, 1, 7, 3)

    array = to_uint8(frames)

    assert array.dtype == np.uint8
    assert array.shape == (1, 1, 7, 3)
    assert array.flags.c_contiguous
    assert array[0, 0, :, 0].tolist() == [0, 0, 1, 127, 128, 254, 255]


@pytest.fixture
def small_tiles(vae_with_patches: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> AutoencoderKLWan:
    """Its tiles are 48 pixels wide and high and begin every 32."""
    for side in ("height", "width"):
        monkeypatch.setattr(vae_with_patches, f"tile_sample_min_{side}", 48)
        monkeypatch.setattr(vae_with_patches, f"tile_sample_stride_{side}", 32)
    return vae_with_patches


def frames_left(decoding: Decoding) -> np.ndarray:
    frames = []
    while not decoding.is_done:
        frames.append(decoding.next_frames())
    return np.concatenate(frames)


def test_decoding_begun_anew_gives_every_frame_once(generator_parts: GeneratorParts) -> None:
    expected = frames_left(Decoding(generator_parts.vae, noise(9)))
    decoding = Decoding(generator_parts.vae, noise(9))
    given = [decoding.next_frames(), decoding.next_frames()]

    assert decoding.start_smaller()
    given.append(frames_left(decoding))

    assert np.array_equal(np.concatenate(given), expected)


def test_decoding_begun_anew_twice_goes_on_in_tiles(small_tiles: AutoencoderKLWan) -> None:
    with torch.inference_mode():
        tiled = small_tiles.tiled_decode(denormalize(small_tiles, noise(10)), return_dict=False)[0]
    expected = to_uint8((tiled * 0.5 + 0.5).clamp(0, 1)[0].permute(1, 2, 3, 0))
    decoding = Decoding(small_tiles, noise(10), may_tile=True)
    whole = [decoding.next_frames(), decoding.next_frames()]

    assert decoding.start_smaller()
    assert len(decoding.next_frames()) == 0
    assert decoding.start_smaller()
    left = frames_left(decoding)

    assert sum(map(len, whole)) == 5
    assert np.array_equal(left, expected[5:])
    assert not decoding.start_smaller()


@pytest.mark.parametrize(("may_tile", "size"), [(False, 8), (True, 6)], ids=["reproducible", "one tile"])
def test_decoding_has_no_smaller_way_than_once_more(small_tiles: AutoencoderKLWan, may_tile: bool, size: int) -> None:
    decoding = Decoding(small_tiles, noise(11, height=size, width=size), may_tile=may_tile)

    assert decoding.start_smaller()
    assert not decoding.start_smaller()
