"""PSNR, SSIM and the error of latents, on cases whose values are known."""

import numpy as np
import pytest

from benchmarks.likeness import psnr, relative_error, ssim

RNG = np.random.default_rng(1)
CLIP = RNG.integers(0, 255, (3, 16, 24, 3), dtype=np.uint8)


def test_equal_clips_have_no_psnr_and_an_ssim_of_one() -> None:
    assert psnr(CLIP, CLIP) is None
    assert ssim(CLIP, CLIP) == pytest.approx(1.0)


def test_psnr_of_one_level_everywhere_is_48_decibels() -> None:
    assert psnr(CLIP + np.uint8(1), CLIP) == pytest.approx(20 * np.log10(255))


def test_ssim_falls_with_noise_and_is_near_zero_for_another_clip() -> None:
    noisy = np.clip(CLIP + RNG.normal(0, 20, CLIP.shape), 0, 255).astype(np.uint8)
    other = RNG.integers(0, 255, CLIP.shape, dtype=np.uint8)

    assert abs(ssim(other, CLIP)) < 0.1 < 0.5 < ssim(noisy, CLIP) < 0.99


def test_ssim_of_two_flat_clips_is_the_luminance_term() -> None:
    dark, bright = np.full_like(CLIP, 100), np.full_like(CLIP, 150)
    constant = (0.01 * 255) ** 2

    expected = (2 * 100 * 150 + constant) / (100**2 + 150**2 + constant)
    assert ssim(dark, bright) == pytest.approx(expected)


def test_relative_error_counts_in_standard_deviations() -> None:
    latents = RNG.normal(0, 3, (1, 16, 5, 8, 8)).astype(np.float32)

    assert relative_error(latents, latents) == 0
    assert relative_error(latents + latents.std(), latents) == pytest.approx(1.0, rel=1e-5)
