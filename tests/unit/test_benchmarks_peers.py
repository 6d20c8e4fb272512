"""The pure parts of `make bench-peers`: traces, statistics, goals, report, picture."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.memory import growth
from benchmarks.memory import main as measure_memory
from benchmarks.peers.contenders import Contender, NoClip
from benchmarks.peers.picture import LEGEND, write_picture
from benchmarks.peers.races import run_open
from benchmarks.peers.report import (
    Bare,
    Closed,
    Found,
    Goal,
    Killed,
    Leaving,
    Open,
    PeersReport,
    ahead,
    best_peer,
    goals,
    markdown,
    rows,
)
from benchmarks.peers.run import main, open_of
from benchmarks.peers.traces import (
    IN_FIVE,
    LOADS,
    STEPS,
    Arrival,
    Kind,
    Waits,
    arrivals,
    long_job,
    mixed_job,
    percentile,
    short_job,
    waits,
    with_leavers,
)
from benchmarks.peers.worker_files import STEPS_FILE, step_lines, steps_after
from benchmarks.report import Machine

OURS = "wan-serve"


def make_waits(seconds: float) -> Waits:
    return Waits(count=9, mean=seconds, p50=seconds, p95=2 * seconds, p99=3 * seconds, within=0.75)


def make_found(*, rate: float = 100.0, seconds: float = 1.0, **over: Any) -> Found:
    """Of a contender that makes `rate` clips a minute and takes so many seconds for a short one, under any load."""
    loops = (Closed(clients=n, clips_per_min=(rate - 1, rate + 1), waits=make_waits(seconds)) for n in (1, 16))
    opened = (
        Open(
            load=load,
            short_mean_s=(seconds, seconds),
            waits={"short": make_waits(seconds), "long": make_waits(3 * seconds)},
            failed=0,
        )
        for load in LOADS
    )
    fields: dict[str, Any] = {
        "ready_s": 12.0,
        "first_clip_s": 13.0,
        "closed": tuple(loops),
        "open": tuple(opened),
        "leaving": Leaving(clients_gone=3, wasted_steps=100, wasted_step_s=2.0),
        "killed": Killed(in_flight=8, lost=8, serves_again_s=None),
        "peak_pss_bytes": 600 * 2**20,
        "num_processes": 2,
    }
    return Found(**fields | over)


def make_ours(**over: Any) -> Found:
    fields: dict[str, Any] = {
        "rate": 120.0,
        "seconds": 0.4,
        "leaving": Leaving(clients_gone=3, wasted_steps=2, wasted_step_s=0.04),
        "killed": Killed(in_flight=8, lost=0, serves_again_s=9.0),
        "peak_pss_bytes": 1_600 * 2**20,
    }
    return make_found(**fields | over)


def make_report(found: dict[str, Found]) -> PeersReport:
    peers = {name: one for name, one in found.items() if name != OURS}
    best = best_peer(peers)
    assert best is not None
    return PeersReport(
        created_at=datetime(2026, 11, 27, 12, 0, tzinfo=UTC),
        duration_s=900.0,
        quick=False,
        machine=Machine(cpu="A CPU", num_cores=2, memory_bytes=8 * 2**30, load=0.25),
        versions={"python": "3.11.0", "litserve": "0.2.19"},
        bare=Bare(solo_s={"short": 0.3, "long": 0.9}, step_s=0.01, rate=3.0),
        contenders=found,
        left_out={"cog": "it did not start"},
        best_peer=best,
        goals=goals(found[OURS], peers[best], best, [(0.33, 0.3)]),
        waiting_service_cores=0.04,
        download_s=0.005,
    )


@pytest.mark.parametrize(("percent", "expected"), [(50, 5.0), (95, 10.0), (99, 10.0), (0, 1.0)])
def test_percentile_is_a_value_that_was_seen(percent: float, expected: float) -> None:
    assert percentile([float(n) for n in range(10, 0, -1)], percent) == expected


def test_waits_count_what_failed_as_not_in_time() -> None:
    found = waits([1.0, 2.9, 3.1], solo_s=1.0, failed=1)

    assert found is not None
    assert found.within == 2 / 4
    assert (found.count, found.p50) == (3, 2.9)


def test_waits_of_nothing_are_none() -> None:
    assert waits([], solo_s=1.0, failed=3) is None


SOLO_S: dict[Kind, float] = {"short": 1.0, "long": 4.0}


class Scripted(Contender):
    """A contender that answers by the client's number."""

    def __init__(self, fails: Sequence[int] = (), clip_takes_s: float = 0.0, folder: Path = Path()) -> None:
        super().__init__("scripted", os.getpid(), "http://scripted", 0.0, folder)
        self._fails, self._clip_takes_s = fails, clip_takes_s

    async def _clip(self, body: dict[str, Any]) -> None:
        if body["seed"] in self._fails:
            raise NoClip("scripted")
        await asyncio.sleep(self._clip_takes_s)

    def worker(self) -> int:
        return self.pid


