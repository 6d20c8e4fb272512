"""Seconds left, learnt from what was seen."""

import pytest

from serve_graph.engine.pace import Pace

SHAPE = (9, 64, 64)
OTHER_SHAPE = (17, 64, 64)


def test_pace_does_not_guess_before_the_first_step() -> None:
    assert Pace().seconds_left(SHAPE, steps=4, chunks=3) is None


def test_pace_does_not_guess_from_another_shape() -> None:
    pace = Pace()
    pace.saw_step(OTHER_SHAPE, 2.0)

    assert pace.seconds_left(SHAPE, steps=4, chunks=3) is None


def test_pace_counts_a_chunk_as_a_step_until_one_was_decoded() -> None:
    pace = Pace()
    pace.saw_step(SHAPE, 2.0)

    assert pace.seconds_left(SHAPE, steps=4, chunks=3) == pytest.approx((4 + 3) * 2.0)


def test_pace_adds_up_steps_and_chunks_once_both_were_seen() -> None:
    pace = Pace()
    pace.saw_step(SHAPE, 2.0)
    pace.saw_chunk(SHAPE, 0.5)

    assert pace.seconds_left(SHAPE, steps=4, chunks=3) == pytest.approx(4 * 2.0 + 3 * 0.5)


def test_pace_is_zero_when_nothing_is_left() -> None:
    pace = Pace()
    pace.saw_step(SHAPE, 2.0)

    assert pace.seconds_left(SHAPE, steps=0, chunks=0) == 0.0


def test_pace_follows_a_lasting_change_and_not_one_slow_step() -> None:
    pace = Pace()
    pace.saw_step(SHAPE, 1.0)
    pace.saw_step(SHAPE, 11.0)
    after_one = pace.seconds_left(SHAPE, steps=1, chunks=0)
    for _ in range(20):
        pace.saw_step(SHAPE, 11.0)
    after_many = pace.seconds_left(SHAPE, steps=1, chunks=0)

    assert after_one is not None
    assert after_one < 6.0
    assert after_many == pytest.approx(11.0, rel=0.01)
