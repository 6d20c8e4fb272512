"""`make bench`, second part: batches accepted, pages of a long history, and whose turn it is under load."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress
from s3_servers.ministack import Ministack

from benchmarks import pages, trace
from benchmarks.command import RESULTS, progress, run_command
from benchmarks.figures import Comparison, Measure, at_most, keeps_rate, spread
from benchmarks.machine import machine
from benchmarks.report import JobsReport, jobs_markdown, jobs_tables, versions
from benchmarks.service import Service, ServiceFailed, running_service, write_config
from benchmarks.tables import print_tables, write_report_files
from benchmarks.workload import request
from serve_graph.engine.checkpoint_folder import SHIPPED

BATCH = 2_000
SINGLES = 100
ROUNDS = 3
TRACES = 3


class _Acceptance:
    """Items per second, sent as one batch and one by one, in turns."""

    def __init__(self) -> None:
        self.batch: list[float] = []
        self.singles: list[float] = []

    async def measure(self, service: Service, advance: Progress) -> None:
        limits = httpx.Limits(max_connections=16)
        task = advance.add_task("batches and singles accepted", total=ROUNDS)
        async with httpx.AsyncClient(base_url=service.base_url, timeout=120, limits=limits) as http:
            for number in range(ROUNDS):
                lines = [request(number * BATCH + n).model_dump_json(exclude_unset=True) for n in range(BATCH)]
                began = time.perf_counter()
                answer = await http.post(
                    "/batches", content="\n".join(lines), headers={"content-type": "application/x-ndjson"}
                )
                _expect(answer, 202)
                self.batch.append(BATCH / (time.perf_counter() - began))
                _expect(await http.post(f"/batches/{answer.json()['batch_id']}/cancel"), 200, 202)
                await self._singles(http, number)
                advance.advance(task)

    async def _singles(self, http: httpx.AsyncClient, number: int) -> None:
        turns = asyncio.Semaphore(8)

        async def one(n: int) -> str:
            async with turns:
                body = request(900_000 + number * SINGLES + n).model_dump(mode="json", exclude_unset=True)
                answer = await http.post(
                    "/generate", json=body | {"num_inference_steps": 100}, headers={"Prefer": "respond-async"}
                )
                _expect(answer, 202)
                return str(answer.json()["job_id"])

        began = time.perf_counter()
        job_ids = await asyncio.gather(*map(one, range(SINGLES)))
        self.singles.append(SINGLES / (time.perf_counter() - began))
        for job_id in job_ids:
            _expect(await http.post(f"/jobs/{job_id}/cancel"), 200, 202)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 1 when it could not measure or, with --check, a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for jobs.json and jobs.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed")
    options = parser.parse_args(arguments)

    def tell(report: JobsReport, console: Console) -> None:
        write_report_files(report, "jobs", jobs_markdown(report), options.out)
        print_tables(jobs_tables(report), console)

    return run_command(run, tell, failures=(ServiceFailed, httpx.HTTPError), check=options.check)


def run(scratch: Path, console: Console) -> JobsReport:
    """Measure everything. scratch: an empty folder for all that is made on the way."""
    began, created_at, here = time.monotonic(), datetime.now(UTC), machine()
    measures: list[Measure] = []
    comparisons: list[Comparison] = []
    with progress(console) as bar:
        _pages(scratch, bar, measures, comparisons)
        _accepted(scratch, bar, measures)
        _whose_turn(scratch, bar, measures, comparisons)
    return JobsReport(
        created_at=created_at,
        duration_s=time.monotonic() - began,
        machine=here,
        versions=versions(),
        measures=tuple(measures),
        comparisons=tuple(comparisons),
    )


def _pages(scratch: Path, bar: Progress, measures: list[Measure], comparisons: list[Comparison]) -> None:
    task = bar.add_task("pages of jobs", total=pages.FEW + pages.MANY + pages.ROUNDS)
    few, many = pages.page_times(scratch / "pages", lambda count: bar.advance(task, count))
    measures += [
        Measure(name=f"page of {pages.PAGE}, {pages.FEW} records", unit="s", spread=spread(few)),
        Measure(name=f"page of {pages.PAGE}, {pages.MANY:,} records", unit="s", spread=spread(many)),
    ]
    comparisons.append(at_most(f"page with {pages.MANY:,} records / {pages.FEW}", many, few, share=1.5))


def _accepted(scratch: Path, bar: Progress, measures: list[Measure]) -> None:
    queue = {"max_waiting_jobs": 2 * SINGLES}
    with Ministack(scratch / "ministack") as server:
        os.environ |= {"WAN_S3_ACCESS_KEY": server.info.access_key, "WAN_S3_SECRET_KEY": server.info.secret_key}
        for name, endpoint in (("local folder", None), ("ministack", server.info.endpoint)):
            folder = scratch / name.replace(" ", "-")
            config, settings = write_config(folder, endpoint, queue=queue)
            found = _Acceptance()
            with running_service(config, settings, folder) as service:
                asyncio.run(found.measure(service, bar))
            measures += [
                Measure(name=f"accepted as batches of {BATCH:,}, {name}", unit="items/s", spread=spread(found.batch)),
                Measure(name=f"accepted one by one, {name}", unit="items/s", spread=spread(found.singles)),
            ]
        for name in ("WAN_S3_ACCESS_KEY", "WAN_S3_SECRET_KEY"):
            del os.environ[name]


def _whose_turn(scratch: Path, bar: Progress, measures: list[Measure], comparisons: list[Comparison]) -> None:
    """The same traces under both policies: two services side by side, of which one works at a time."""
    task = bar.add_task("mixed trace, srpt and fifo", total=2 * TRACES)
    outcomes: dict[str, list[trace.Outcome]] = {"fifo": [], "srpt": []}
    queue = {"max_waiting_jobs": 4 * trace.COUNT}
    model = {"profile": trace.PROFILE.model_dump(mode="json"), "path": str(SHIPPED)}
    fifo_config, fifo_settings = write_config(scratch / "fifo", model=model, queue=queue | {"policy": "fifo"})
    srpt_config, srpt_settings = write_config(scratch / "srpt", model=model, queue=queue | {"policy": "srpt"})
    with (
        running_service(fifo_config, fifo_settings, scratch / "fifo") as fifo,
        running_service(srpt_config, srpt_settings, scratch / "srpt") as srpt,
    ):
        services = {"fifo": fifo, "srpt": srpt}
        asyncio.run(_race(services, outcomes, lambda: bar.advance(task)))
    goals = {"short clips, mean": 0.5, "short clips, p95": 0.5, "worst long clip": 1.5}
    seconds = {name: _seconds(found) for name, found in outcomes.items()}
    rates = {name: [outcome.clips_per_s for outcome in found] for name, found in outcomes.items()}
    for name in outcomes:
        measures += [Measure(name=f"{name}: {what}", unit="s", spread=spread(seconds[name][what])) for what in goals]
        measures.append(Measure(name=f"{name}: whole trace", unit="clips/s", spread=spread(rates[name])))
    comparisons += [
        at_most(f"srpt / fifo, {what}", seconds["srpt"][what], seconds["fifo"][what], share=share)
        for what, share in goals.items()
    ]
    comparisons.append(keeps_rate("srpt / fifo, whole trace", rates["srpt"], rates["fifo"], share=0.95))


def _seconds(found: Sequence[trace.Outcome]) -> dict[str, list[float]]:
    """The figures of each trace that a goal is about."""
    return {
        "short clips, mean": [outcome.short_mean_s for outcome in found],
        "short clips, p95": [outcome.short_p95_s for outcome in found],
        "worst long clip": [outcome.worst_long_s for outcome in found],
    }


async def _race(
    services: dict[str, Service], outcomes: dict[str, list[trace.Outcome]], advance: Callable[[], None]
) -> None:
    limits = httpx.Limits(max_connections=None)
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(
                httpx.AsyncClient(base_url=service.base_url, timeout=600, limits=limits)
            )
            for name, service in services.items()
        }
        for http in clients.values():  # also the warm-up; the last one's times are taken for both
            short_s = await trace.alone(http, trace.SHORT, 0)
            long_s = await trace.alone(http, trace.LONG, 10)
        for number in range(TRACES):
            sent = trace.arrivals(number, short_s, long_s)
            for name in ("fifo", "srpt") if number % 2 else ("srpt", "fifo"):
                outcomes[name].append(await trace.run(clients[name], sent, 1000 * (number + 1)))
                advance()


def _expect(answer: httpx.Response, *statuses: int) -> None:
    if answer.status_code not in statuses:
        raise ServiceFailed(f"status {answer.status_code}: {answer.text[:500]}")


if __name__ == "__main__":
    sys.exit(main())
