"""The world: what training may see, and that what is drawn stays within the frame."""

import numpy as np
import pytest

from serve_graph.tiny_wan.world import (
    COLOURS,
    COMBINATIONS,
    FIRST_STAGE,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    TRAINED,
    Scene,
    draw,
    held_out_scene,
    place,
    training_scene,
)


def test_held_out_and_trained_combinations_share_nothing_and_are_all_there_is() -> None:
    assert HELD_OUT.isdisjoint(TRAINED)
    assert len(HELD_OUT) + len(TRAINED) == len(COMBINATIONS) == 840


def test_held_out_combinations_are_the_same_in_every_version() -> None:
    """A checkpoint that ships was trained without exactly these."""
    assert len(HELD_OUT) == 253
    assert sorted(HELD_OUT)[:2] == [("circle", "black", "blue", "still"), ("circle", "black", "green", "still")]


def test_training_scenes_are_never_held_out() -> None:
    rng = np.random.default_rng(0)
    drawn = {training_scene(rng).combination for _ in range(5_000)}
    assert drawn.isdisjoint(HELD_OUT)
    assert len(drawn) > 0.99 * len(TRAINED)


def test_held_out_scenes_are_all_held_out() -> None:
    rng = np.random.default_rng(0)
    assert {held_out_scene(rng).combination for _ in range(2_000)} <= HELD_OUT


def test_first_stage_has_every_shape_and_motion_in_white_on_black() -> None:
    rng = np.random.default_rng(0)
    drawn = {training_scene(rng, first_stage=True).combination for _ in range(500)}
    assert drawn == set(FIRST_STAGE)
    assert {(shape, motion) for shape, _, _, motion in drawn} == {(s, m) for s in SHAPES for m in MOTIONS}


def test_every_value_is_trained_on_beside_every_other() -> None:
    for shape in SHAPES:
        assert {c for s, c, _, _ in TRAINED if s == shape} == set(COLOURS)
        assert {m for s, _, _, m in TRAINED if s == shape} == set(MOTIONS)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_shape_is_never_cut_by_more_than_an_eighth(motion: str) -> None:
    rng = np.random.default_rng(1)
    for shape in SHAPES:
        for size, speed in (("large", "fast"), ("small", "slow")):
            scene = Scene(shape, "white", "black", motion, size, "medium" if motion == "still" else speed)
            clip = draw(scene, place(scene, rng))
            areas = (clip[..., 0] > 128).sum(axis=(1, 2))
            assert areas.min() > 0.875 * areas.max()


def test_draw_gives_the_same_clip_for_the_same_seed_and_any_length() -> None:
    scene = Scene("triangle", "red", "blue", "left")
    first, second = (draw(scene, place(scene, np.random.default_rng(5))) for _ in range(2))
    assert first.shape == (17, 64, 64, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, second)
    longer = draw(scene, place(scene, np.random.default_rng(5)), num_frames=33)
    np.testing.assert_array_equal(longer[[0, -1]], first[[0, -1]])