def test_requests_that_failed_count_against_their_own_kind() -> None:
    sent = [Arrival(0.0, "short"), Arrival(0.0, "short"), Arrival(0.0, "long"), Arrival(0.0, "long")]
    served = asyncio.run(run_open(Scripted(fails=[10, 12, 13]), sent, first=10))

    assert served.failed == {"short": 1, "long": 2}
    found = open_of(0.8, [served], Bare(solo_s=SOLO_S, step_s=0.01, rate=3.0))
    assert found.failed == 3
    assert found.waits["short"] is not None
    assert found.waits["short"].within == 1 / 2
    assert found.waits["long"] is None


def test_a_trace_without_a_clip_is_a_missed_goal_and_no_end_of_the_run() -> None:
    served = asyncio.run(run_open(Scripted(fails=[0, 1]), [Arrival(0.0, "short"), Arrival(0.0, "long")], first=0))
    nothing = open_of(0.8, [served, served], Bare(solo_s=SOLO_S, step_s=0.01, rate=3.0))
    peer = make_found()
    peer = peer.model_copy(update={"open": tuple(nothing if one.load == 0.8 else one for one in peer.open)})

    missed = [goal for goal in goals(make_ours(), peer, "cog", [(0.3, 0.3)]) if not goal.passed]

    assert nothing.short_mean_s == (None, None)
    assert [(goal.name, goal.value) for goal in missed] == [("mean of short jobs at 80% / cog", None)]
    text = markdown(make_report({OURS: make_ours(), "cog": peer}), OURS)
    assert "| mean of short jobs at 80% / cog | none in time | ≤ 0.50 | MISS |" in text


def test_a_client_that_leaves_in_time_is_gone_and_later_steps_of_its_job_are_wasted(tmp_path: Path) -> None:
    contender = Scripted(clip_takes_s=60.0, folder=tmp_path)
    began = time.monotonic()
    served = asyncio.run(run_open(contender, [Arrival(0.0, "short", leaves_after_s=0.0)], first=7))
    ended = time.monotonic()
    (tmp_path / STEPS_FILE).write_bytes(step_lines([7], began - 1, began) + step_lines([7, 8], ended, ended + 1))

    assert (served.gone, served.seconds["short"]) == (1, [])
    assert contender.wasted_steps() == 1


def test_of_a_step_under_way_when_its_client_leaves_the_part_after_is_wasted() -> None:
    text = (step_lines([1, 2], 10.0, 11.0) + step_lines([1, 2], 11.0, 12.0)).decode()

    assert steps_after(text, {}) == 0
    assert steps_after(text, {1: 10.75}) == 1.25
    assert steps_after(text, {1: 10.75, 2: 5.0, 3: 0.0}) == 3.25
    assert steps_after(text, {1: 12.0}) == 0


def test_a_clip_that_comes_before_its_client_leaves_is_served() -> None:
    served = asyncio.run(run_open(Scripted(), [Arrival(0.0, "short", leaves_after_s=30.0)], first=7))

    assert (served.gone, len(served.seconds["short"])) == (0, 1)


