"""How alike two clips, or two latents, are. Pure."""

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]

_WINDOW = 8
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_LUMA = np.array([0.2126, 0.7152, 0.0722])
"""Source: ITU-R BT.709, as in the MP4."""


def psnr(frames: Frames, reference: Frames) -> float | None:
    """Decibels over all values of a clip; None where no value differs."""
    error = float(np.square(frames.astype(np.float64) - reference).mean())
    return None if error == 0 else 10 * float(np.log10(255**2 / error))


def ssim(frames: Frames, reference: Frames) -> float:
    """Structural similarity of the luma, 1 for equal clips: the mean over all 8x8 windows of all frames.

    Source: Wang, Bovik, Sheikh and Simoncelli, Image quality assessment (2004), with uniform windows.
    """
    x, y = frames @ _LUMA, reference @ _LUMA  # (T, H, W)
    mean_x, mean_y = _window_means(x), _window_means(y)
    variance_x = _window_means(x * x) - mean_x**2
    variance_y = _window_means(y * y) - mean_y**2
    covariance = _window_means(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return float((luminance * structure).mean())


def relative_error(latents: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
    """The root of the mean squared difference, in standard deviations of the reference."""
    return float(np.sqrt(np.square(latents - reference).mean()) / reference.std())


def _window_means(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(T, H, W) to (T, H - 7, W - 7), by running sums."""
    sums = np.pad(values.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
    corners = sums[:, _WINDOW:, _WINDOW:] - sums[:, :-_WINDOW, _WINDOW:] - sums[:, _WINDOW:, :-_WINDOW]
    return (corners + sums[:, :-_WINDOW, :-_WINDOW]) / _WINDOW**2
