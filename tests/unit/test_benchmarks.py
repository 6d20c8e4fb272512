"""The pure parts of `make bench`: figures, workload, roles, report. What takes long is the benchmark itself."""

import asyncio
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from random_wan import RANDOM_WAN

from benchmarks import races, trace
from benchmarks.figures import Measure, at_most, keeps_rate, no_slower, ratios, spread, within_overhead
from benchmarks.machine import Machine
from benchmarks.processes import TOGETHER, Memory, cpu_seconds, memory, memory_by_role, role_of
from benchmarks.races import Findings, Numbers, Plan, idle_share
from benchmarks.report import Agreement, Asked, JobsReport, Report, jobs_markdown, markdown, median_timings
from benchmarks.run import measures
from benchmarks.service import ServiceFailed, busy_seconds
from benchmarks.tables import write_report_files
from benchmarks.workload import IN_FLIGHT, closed_loop, request
from schemas.clips import Timings
from serve_graph.metrics import GeneratorMetrics, merge, new_registry, snapshot
from serve_graph.settings import EncodeSettings, EngineSettings, TextSettings


def make_report(*, rate: float = 9.0) -> Report:
    return Report(
        created_at=datetime(2026, 11, 5, 12, 0, tzinfo=UTC),
        duration_s=12.0,
        machine=Machine(cpu="A CPU", num_cores=2, memory_bytes=8 * 2**30, load=0.25),
        versions={"python": "3.11.0"},
        asked=Asked(
            model=RANDOM_WAN.name,
            parameters=RANDOM_WAN.resolve(request(0)),
            engine=EngineSettings(),
            text=TextSettings(),
            encode=EncodeSettings(),
            clips=3,
            rounds=2,
        ),
        agreement=Agreement(mean_abs_difference=0.0, other_clip=11.0, service_sha256_equals_engine=True),
        measures=(Measure(name="stock", unit="s", spread=spread([0.2, 0.1, 0.4])),),
        comparisons=(
            no_slower("engine / stock", [0.1, 0.1], [0.2, 0.1]),
            keeps_rate("service / engine", [rate, rate], [10.0, 10.0], share=0.85),
        ),
        stages={"engine": Timings(denoise=0.05)},
        cpu_s_per_clip={"engine": 0.1},
        memory={"engine": Memory(num_processes=1, peak_rss_bytes=2**20, pss_bytes=2**19)},
    )


def test_ratios_are_taken_pair_by_pair() -> None:
    found = ratios([2.0, 30.0, 1.0], [1.0, 10.0, 1.0])

    assert (found.median, found.min, found.max, found.count) == (2.0, 1.0, 3.0, 3)


def test_ratios_refuse_values_without_a_partner() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("seconds", "passed"), [(1.21, True), (1.22, False)])
def test_overhead_may_be_a_share_and_a_constant_together(seconds: float, passed: bool) -> None:
    found = within_overhead("service / engine", [seconds], [1.0], factor=1.15, extra_s=0.0625)

    assert found.passed is passed


@pytest.mark.parametrize(("rate", "passed"), [(8.5, True), (8.4, False)])
def test_a_missed_rate_fails_the_report(rate: float, passed: bool) -> None:
    assert make_report(rate=rate).passed is passed


def test_no_two_requests_share_a_prompt() -> None:
    prompts = {request(number).prompt for number in range(2_000)}

    assert len(prompts) == 2_000


def test_requests_are_the_profiles_default_but_for_prompt_and_seed() -> None:
    parameters = RANDOM_WAN.resolve(request(7)).model_dump(exclude={"prompt", "seed"})

    assert parameters == RANDOM_WAN.resolve(request(8)).model_dump(exclude={"prompt", "seed"})
    assert request(7).model_fields_set == {"prompt", "seed"}


def test_numbers_are_handed_out_once() -> None:
    numbers = Numbers()

    assert [*numbers.take(2), *numbers.take(3)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("clips", [1, 4, 12])
def test_blocks_in_flight_are_whole_turns_of_the_slots(clips: int) -> None:
    num_timed = Plan(clips=clips, rounds=1).num_timed

    assert num_timed > 0
    assert num_timed % IN_FLIGHT == 0


def test_closed_loop_keeps_its_slots_taken_and_replaces_what_finished() -> None:
    under_way, peak, made = 0, 0, []

    async def make(number: int) -> None:
        nonlocal under_way, peak
        under_way += 1
        peak = max(peak, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        made.append(number)

    block = asyncio.run(closed_loop(make, 100, num_timed=6, in_flight=3))

    assert peak == 3
    assert len(made) == len(set(made)) == block.num_clips
    assert 3 + 6 <= block.num_clips <= 2 * 3 + 6
    assert min(made) == 100
    assert block.clips_per_s > 0


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("ray::ServeReplica:wan:Generator", "generator"),
        ("python -m serve_graph.cli serve --config x", "cli"),
        ("/x/core/src/ray/raylet/raylet --raylet_socket_name=y", "raylet"),
        ("ray::IDLE", "others"),
    ],
)
def test_roles_are_read_off_the_command_line(command: str, role: str) -> None:
    assert role_of(command) == role


def test_memory_and_cpu_time_of_a_process_can_be_read() -> None:
    found = memory([os.getpid()])

    assert found.num_processes == 1
    assert 0 < found.pss_bytes <= found.peak_rss_bytes
    assert sum(cpu_seconds(os.getpid()).values()) > 0