def test_memory_of_a_contender_counts_its_process() -> None:
    assert Scripted().memory().num_processes >= 1


def test_arrivals_are_the_same_for_each_seed_and_one_in_five_is_long() -> None:
    sent = arrivals(1, rate=5.0, window_s=40.0)

    assert sent == arrivals(1, rate=5.0, window_s=40.0)
    assert sent != arrivals(2, rate=5.0, window_s=40.0)
    assert [one.at_s for one in sent] == sorted(one.at_s for one in sent)
    assert 100 < len(sent) < 300
    for first in range(0, len(sent) - IN_FIVE, IN_FIVE):
        assert [one.kind for one in sent[first : first + IN_FIVE]].count("long") == 1


def test_arrivals_are_five_at_least_however_short_the_window() -> None:
    assert len(arrivals(0, rate=0.01, window_s=0.1)) == IN_FIVE


def test_one_client_in_five_leaves_after_half_of_its_solo_time() -> None:
    sent = arrivals(3, rate=5.0, window_s=20.0)[:50]
    found = with_leavers(sent, {"short": 1.0, "long": 4.0})

    leaving = [one for one in found if one.leaves_after_s is not None]
    assert len(leaving) == 10
    assert {one.leaves_after_s for one in leaving} <= {0.5, 2.0}
    assert [one.at_s for one in found] == [one.at_s for one in sent]


def test_jobs_differ_in_prompt_seed_and_steps_alone() -> None:
    assert (short_job(7).num_inference_steps, long_job(7).num_inference_steps) == (STEPS["short"], STEPS["long"])
    assert short_job(7).model_fields_set == {"prompt", "seed", "num_inference_steps"}
    assert short_job(7).prompt == long_job(7).prompt != long_job(8).prompt
    assert [mixed_job(n).num_inference_steps for n in range(10)].count(STEPS["long"]) == 2


def test_best_peer_makes_the_most_clips_when_saturated() -> None:
    assert best_peer({"FastAPI": make_found(rate=90.0), "LitServe": make_found(rate=110.0)}) == "LitServe"
    assert best_peer({}) is None


def test_all_goals_are_met_by_a_better_service() -> None:
    found = goals(make_ours(), make_found(), "LitServe", [(0.33, 0.3), (0.30, 0.3)])

    assert [goal.name for goal in found if not goal.passed] == []
    assert len(found) == 8


@pytest.mark.parametrize(
    ("ours", "missed"),
    [
        (make_ours(rate=90.0), "clips per minute, 16 clients / LitServe"),
        (
            make_ours(leaving=Leaving(clients_gone=3, wasted_steps=9, wasted_step_s=0.2)),
            "wasted step-seconds / LitServe",
        ),
        (make_ours(killed=Killed(in_flight=8, lost=1, serves_again_s=9.0)), "jobs lost at a SIGKILL, of 8"),
        (make_ours(killed=Killed(in_flight=0, lost=0, serves_again_s=9.0)), "jobs lost at a SIGKILL, of 0"),
        (make_ours(ready_s=25.1), "start to ready, s"),
        (make_ours(peak_pss_bytes=2_049 * 2**20), "memory, model included, MiB"),
    ],
)
def test_a_missed_goal_is_told(ours: Found, missed: str) -> None:
    found = goals(ours, make_found(), "LitServe", [(0.3, 0.3)])

    assert [goal.name for goal in found if not goal.passed] == [missed]


def test_short_jobs_are_to_take_half_of_the_best_peers_time_where_there_is_a_queue() -> None:
    found = goals(make_ours(seconds=0.51), make_found(seconds=1.0), "LitServe", [(0.3, 0.3)])

    missed = [goal.name for goal in found if not goal.passed]
    assert missed == ["mean of short jobs at 80% / LitServe", "mean of short jobs at 110% / LitServe"]


def test_growth_leaves_the_warm_up_out() -> None:
    assert growth([1, 1, 100, 100, 100, 100, 104, 106]) == pytest.approx(1.05)
    with pytest.raises(ValueError, match="four values"):
        growth([1, 2, 3])


