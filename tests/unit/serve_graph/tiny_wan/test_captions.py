"""Captions: unseen templates stay unseen, and what is said is what is shown."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from serve_graph.tiny_wan.captions import (
    COLOUR_WORDS,
    HELD_OUT_TEMPLATES,
    SHAPE_WORDS,
    TRAINING_TEMPLATES,
    held_out_caption,
    plain_caption,
    training_caption,
)
from serve_graph.tiny_wan.world import MOTIONS, Scene, training_scene

Caption = Callable[[Scene, np.random.Generator], str]


def test_held_out_templates_are_none_of_the_training_s() -> None:
    assert set(HELD_OUT_TEMPLATES).isdisjoint(TRAINING_TEMPLATES)
    assert len(HELD_OUT_TEMPLATES) == 8


def test_plain_caption_is_the_sentence_of_the_readme() -> None:
    assert plain_caption(Scene("circle", "red", "blue", "left")) == "a red circle moving left on a blue background"


@pytest.mark.parametrize("caption", [lambda s, r: training_caption(s, r, complete=True), held_out_caption])
def test_a_caption_names_the_shape_and_both_colours(caption: Caption) -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = training_scene(rng)
        text = caption(scene, rng)
        for words in (SHAPE_WORDS[scene.shape], COLOUR_WORDS[scene.colour], COLOUR_WORDS[scene.background]):
            assert any(re.search(rf"\b{word}\b", text) for word in words.split("|")), text


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if motion != "still"])
def test_words_of_a_direction_are_no_other_s(motion: str) -> None:
    """`from left to right` names both ends, but no caption of one direction reads like one of another."""
    rng = np.random.default_rng(0)
    captions = {
        m: {training_caption(Scene("circle", "red", "blue", m), rng, complete=True) for _ in range(400)}
        for m in MOTIONS
    }
    for other in set(MOTIONS) - {motion}:
        assert captions[motion].isdisjoint(captions[other])


def test_captions_are_clean_english_of_many_kinds() -> None:
    rng = np.random.default_rng(0)
    scene = Scene("circle", "orange", "blue", "left")
    captions = [training_caption(scene, rng) for _ in range(300)]
    assert len(set(captions)) > 290
    for caption in captions:
        assert not re.search(r"\s{2}|^\s|\s$|[{}]|\ba [aeiou]", caption), caption


def test_captions_come_from_the_rng_alone() -> None:
    scene = Scene("square", "green", "white", "still")
    first, second = ([training_caption(scene, np.random.default_rng(i)) for i in range(20)] for _ in range(2))
    assert first == second
