"""What a clip shows, read back from its pixels: shape, colours, motion, size and speed. Knows nothing of prompts.

It works on any clip, a model's or a drawn one, and says `none` where it sees nothing. On drawn clips it is right every
time, after the MP4 encoder too: `tests/unit/serve_graph/tiny_wan/test_measure.py`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve_graph.tiny_wan.world import COLOURS, FRAME_PX, SHAPES, SIZES, SPEEDS, Frames, coverage

NONE = "none"
_LEAST_CONTRAST = 60.0
"""Of 441, black to white: what differs less from the background is no shape."""
_LEAST_LIKENESS = 0.6
"""Overlap over union with the ideal shape; a blob below it is no shape."""
_STILL_PX = 8.0
"""Of 64: a shorter way counts as standing still; a slow shape's way is 16 at least."""


@dataclass(frozen=True)
class Reading:
    """What was seen. likeness: overlap over union with the ideal shape, 0 to 1; way_px, radius_px: of 64."""

    shape: str
    colour: str
    background: str
    motion: str
    size: str
    speed: str
    likeness: float
    way_px: float
    radius_px: float


def measure(frames: Frames) -> Reading:
    """Read a clip of (T, H, W, 3) uint8."""
    pixels = frames.astype(np.float32)
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    background = np.median(border.reshape(-1, 3), axis=0)
    contrast = np.linalg.norm(pixels - background, axis=-1)  # (T, H, W)
    most = np.quantile(contrast, 0.99)
    if most < _LEAST_CONTRAST:
        return Reading(NONE, NONE, nearest_colour(background), NONE, NONE, NONE, 0.0, 0.0, 0.0)
    colour = np.median(pixels[contrast > 0.7 * most], axis=0)
    axis = colour - background
    inside = np.clip((pixels - background) @ axis / (axis @ axis), 0, 1)  # (T, H, W), how much of a pixel is shape
    inside[inside < 0.25] = 0  # what the codec leaves around it
    scale = FRAME_PX / frames.shape[1]
    area = inside.sum(axis=(1, 2))  # (T,)
    likeness = {shape: _likeness(shape, inside, area) for shape in SHAPES}
    shape = max(likeness, key=lambda name: likeness[name])
    motion, way = _motion(inside, area, scale)
    radius = float(np.sqrt(np.median(area) / _UNIT_AREA[shape]) * scale)
    return Reading(
        shape=shape if likeness[shape] >= _LEAST_LIKENESS else NONE,
        colour=nearest_colour(colour),
        background=nearest_colour(background),
        motion=motion,
        size=_nearest(radius, SIZES),
        speed="medium" if motion == "still" else _nearest(way, SPEEDS),
        likeness=likeness[shape],
        way_px=way,
        radius_px=radius,
    )


def nearest_colour(rgb: npt.NDArray[np.floating]) -> str:
    """The name of the nearest of the world's colours."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLOURS[name]))))


_UNIT_AREA = {"circle": np.pi, "square": 4 * 0.9**2, "triangle": 3 * 3**0.5 / 4 * 1.35**2}
"""The area of a shape of radius 1."""
_CENTROID_BELOW = {"circle": 0.0, "square": 0.0, "triangle": 1.35 / 4}
"""How far the centroid lies below the middle of the bounding box, in radii."""


def _likeness(shape: str, inside: npt.NDArray[np.float32], area: npt.NDArray[np.float32]) -> float:
    """The median over the frames of overlap over union with the ideal shape of the same area and centroid."""
    x, y = _centroids(inside, area)
    radius = np.sqrt(np.maximum(area, 1) / _UNIT_AREA[shape])
    middle = y - _CENTROID_BELOW[shape] * radius
    ideal = coverage(
        shape, x[:, None, None], middle[:, None, None], radius[:, None, None], inside.shape[1], inside.shape[2]
    )
    union = np.maximum(ideal, inside).sum(axis=(1, 2))
    return float(np.median(np.minimum(ideal, inside).sum(axis=(1, 2)) / np.maximum(union, 1)))


def _motion(inside: npt.NDArray[np.float32], area: npt.NDArray[np.float32], scale: float) -> tuple[str, float]:
    """The direction and the way: a straight line through the centroids of the frames that show something."""
    seen = area > 0.25 * np.median(area)
    if seen.sum() < 2:
        return "still", 0.0
    times = np.arange(len(area))[seen]
    x, y = _centroids(inside[seen], area[seen])
    way = np.array([np.polyfit(times, values, 1)[0] for values in (x, y)]) * (len(area) - 1) * scale
    length = float(np.abs(way).max())
    if length < _STILL_PX:
        return "still", length
    if abs(way[0]) >= abs(way[1]):
        return ("right" if way[0] > 0 else "left"), length
    return ("down" if way[1] > 0 else "up"), length


def _centroids(
    inside: npt.NDArray[np.float32], area: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """x and y, each (T,)."""
    safe = np.maximum(area, 1e-6)
    x = inside.sum(axis=1) @ (np.arange(inside.shape[2], dtype=np.float32) + 0.5) / safe
    y = inside.sum(axis=2) @ (np.arange(inside.shape[1], dtype=np.float32) + 0.5) / safe
    return x, y


def _nearest(value: float, named: dict[str, float]) -> str:
    return min(named, key=lambda name: abs(value - named[name]))
