"""The world of the tiny Wan: one coloured shape on a plain background, moving or not. Pure numpy, no models.

A `Scene` says what a clip shows, a `Placement` where exactly; `draw` makes the frames. `HELD_OUT` are the
combinations that training never sees; whoever draws a scene to train on calls `training_scene`, which can't give one.
"""

import zlib
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
"""(T, H, W, 3) RGB."""

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (30, 60, 220),
    "yellow": (245, 220, 40),
    "orange": (250, 130, 20),
    "purple": (135, 40, 165),
    "white": (250, 250, 250),
    "black": (8, 8, 8),
}
"""Of shapes and backgrounds. sRGB."""
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
"""Steps along x and y; y grows downwards."""
SIZES = {"small": 10.0, "medium": 12.0, "large": 15.0}
"""The radius in pixels of a 64-pixel frame."""
SPEEDS = {"slow": 18.0, "medium": 30.0, "fast": 38.0}
"""The way of a whole clip, however long it is, in pixels of a 64-pixel frame."""

FRAME_PX = 64
NUM_FRAMES = 17
_DRIFT_PX = 6.0
"""How far from the middle a shape's way may lie."""
NUM_HELD_OUT = 256


@dataclass(frozen=True)
class Scene:
    """What a clip shows, in words that a caption can say. speed is `medium` and means nothing when it is still."""

    shape: str
    colour: str
    background: str
    motion: str
    size: str = "medium"
    speed: str = "medium"

    @property
    def combination(self) -> tuple[str, str, str, str]:
        """What the held-out set is made of."""
        return (self.shape, self.colour, self.background, self.motion)


COMBINATIONS = [c for c in product(SHAPES, COLOURS, COLOURS, MOTIONS) if c[1] != c[2]]
"""All 840 (shape, colour, background, motion)."""

HELD_OUT = frozenset(sorted(COMBINATIONS, key=lambda c: zlib.crc32(" ".join(c).encode()))[:NUM_HELD_OUT])
"""Never trained on: the first 256 in the order of a checksum, which no seed and no version changes."""

FIRST_STAGE = [(shape, "white", "black", motion) for shape, motion in product(SHAPES, MOTIONS)]
"""What is taught first: every shape and motion, white on black. These count as seen, whatever the checksum says."""

HELD_OUT = HELD_OUT - frozenset(FIRST_STAGE)
TRAINED = [c for c in COMBINATIONS if c not in HELD_OUT]


def training_scene(rng: np.random.Generator, *, first_stage: bool = False) -> Scene:
    """Draw a scene that training may see."""
    return _scene(rng, FIRST_STAGE if first_stage else TRAINED)


def held_out_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene that training never saw."""
    return _scene(rng, sorted(HELD_OUT))


def _scene(rng: np.random.Generator, combinations: list[tuple[str, str, str, str]]) -> Scene:
    shape, colour, background, motion = combinations[rng.integers(len(combinations))]
    size = str(rng.choice(list(SIZES)))
    speed = "medium" if motion == "still" else str(rng.choice(list(SPEEDS)))
    return Scene(shape, colour, background, motion, size, speed)


@dataclass(frozen=True)
class Placement:
    """Where a clip's shape is, in pixels of a 64-pixel frame. x, y: the middle of its way."""

    x: float
    y: float
    radius: float
    way: float


def place(scene: Scene, rng: np.random.Generator) -> Placement:
    """Draw what a caption doesn't say: the exact place, size and speed. Only a large, fast shape is cut a little."""
    radius = SIZES[scene.size] + rng.uniform(-0.7, 0.7)
    way = (SPEEDS[scene.speed] + rng.uniform(-2, 2)) if scene.motion != "still" else 0.0
    dx, dy = MOTIONS[scene.motion]
    middle = FRAME_PX / 2
    reach = _HALF_EXTENT * radius
    room_x = max(0.0, min(_DRIFT_PX, middle - reach - abs(dx) * way / 2))
    room_y = max(0.0, min(_DRIFT_PX, middle - reach - abs(dy) * way / 2))
    return Placement(middle + rng.uniform(-room_x, room_x), middle + rng.uniform(-room_y, room_y), radius, way)


def draw(scene: Scene, placement: Placement, num_frames: int = NUM_FRAMES) -> Frames:
    """The clip: (num_frames, 64, 64, 3) uint8, edges smooth over a pixel. The travel is even over the whole clip."""
    dx, dy = MOTIONS[scene.motion]
    along = (np.linspace(-0.5, 0.5, num_frames) if num_frames > 1 else np.zeros(1)) * placement.way
    x = (placement.x + dx * along)[:, None, None]  # (T, 1, 1)
    y = (placement.y + dy * along)[:, None, None]
    inside = coverage(scene.shape, x, y, placement.radius, FRAME_PX, FRAME_PX)[..., None]  # (T, H, W, 1)
    colour, background = (np.array(COLOURS[name], dtype=np.float32) for name in (scene.colour, scene.background))
    frames: Frames = (background + (colour - background) * inside).round().astype(np.uint8)
    return frames


_SQUARE = 0.9
_TRIANGLE = 1.35
_HALF_EXTENT = _TRIANGLE * 3**0.5 / 2
"""Half a square's side, a triangle's circumradius and half its width (the widest of the three), in radii of the circle:
about one area, so that the size doesn't tell the shape."""


def coverage(
    shape: str,
    x: npt.NDArray[np.floating],
    y: npt.NDArray[np.floating],
    radius: float | npt.NDArray[np.floating],
    height: int,
    width: int,
) -> npt.NDArray[np.float32]:
    """How much of each pixel the shape covers, 0 to 1. x, y: the middle of its bounding box, (T, 1, 1)."""
    u = np.arange(width, dtype=np.float32)[None, None, :] + 0.5 - x
    v = np.arange(height, dtype=np.float32)[None, :, None] + 0.5 - y
    if shape == "circle":
        distance = np.sqrt(u * u + v * v) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(u), np.abs(v)) - _SQUARE * radius
    else:  # an equilateral triangle that stands on its base
        circumradius = _TRIANGLE * radius
        low = v - circumradius / 4  # from the centroid, which lies below the box's middle
        distance = np.maximum(low, 3**0.5 / 2 * np.abs(u) - low / 2) - circumradius / 2
    inside: npt.NDArray[np.float32] = np.clip(0.5 - distance, 0, 1).astype(np.float32)
    return inside