def test_memory_is_that_of_the_processes_that_have_not_ended() -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it waits for its parent to ask

    assert memory([ended.pid, os.getpid()]).num_processes == 1
    ended.wait()
    assert memory([ended.pid]) == Memory(num_processes=0, peak_rss_bytes=0, pss_bytes=0)


def test_memory_by_role_ends_with_that_of_all_together() -> None:
    found = memory_by_role(os.getpid())

    assert list(found)[-1] == TOGETHER
    assert found[TOGETHER].num_processes == sum(one.num_processes for one in found.values()) / 2


def test_stages_are_summed_up_one_by_one() -> None:
    found = median_timings([Timings(denoise=1, decode=5), Timings(denoise=2, decode=4), Timings(denoise=9, decode=3)])

    assert (found.denoise, found.decode) == (2, 4)


def test_report_is_written_as_json_that_reads_back_and_as_markdown(tmp_path: Path) -> None:
    report = make_report()

    write_report_files(report, "bench", markdown(report), tmp_path / "results")

    assert Report.model_validate_json((tmp_path / "results" / "bench.json").read_text()) == report
    assert (tmp_path / "results" / "bench.md").read_text() == markdown(report)
    assert json.loads((tmp_path / "results" / "bench.json").read_text())["comparisons"][0]["passed"] is True


def test_markdown_has_a_row_per_figure_in_tables_of_even_width() -> None:
    text = markdown(make_report(rate=8.0))

    assert "| stock | 200.0 | 100.0 | 400.0 | ms | 3 |" in text
    assert "| service / engine | 0.800 | 0.800 to 0.800 |  | 2 | rate ratio ≥ 0.85 | MISS |" in text
    for table in text.split("\n\n"):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def findings(**service: list[float]) -> Findings:
    """One value of everything, but for those of the service on the local folder that are given."""
    found = Findings(stock_s=[0.2], engine_s=[0.1])
    for beside in (found.service, found.on_s3):
        beside.engine_blocks_s, beside.service_blocks_s = [[0.1]], [[0.1]]
        beside.engine_rates, beside.service_rates, beside.idle_shares = [1.0], [1.0], [0.5]
    for name, values in service.items():
        setattr(found.service, name, values)
    return found


def test_report_has_a_row_for_how_idle_the_device_was_under_load() -> None:
    report = make_report().model_copy(update={"measures": measures(findings(idle_shares=[0.25, 0.125, 0.5]))})

    text = markdown(report)

    assert "| service, 8 clients: device idle | 25.00 | 12.50 | 50.00 | % | 3 |" in text
    assert "| service on S3, 8 clients: device idle | 50.00 | 50.00 | 50.00 | % | 1 |" in text


def test_idle_share_is_what_the_device_s_work_leaves_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, busy = 100.0, 7.0

    def work() -> None:
        nonlocal now, busy
        now, busy = now + 8.0, busy + 6.0

    monkeypatch.setattr(races, "time", SimpleNamespace(perf_counter=lambda: now))

    assert idle_share(lambda: busy, work) == 0.25


def test_busy_seconds_are_read_off_the_service_s_own_page() -> None:
    registry = new_registry()
    GeneratorMetrics(registry).device_worked(2.5)

    assert busy_seconds(merge([("Generator", "g1", snapshot(registry))]).decode()) == 2.5
    with pytest.raises(ServiceFailed, match="wan_device_busy_seconds_total"):
        busy_seconds(merge([]).decode())


def test_help_is_told_without_measuring() -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--help"]
    environment = os.environ | {"PYTHONPATH": "tests"}  # as the Makefile does, for the S3 server
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert told.returncode == 0
    assert all(option in told.stdout for option in ("--clips", "--rounds", "--out", "--check"))


def test_at_most_compares_the_median_of_the_pairs_with_its_share() -> None:
    met = at_most("srpt / fifo", [1.0, 2.0, 9.0], [4.0, 5.0, 10.0], share=0.5)
    missed = at_most("srpt / fifo", [3.0, 4.0, 9.0], [4.0, 5.0, 10.0], share=0.5)

    assert (met.ratio.median, met.passed) == (0.4, True)
    assert (missed.ratio.median, missed.passed) == (0.8, False)


def test_arrivals_are_the_same_for_each_seed_and_ordered_in_time() -> None:
    sent = trace.arrivals(3, short_s=0.1, long_s=1.0)

    assert sent == trace.arrivals(3, short_s=0.1, long_s=1.0)
    assert sent != trace.arrivals(4, short_s=0.1, long_s=1.0)
    assert [arrival.at_s for arrival in sent] == sorted(arrival.at_s for arrival in sent)
    assert {arrival.is_long for arrival in sent} == {True, False}


def test_jobs_report_has_a_row_for_each_measure_and_each_goal() -> None:
    report = JobsReport(
        created_at=datetime(2026, 11, 5, 12, 0, tzinfo=UTC),
        duration_s=12.0,
        machine=Machine(cpu="A CPU", num_cores=2, memory_bytes=8 * 2**30, load=0.25),
        versions={"python": "3.11.0"},
        measures=(Measure(name="accepted as batches", unit="items/s", spread=spread([100.0, 200.0, 300.0])),),
        comparisons=(at_most("page with many / few", [1.2], [1.0], share=1.5),),
    )

    text = jobs_markdown(report)
    assert "| accepted as batches | 200" in text
    assert "| page with many / few | 1.200 |" in text
    assert JobsReport.model_validate_json(report.model_dump_json()) == report
