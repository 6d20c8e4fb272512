"""`PYTHONPATH=tests python -m benchmarks.memory`: the service's memory over many clips, no two prompts alike."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean

import httpx
from rich.console import Console
from s3_servers.ministack import Ministack

from benchmarks.command import RESULTS, at_least, progress, run_command
from benchmarks.machine import Machine, machine
from benchmarks.processes import TOGETHER, memory_by_role
from benchmarks.report import versions
from benchmarks.service import ServiceFailed, running_service, write_config
from benchmarks.tables import Part, Table, print_tables, write_report_files
from benchmarks.workload import IN_FLIGHT

CLIPS = 2_000
MAX_GROWTH, MAX_BYTES = 1.05, 2 * 2**30
"""Source: the goals of the issue that asked for it."""

_BLOCK = 40
_FEWEST_CLIPS = 4 * (_BLOCK + 2 * IN_FLIGHT)
"""Four blocks of as many clips as a closed loop may make: `growth` needs four readings."""
_MIB = 2**20


class Reading(Part):
    """After so many clips, by role; `together` is everything."""

    clips: int
    pss_bytes: dict[str, int]


class MemoryReport(Part):
    """What was read. growth: the last quarter's mean over the second quarter's; the first one warms up."""

    created_at: datetime
    duration_s: float
    machine: Machine
    versions: dict[str, str]
    readings: tuple[Reading, ...]
    growth: float
    peak_bytes: int

    @property
    def passed(self) -> bool:
        return self.growth <= MAX_GROWTH and self.peak_bytes <= MAX_BYTES


def growth(values: Sequence[float]) -> float:
    """The mean of the last quarter over that of the second. Raises ValueError for fewer than four values."""
    quarter = len(values) // 4
    if not quarter:
        raise ValueError("growth needs four values at least")
    return mean(values[-quarter:]) / mean(values[quarter : 2 * quarter])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 1 when it could not measure or, with --check, a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument(
        "--clips", type=at_least(_FEWEST_CLIPS), default=CLIPS, help=f"{_FEWEST_CLIPS} at least (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for memory.json and memory.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed")
    options = parser.parse_args(arguments)

    def tell(report: MemoryReport, console: Console) -> None:
        write_report_files(report, "memory", markdown(report), options.out)
        print_tables([table(report)], console)

    return run_command(
        lambda scratch, console: run(options.clips, scratch, console),
        tell,
        failures=(ServiceFailed, httpx.HTTPError),
        check=options.check,
    )


def run(clips: int, scratch: Path, console: Console) -> MemoryReport:
    """Make clips, eight at a time, and read the memory after each block. Raises ServiceFailed."""
    began, created_at, here = time.monotonic(), datetime.now(UTC), machine()
    readings: list[Reading] = []
    with Ministack(scratch / "ministack") as server:
        os.environ |= {"WAN_S3_ACCESS_KEY": server.info.access_key, "WAN_S3_SECRET_KEY": server.info.secret_key}
        config, settings = write_config(scratch / "service", server.info.endpoint)
        with running_service(config, settings, scratch / "service") as service, progress(console) as bar:
            task, made = bar.add_task("clips", total=clips), 0
            while made < clips:
                made += service.block(made, _BLOCK).num_clips
                by_role = memory_by_role(service.pid)
                readings.append(Reading(clips=made, pss_bytes={role: one.pss_bytes for role, one in by_role.items()}))
                bar.update(task, completed=made)
    together = [reading.pss_bytes[TOGETHER] for reading in readings]
    return MemoryReport(
        created_at=created_at,
        duration_s=time.monotonic() - began,
        machine=here,
        versions=versions(),
        readings=tuple(readings),
        growth=growth(together),
        peak_bytes=max(together),
    )


def table(report: MemoryReport) -> Table:
    """A tenth of the readings, in MiB."""
    kept = report.readings[:: max(1, len(report.readings) // 10)]
    names = list(report.readings[-1].pss_bytes)
    rows = tuple((str(r.clips), *(f"{r.pss_bytes.get(name, 0) / _MIB:.0f}" for name in names)) for r in kept)
    return Table("Memory (PSS, MiB) after so many clips", ("clips", *names), rows)


def markdown(report: MemoryReport) -> str:
    """The Markdown file's text."""
    here = report.machine
    verdict = "pass" if report.passed else "MISS"
    return f"""# Benchmark: memory

{report.created_at:%Y-%m-%d %H:%M} UTC, {report.duration_s:.0f} s. {here.cpu}, {here.num_cores} cores. The service with
its defaults and ministack, {IN_FLIGHT} clips at a time, no two prompts alike. The last quarter over the second:
{report.growth:.3f} (goal ≤ {MAX_GROWTH}); peak {report.peak_bytes / _MIB:.0f} MiB, model included (goal ≤ 2,048):
{verdict}.

{table(report).markdown()}"""


if __name__ == "__main__":
    sys.exit(main())
