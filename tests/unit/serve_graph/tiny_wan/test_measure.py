"""The measurer: right on every drawn clip, before and after our MP4 encoder, and honest about what is no shape."""

from pathlib import Path

import numpy as np
import pytest

from serve_graph.encode import Mp4Writer
from serve_graph.mp4_frames import read_frames
from serve_graph.settings import EncodeSettings
from serve_graph.tiny_wan.measure import measure
from serve_graph.tiny_wan.world import COMBINATIONS, Frames, Scene, draw, held_out_scene, place


def through_the_encoder(clip: Frames, folder: Path) -> Frames:
    path = folder / "clip.mp4"
    size = clip.shape[1]
    with Mp4Writer(path, width=size, height=size, fps=16, settings=EncodeSettings(), metadata={}) as writer:
        writer.write(clip)
    return read_frames(path)


def test_measure_reads_every_second_combination_as_drawn() -> None:
    rng = np.random.default_rng(0)
    for combination in COMBINATIONS[::2]:
        scene = Scene(*combination)
        seen = measure(draw(scene, place(scene, rng)))
        assert (seen.shape, seen.colour, seen.background, seen.motion) == combination


def test_measure_reads_everything_after_the_mp4_encoder_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        scene = held_out_scene(rng)
        seen = measure(through_the_encoder(draw(scene, place(scene, rng)), tmp_path))
        assert Scene(seen.shape, seen.colour, seen.background, seen.motion, seen.size, seen.speed) == scene


@pytest.mark.parametrize("num_frames", [5, 33, 81])
def test_measure_reads_clips_of_other_lengths_and_sizes(num_frames: int) -> None:
    rng = np.random.default_rng(2)
    scene = Scene("triangle", "yellow", "purple", "up", "large", "slow")
    clip = draw(scene, place(scene, rng), num_frames).repeat(2, axis=1).repeat(2, axis=2)
    seen = measure(clip)
    assert Scene(seen.shape, seen.colour, seen.background, seen.motion, seen.size, seen.speed) == scene


def test_measure_sees_nothing_in_a_plain_clip() -> None:
    seen = measure(np.full((17, 64, 64, 3), 250, dtype=np.uint8))
    assert (seen.shape, seen.colour, seen.motion, seen.background) == ("none", "none", "none", "white")


def test_measure_names_no_shape_in_noise() -> None:
    noise = np.random.default_rng(3).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    assert measure(noise).shape == "none"


def test_measure_follows_a_shape_through_blur() -> None:
    scene = Scene("square", "red", "white", "down", "medium", "fast")
    clip = draw(scene, place(scene, np.random.default_rng(4))).astype(np.float32)
    blurred = sum(np.roll(clip, (i, j), axis=(1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    seen = measure(blurred.round().astype(np.uint8))
    assert (seen.shape, seen.colour, seen.motion) == ("square", "red", "down")
