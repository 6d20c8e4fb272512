"""Log lines of replicas, in whatever pieces they come."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_graph.replica_lines import ReplicaLines

OURS = '{"time": "2026-11-25T19:30:12.693Z", "event": "job"}'
OTHER = '{"time": "2026-11-25T19:30:13.000Z", "event": "request"}'


def batch(*lines: str, pid: int = 1, is_err: bool = True) -> dict[str, Any]:
    return {"pid": pid, "is_err": is_err, "lines": list(lines)}


def written(capsys: pytest.CaptureFixture[str], *batches: dict[str, Any]) -> list[str]:
    forward = ReplicaLines()
    for one in batches:
        forward(one)
    return capsys.readouterr().err.splitlines()


def test_ours_are_written_and_ray_s_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert written(capsys, batch("(raylet) hello", OURS, "{}"), batch(OTHER)) == [OURS, OTHER]


@pytest.mark.parametrize("cut", [3, 10, 30, len(OURS) - 1])
def test_a_line_in_two_pieces_is_one(capsys: pytest.CaptureFixture[str], cut: int) -> None:
    assert written(capsys, batch(OURS[:cut]), batch(OURS[cut:], OTHER)) == [OURS, OTHER]


def test_pieces_of_two_processes_are_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    batches = batch(OURS[:20]), batch(OTHER[:30], pid=2), batch(OURS[20:]), batch(OTHER[30:], pid=2)

    assert written(capsys, *batches) == [OURS, OTHER]


def test_a_line_whose_rest_never_comes_costs_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert written(capsys, batch(OURS[:20]), batch(OTHER)) == [OTHER]


@given(st.lists(st.text(max_size=20), max_size=5))
def test_any_talk_is_taken(lines: list[str]) -> None:
    ReplicaLines()(batch(*lines))
