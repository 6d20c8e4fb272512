"""`make bench-peers`: starts all contenders, lets them take turns under the same traces, and writes the report."""

import argparse
import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median

import httpx
from rich.console import Console
from rich.progress import Progress, TaskID
from s3_servers.ministack import Ministack

from benchmarks.child import Child, ChildFailed, child
from benchmarks.command import RESULTS, positive, progress, run_command
from benchmarks.machine import machine
from benchmarks.peers.contenders import (
    LOGGED_SERVICE,
    OURS,
    PEERS,
    ROOT,
    Contender,
    NoClip,
    PeerFailed,
    Service,
    running_peer,
)
from benchmarks.peers.picture import write_picture
from benchmarks.peers.races import Loop, Served, run_closed, run_kill, run_leaving, run_open
from benchmarks.peers.report import (
    Bare,
    Closed,
    Found,
    Killed,
    Leaving,
    Open,
    PeersReport,
    best_peer,
    goals,
    markdown,
    tables,
)
from benchmarks.peers.traces import (
    IN_FIVE,
    LOADS,
    STEPS,
    Kind,
    arrivals,
    long_job,
    mixed_job,
    short_job,
    waits,
    with_leavers,
)
from benchmarks.peers.worker_files import FOLDER_VARIABLE
from benchmarks.processes import cpu_seconds
from benchmarks.races import Numbers
from benchmarks.report import versions
from benchmarks.service import ServiceFailed, running_service, write_config
from benchmarks.tables import print_tables, write_report_files
from benchmarks.workload import IN_FLIGHT
from serve_graph.engine.checkpoint_folder import locate_checkpoint
from serve_graph.settings import StorageSettings

LEAVING_LOAD = 0.8
_PACKAGES = ("fastapi", "uvicorn", "litserve", "cog", "coglet")
_TELL_VERSIONS = """
import sys
from importlib.metadata import PackageNotFoundError, version

for name in sys.argv[1:]:
    try:
        print(name, version(name))
    except PackageNotFoundError:
        pass
"""


@dataclass(frozen=True)
class Plan:
    """rounds: of everything but leavers and SIGKILL. clips: of a closed loop, by its clients.

    at_kill: jobs in flight then. again_s: how long a contender may take to its next clip.
    """

    rounds: int
    window_s: float
    clips: dict[int, int]
    solo: int
    at_kill: int
    again_s: float


FULL = Plan(rounds=2, window_s=15.0, clips={1: 7, 4: 16, 16: 48}, solo=5, at_kill=8, again_s=30.0)
QUICK = Plan(rounds=1, window_s=1.0, clips={1: 2, 2: 4, 3: 6}, solo=1, at_kill=2, again_s=20.0)


@dataclass
class Collected:
    """One contender's samples, in the order of the rounds."""

    ready_s: float = 0.0
    first_clip_s: float = 0.0
    closed: dict[int, list[Loop]] = field(default_factory=dict)
    open: dict[float, list[Served]] = field(default_factory=dict)
    leaving: tuple[int, float] = (0, 0.0)
    killed: Killed | None = None
    peak_pss_bytes: int = 0
    num_processes: int = 0


