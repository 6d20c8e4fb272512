"""`make bench`: every contender in a process of its own, all in one run, taking turns; then the report."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import httpx
from rich.console import Console
from rich.progress import Progress
from s3_servers.ministack import Ministack

from benchmarks.child import ChildFailed, child
from benchmarks.command import RESULTS, positive, progress, run_command
from benchmarks.figures import Comparison, Measure, Spread, keeps_rate, no_slower, spread, within_overhead
from benchmarks.machine import machine
from benchmarks.races import BesideService, Findings, NotComparable, Plan, Races
from benchmarks.report import Agreement, Asked, Report, markdown, median_timings, tables, versions
from benchmarks.service import ServiceFailed, running_service, write_config
from benchmarks.tables import print_tables, write_report_files
from benchmarks.workload import IN_FLIGHT, request
from serve_graph.settings import Settings, StorageSettings
from serve_graph.stores import open_signed_store, prepare_store

OVERHEAD_FACTOR, OVERHEAD_S, RATE_SHARE = 1.15, 0.060, 0.85
"""Source: the goals of `make bench` in the issue that asked for it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 1 when it could not measure or, with --check, a goal was missed."""
    options = _parser().parse_args(arguments)

    def tell(report: Report, console: Console) -> None:
        write_report_files(report, "bench", markdown(report), options.out)
        print_tables(tables(report), console)

    return run_command(
        lambda scratch, console: run(Plan(options.clips, options.rounds), scratch, console),
        tell,
        failures=(ChildFailed, NotComparable, ServiceFailed),
        check=options.check,
    )


def run(plan: Plan, scratch: Path, console: Console) -> Report:
    """Measure everything. scratch: an empty folder for all that is made on the way.

    Raises ChildFailed, ServiceFailed, NotComparable.
    """
    began, created_at, here = time.monotonic(), datetime.now(UTC), machine()
    config, settings = write_config(scratch)
    with progress(console) as bar:
        races = Races(plan, bar)
        agreement = measure(races, bar, scratch, config, settings)
    found = races.findings
    return Report(
        created_at=created_at,
        duration_s=time.monotonic() - began,
        machine=here,
        versions=versions(),
        asked=_asked(plan, settings),
        agreement=agreement,
        measures=measures(found),
        comparisons=comparisons(found),
        stages={
            "engine": median_timings(found.engine_stages),
            "service, one client": median_timings(found.service.stages),
            "service on S3, one client": median_timings(found.on_s3.stages),
        },
        cpu_s_per_clip=found.cpu_s_per_clip,
        memory=found.memory,
    )


def measure(races: Races, bar: Progress, scratch: Path, config: Path, settings: Settings) -> Agreement:
    """Start the contenders and let them race; stock leaves before the service comes."""
    loading = bar.add_task("starting the contenders", total=4)
    engine_settings = settings.model_copy(update={"storage": StorageSettings(folder=scratch / "engine-store")})
    with ExitStack() as stack:
        engine = stack.enter_context(child("engine", engine_settings, scratch / "engine.log"))
        with child("stock", settings, scratch / "stock.log") as stock:
            for side in (engine, stock):
                side.answer()
                bar.advance(loading)
            distance, other_clip = races.compare_frames(stock, engine)
            races.stock_and_engine(stock, engine)
        server = stack.enter_context(Ministack(scratch / "ministack"))
        os.environ |= {"WAN_S3_ACCESS_KEY": server.info.access_key, "WAN_S3_SECRET_KEY": server.info.secret_key}
        s3_config, s3_settings = write_config(scratch / "s3", server.info.endpoint)
        with running_service(s3_config, s3_settings, scratch / "s3") as service:
            bar.advance(loading)
            races.one_client(engine, service, races.findings.on_s3)
            races.eight_in_flight(engine, service, races.findings.on_s3)
            _, clip = service.clip(0)
            body = httpx.get(clip.output_url).content
        s3_settings, _ = prepare_store(s3_settings)
        races.stores({"local folder": open_signed_store(settings), "ministack": open_signed_store(s3_settings)}, body)
        server.stop()
        service = stack.enter_context(running_service(config, settings, scratch))
        bar.advance(loading)
        same_bytes = races.compare_bytes(engine, service)
        races.one_client(engine, service, races.findings.service)
        races.eight_in_flight(engine, service, races.findings.service)
        stopping = bar.add_task("stopping the service", total=1)
    bar.advance(stopping)
    return Agreement(mean_abs_difference=distance, other_clip=other_clip, service_sha256_equals_engine=same_bytes)


def measures(found: Findings) -> tuple[Measure, ...]:
    """The rows of the first table."""
    alone, beside = _flat(found.service.engine_blocks_s), _flat(found.service.service_blocks_s)
    return (
        Measure(name="stock", unit="s", spread=spread(found.stock_s)),
        Measure(name="engine, beside stock", unit="s", spread=spread(found.engine_s)),
        Measure(name="engine, beside the service", unit="s", spread=spread(alone)),
        Measure(name="service, one client", unit="s", spread=spread(beside)),
        Measure(name="engine, 8 in flight", unit="clips/s", spread=spread(found.service.engine_rates)),
        Measure(name="service, 8 clients", unit="clips/s", spread=spread(found.service.service_rates)),
        Measure(name="service, 8 clients: device idle", unit="%", spread=_percent(found.service.idle_shares)),
        Measure(name="service on S3, one client", unit="s", spread=spread(_flat(found.on_s3.service_blocks_s))),
        Measure(name="service on S3, 8 clients", unit="clips/s", spread=spread(found.on_s3.service_rates)),
        Measure(name="service on S3, 8 clients: device idle", unit="%", spread=_percent(found.on_s3.idle_shares)),
        *(Measure(name=f"upload, {name}", unit="s", spread=spread(times)) for name, times in found.uploads_s.items()),
        *(Measure(name=f"presign, {name}", unit="s", spread=spread(times)) for name, times in found.presigns_s.items()),
    )


def comparisons(found: Findings) -> tuple[Comparison, ...]:
    """The three goals, the two of the service on either store."""
    return (
        no_slower("engine / stock", found.engine_s, found.stock_s),
        *_service_goals("service", found.service),
        *_service_goals("service on S3", found.on_s3),
    )


def _service_goals(name: str, found: BesideService) -> tuple[Comparison, Comparison]:
    engine_s, service_s = (
        [median(block) for block in blocks] for blocks in (found.engine_blocks_s, found.service_blocks_s)
    )
    return (
        within_overhead(
            f"{name}, one client / engine", service_s, engine_s, factor=OVERHEAD_FACTOR, extra_s=OVERHEAD_S
        ),
        keeps_rate(
            f"{name}, 8 clients / engine, 8 in flight", found.service_rates, found.engine_rates, share=RATE_SHARE
        ),
    )


def _asked(plan: Plan, settings: Settings) -> Asked:
    return Asked(
        model=settings.profile.name,
        parameters=settings.profile.resolve(request(0)),
        engine=settings.engine,
        text=settings.text,
        encode=settings.encode,
        clips=plan.clips,
        rounds=plan.rounds,
    )


def _flat(blocks: Sequence[Sequence[float]]) -> list[float]:
    return [seconds for block in blocks for seconds in block]


def _percent(shares: Sequence[float]) -> Spread:
    return spread([100 * share for share in shares])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Measure diffusers' own pipeline, the bare engine and the service against each other.",
    )
    parser.add_argument("--clips", type=positive, default=12, help="clips in a block, one at a time (%(default)s)")
    parser.add_argument(
        "--rounds",
        type=positive,
        default=8,
        help=f"blocks of each contender, one at a time and with {IN_FLIGHT} in flight (%(default)s)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for bench.json and bench.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