def test_one_client_may_take_a_tenth_and_fifty_milliseconds_more_than_the_engine() -> None:
    def alone(service_s: float) -> Goal:
        found = goals(make_ours(), make_found(), "LitServe", [(service_s, 0.5)])
        return next(goal for goal in found if goal.name.startswith("one client"))

    assert alone(0.59).passed
    assert not alone(0.61).passed


def test_waste_of_a_peer_that_wastes_nothing_is_no_division_by_zero() -> None:
    clean = Leaving(clients_gone=3, wasted_steps=0, wasted_step_s=0.0)
    found = goals(make_ours(), make_found(leaving=clean), "cog", [(0.3, 0.3)])

    assert [goal.name for goal in found if not goal.passed] == ["wasted step-seconds / cog"]


def test_without_peers_the_goals_are_those_of_the_service_alone() -> None:
    assert all(goal.passed for goal in goals(make_ours(), None, "", [(0.3, 0.3)]))


def test_a_peer_that_is_better_is_named() -> None:
    tables = rows({OURS: make_ours(), "FastAPI": make_found(), "LitServe": make_found(rate=130.0)})

    lines = [line for table in tables.values() for line in ahead(table, OURS)]
    assert "16 clients: clips: LitServe 130.0, wan-serve 120.0 per min" in lines
    assert "peak memory (PSS), all processes: FastAPI 600, wan-serve 1600 MiB" in lines
    assert not [line for line in lines if line.startswith(("50%, short: mean", "jobs"))]


def test_a_peer_that_has_a_figure_where_we_have_none_is_named() -> None:
    ours = make_ours(killed=Killed(in_flight=8, lost=8, serves_again_s=None))
    peer = make_found(killed=Killed(in_flight=8, lost=8, serves_again_s=7.0))

    lines = ahead(rows({OURS: ours, "LitServe": peer})["The rest"], OURS)

    assert "SIGKILL to the next clip: LitServe 7.0 s, wan-serve none in time" in lines


def test_report_is_json_that_reads_back_and_even_tables() -> None:
    report = make_report({OURS: make_ours(), "FastAPI": make_found(rate=90.0), "LitServe": make_found()})

    text = markdown(report, OURS)

    assert PeersReport.model_validate_json(report.model_dump_json()) == report
    assert "| 16 clients: clips | per min | 120.0 | 90.0 (0.75) | 100.0 (0.83) |" in text
    assert "| SIGKILL to the next clip | s | 9.0 | none in time | none in time |" in text
    assert "| clips per minute, 16 clients / LitServe | 1.200 | ≥ 1.00 | pass |" in text
    assert "- cog is left out: it did not start" in text
    for table in text.split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_picture_has_a_line_for_each_contender(tmp_path: Path) -> None:
    write_picture({OURS: make_ours(), "FastAPI": make_found(), "cog": make_found(seconds=30.0)}, tmp_path / "p.png")

    with Image.open(tmp_path / "p.png") as picture:
        panels = picture.convert("RGB").crop((0, LEGEND, *picture.size))  # the legend has all colours anyway
        colours = {colour for _, colour in panels.getcolors(2**24) or []}
    assert {(0xC0, 0x39, 0x2B), (0x1F, 0x5F, 0xBF), (0x2E, 0x8B, 0x57)} <= colours


def test_help_is_told_without_measuring() -> None:
    command = [sys.executable, "-m", "benchmarks.peers.run", "--help"]
    environment = os.environ | {"PYTHONPATH": "tests"}  # as the Makefile does, for the S3 server
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert told.returncode == 0
    assert all(option in told.stdout for option in ("--quick", "--rounds", "--window", "--out", "--check", "--python"))


def test_an_interpreter_that_is_not_there_is_told_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--python", "/nowhere/python"])

    assert ended.value.code == 2
    assert "/nowhere/python can't be run" in capsys.readouterr().err


@pytest.mark.parametrize("clips", ["0", "223"])
def test_too_few_clips_for_a_growth_are_refused(clips: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        measure_memory(["--clips", clips])

    assert "must be at least 224" in capsys.readouterr().err