class Bench:
    """One run: who is there, and what was found."""

    def __init__(self, plan: Plan, bar: Progress, engine: Child) -> None:
        self._plan = plan
        self._bar = bar
        self._engine = engine
        self._numbers = Numbers()
        self._loop = asyncio.Runner()
        self._contenders: list[Contender] = []
        self._service: Service | None = None
        self.collected: dict[str, Collected] = {}
        self.solo_pairs: list[tuple[float, float]] = []
        self.download_s = 0.0
        self._waiting_cpu_s = self._waiting_s = 0.0

    @property
    def waiting_service_cores(self) -> float:
        """What the service took, on average, while others worked."""
        return self._waiting_cpu_s / self._waiting_s if self._waiting_s else 0.0

    def join(self, contender: Contender) -> None:
        """A contender is ready: its first clip."""
        (number,) = self._numbers.take(1)
        began = time.perf_counter()
        self._loop.run(contender.clip(short_job(number)))
        first_clip_s = contender.ready_s + time.perf_counter() - began
        self._contenders.append(contender)
        self.collected[contender.name] = Collected(contender.ready_s, first_clip_s)
        if isinstance(contender, Service):
            self._service = contender
            self.download_s = median(self._loop.run(contender.download()) for _ in range(5))

    def bare(self) -> Bare:
        """The engine alone: the yardstick for loads and for waiting times."""
        asked = {"short": short_job, "long": long_job}
        self._engine.call("clip", self._numbers.take(1).start, short_job)  # warm
        made = {
            kind: [self._engine.call("clip", n, asked[kind]) for n in self._numbers.take(self._plan.solo)]
            for kind in STEPS
        }
        num_timed = IN_FIVE * (2 * self._plan.solo)
        first = self._numbers.take(num_timed + 2 * IN_FLIGHT).start
        return Bare(
            solo_s={kind: median(seconds for seconds, _ in clips) for kind, clips in made.items()},
            step_s=median(clip.timings.denoise for _, clip in made["long"]) / STEPS["long"],
            rate=self._engine.call("block", first, num_timed, mixed_job).clips_per_s,
        )

    def races(self, bare: Bare) -> None:
        """Everything but the start, in turns: whoever begins changes from round to round."""
        blocks = self._plan.rounds * (len(self._plan.clips) + len(LOADS)) + 2
        task = self._bar.add_task("taking turns", total=blocks * len(self._contenders))
        for turn in range(self._plan.rounds):
            for clients, clips in self._plan.clips.items():
                numbers = self._numbers.take(clips)
                for contender in self._in_turn(turn, task, f"{clients} at once"):
                    loop = self._loop.run(run_closed(contender, numbers, clients))
                    self.collected[contender.name].closed.setdefault(clients, []).append(loop)
                if clients == 1:
                    self._beside_engine()
            for load in LOADS:
                sent = arrivals(turn, load * bare.rate, self._plan.window_s)
                first = self._numbers.take(len(sent)).start
                for contender in self._in_turn(turn, task, f"arrivals at {load:.0%}"):
                    served = self._loop.run(run_open(contender, sent, first))
                    self.collected[contender.name].open.setdefault(load, []).append(served)
        sent = with_leavers(arrivals(self._plan.rounds, LEAVING_LOAD * bare.rate, self._plan.window_s), bare.solo_s)
        first = self._numbers.take(len(sent) + 1).start
        for contender in self._in_turn(0, task, "clients leave"):
            self.collected[contender.name].leaving = self._loop.run(run_leaving(contender, sent, first))
        *at_kill, afterwards = self._numbers.take(self._plan.at_kill + 1)
        jobs = [long_job(number) for number in at_kill]
        for contender in self._in_turn(0, task, "SIGKILL"):
            rounds = itertools.chain.from_iterable(self.collected[contender.name].open.values())
            fastest_s = min([bare.solo_s["long"], *(s for served in rounds for s in served.seconds["long"])])
            after_s = len(jobs) * fastest_s / 2  # not later, since some must be in flight then
            killed = run_kill(contender, jobs, short_job(afterwards), after_s, self._plan.again_s)
            self.collected[contender.name].killed = self._loop.run(killed)

    def close(self) -> None:
        """Close the clients' connections."""
        for contender in self._contenders:
            self._loop.run(contender.http.aclose())
        self._loop.close()

    def _in_turn(self, turn: int, task: TaskID, what: str) -> Iterator[Contender]:
        """Each contender once. Beside it: the memory that it came to, and what the waiting service took."""
        shift = turn % len(self._contenders)
        for contender in self._contenders[shift:] + self._contenders[:shift]:
            self._bar.update(task, description=f"{what}: {contender.name}")
            with self._waiting_service(contender):
                yield contender
            self._remember_memory(contender)
            self._bar.advance(task)

    def _beside_engine(self) -> None:
        """The engine's turn at one clip at a time, for the round that the contenders have just had."""
        numbers = self._numbers.take(self._plan.clips[1])
        engine_s = median(self._engine.call("clip", number, short_job)[0] for number in numbers)
        self.solo_pairs.append((median(self.collected[OURS].closed[1][-1].seconds), engine_s))

    @contextmanager
    def _waiting_service(self, working: Contender) -> Iterator[None]:
        service = self._service
        if service is None or working is service or self.collected[OURS].killed is not None:
            yield
            return
        began, before = time.perf_counter(), sum(cpu_seconds(service.pid).values())
        yield
        self._waiting_s += time.perf_counter() - began
        self._waiting_cpu_s += sum(cpu_seconds(service.pid).values()) - before

    def _remember_memory(self, contender: Contender) -> None:
        found = self.collected[contender.name]
        if found.killed is None:  # afterwards there may be nobody left
            memory = contender.memory()
            found.peak_pss_bytes = max(found.peak_pss_bytes, memory.pss_bytes)
            found.num_processes = max(found.num_processes, memory.num_processes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 1 when it could not measure or, with --check, a goal was missed."""
    options = _parser().parse_args(arguments)
    plan = QUICK if options.quick else replace(FULL, rounds=options.rounds, window_s=options.window)

    def tell(report: PeersReport, console: Console) -> None:
        write_report_files(report, "peers", markdown(report, OURS), options.out)
        write_picture(report.contenders, options.out / "peers.png")
        print_tables(tables(report, OURS), console)

    return run_command(
        lambda scratch, console: run(plan, options.python, scratch, console),
        tell,
        failures=(ChildFailed, NoClip, ServiceFailed, httpx.HTTPError),
        check=options.check,
    )


def run(plan: Plan, python: Path, scratch: Path, console: Console) -> PeersReport:
    """Measure everything. python: of the environment with the peers' packages. scratch: an empty folder.

    Raises ChildFailed, ServiceFailed, NoClip.
    """
    began, created_at, here = time.monotonic(), datetime.now(UTC), machine()
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        bar = stack.enter_context(progress(console))
        starting = bar.add_task("starting the contenders", total=2 + len(PEERS))
        server = stack.enter_context(Ministack(scratch / "ministack"))
        os.environ |= {"WAN_S3_ACCESS_KEY": server.info.access_key, "WAN_S3_SECRET_KEY": server.info.secret_key}
        config, settings = write_config(scratch / "service", server.info.endpoint)
        (scratch / "engine").mkdir()
        storage = StorageSettings(folder=scratch / "engine" / "store")
        engine_settings = settings.model_copy(update={"storage": storage, "data_dir": scratch / "engine"})
        engine = stack.enter_context(child("engine", engine_settings, scratch / "engine.log"))
        engine.answer()
        bar.advance(starting)
        bench = Bench(plan, bar, engine)
        stack.callback(bench.close)
        starts_at = time.perf_counter()
        folder = scratch / "service"
        env = {FOLDER_VARIABLE: str(folder), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        service = stack.enter_context(running_service(config, settings, folder, LOGGED_SERVICE, env))
        bench.join(Service(OURS, service.pid, service.base_url, time.perf_counter() - starts_at, folder))
        bar.advance(starting)
        checkpoint = locate_checkpoint(settings.profile, None, None).folder
        for name in PEERS:
            try:
                with ExitStack() as own:  # which stops a peer that is left out
                    bench.join(own.enter_context(running_peer(name, python, checkpoint, scratch / name)))
                    stack.push(own.pop_all())
            except (PeerFailed, NoClip, OSError) as error:
                left_out[name] = str(error)
            bar.advance(starting)
        bare = bench.bare()
        bench.races(bare)
    found = {name: _found(one, bare) for name, one in bench.collected.items()}
    best = best_peer({name: one for name, one in found.items() if name != OURS})
    return PeersReport(
        created_at=created_at,
        duration_s=time.monotonic() - began,
        quick=plan is QUICK,
        machine=here,
        versions=versions() | _versions_of_peers(python),
        bare=bare,
        contenders=found,
        left_out=left_out,
        best_peer=best,
        goals=goals(found[OURS], found.get(best or ""), best or "", bench.solo_pairs),
        waiting_service_cores=bench.waiting_service_cores,
        download_s=bench.download_s,
    )


def _found(one: Collected, bare: Bare) -> Found:
    """Sum up a contender's samples."""
    gone, wasted = one.leaving
    if one.killed is None:
        raise RuntimeError("the races were not run to their end")
    return Found(
        ready_s=one.ready_s,
        first_clip_s=one.first_clip_s,
        closed=tuple(_closed(clients, loops, bare) for clients, loops in one.closed.items()),
        open=tuple(open_of(load, served, bare) for load, served in one.open.items()),
        leaving=Leaving(clients_gone=gone, wasted_steps=wasted, wasted_step_s=wasted * bare.step_s),
        killed=one.killed,
        peak_pss_bytes=one.peak_pss_bytes,
        num_processes=one.num_processes,
    )


def _closed(clients: int, loops: Sequence[Loop], bare: Bare) -> Closed:
    found = waits([s for loop in loops for s in loop.seconds], bare.solo_s["short"])
    if found is None:
        raise RuntimeError("a closed loop made no clip")
    return Closed(clients=clients, clips_per_min=tuple(loop.clips_per_min for loop in loops), waits=found)


def open_of(load: float, rounds: Sequence[Served], bare: Bare) -> Open:
    """Sum up a contender's open traces under one load."""
    failed = {kind: sum(served.failed[kind] for served in rounds) for kind in STEPS}

    def summed(kind: Kind) -> list[float]:
        return [s for served in rounds for s in served.seconds[kind]]

    return Open(
        load=load,
        short_mean_s=tuple(mean(served.seconds["short"]) if served.seconds["short"] else None for served in rounds),
        waits={kind: waits(summed(kind), bare.solo_s[kind], failed[kind]) for kind in STEPS},
        failed=sum(failed.values()),
    )


def _versions_of_peers(python: Path) -> dict[str, str]:
    command = [str(python), "-c", _TELL_VERSIONS, *_PACKAGES]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    return {name: number for name, number in (line.split() for line in told.stdout.splitlines())}


def _interpreter(text: str) -> Path:
    if not os.access(text, os.X_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be run; `make bench-peers` makes the environment")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="everything, but so little of it that no figure counts")
    parser.add_argument("--rounds", type=positive, default=FULL.rounds, help="turns of each contender (%(default)s)")
    parser.add_argument(
        "--window", type=float, default=FULL.window_s, help="seconds in which an open trace's jobs come (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for peers.json, peers.md and peers.png")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed")
    parser.add_argument(
        "--python",
        type=_interpreter,
        default=f"{sys.prefix}/peers/bin/python",
        help="of the environment with the peers' packages (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
