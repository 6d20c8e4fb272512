"""The races: who is measured beside whom, and in which order. Collects samples; judges nothing.

While one contender works, the others wait: for their pipe, or for a request.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import numpy as np
from rich.progress import Progress

from benchmarks.child import Child
from benchmarks.processes import Memory, cpu_seconds, memory, memory_by_role
from benchmarks.service import Service
from benchmarks.workload import IN_FLIGHT, Block
from schemas.clips import Timings
from schemas.jobs import clip_id_of, new_job_id
from serve_graph.stores import SignedStore
from storage.keys import clip_key

MAX_MEAN_DIFFERENCE = 1.0
"""8-bit levels; beyond it the contenders don't make the same clip, and a comparison of times means nothing."""

_WARM_UPS = 3


class NotComparable(Exception):
    """Two contenders don't make the same clip from the same request."""


@dataclass(frozen=True)
class Plan:
    """clips: in a block of one at a time. rounds: blocks of each contender."""

    clips: int
    rounds: int

    @property
    def num_timed(self) -> int:
        """Clips timed in a block with eight in flight: about twice as many, in whole turns of the slots."""
        return IN_FLIGHT * max(1, round(2 * self.clips / IN_FLIGHT))


@dataclass
class Findings:
    """What the races found. Lists of two sides are parallel: what has one index was measured side by side."""

    stock_s: list[float] = field(default_factory=list)
    engine_s: list[float] = field(default_factory=list)
    engine_stages: list[Timings] = field(default_factory=list)
    service: "BesideService" = field(default_factory=lambda: BesideService())
    on_s3: "BesideService" = field(default_factory=lambda: BesideService())
    cpu_s_per_clip: dict[str, float] = field(default_factory=dict)
    uploads_s: dict[str, list[float]] = field(default_factory=dict)
    presigns_s: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)


@dataclass
class BesideService:
    """The engine and one service, block by block. idle_shares: of the service's device thread, with eight in flight."""

    engine_blocks_s: list[list[float]] = field(default_factory=list)
    service_blocks_s: list[list[float]] = field(default_factory=list)
    engine_rates: list[float] = field(default_factory=list)
    service_rates: list[float] = field(default_factory=list)
    idle_shares: list[float] = field(default_factory=list)
    stages: list[Timings] = field(default_factory=list)


class Numbers:
    """Hands out clip numbers, each once: contenders that are compared get the same, and no prompt comes again."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, count: int) -> range:
        """The next `count` numbers."""
        self._next += count
        return range(self._next - count, self._next)


class CpuMeter:
    """Adds up the CPU time of a process and its family while blocks run."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._seconds: Counter[str] = Counter()
        self._num_clips = 0

    def metered(self, block: Callable[[], Block]) -> Block:
        """Run the block."""
        before = cpu_seconds(self._root)
        done = block()
        self._seconds.update(cpu_seconds(self._root))
        self._seconds.subtract(before)
        self._num_clips += done.num_clips
        return done

    def seconds_per_clip(self) -> dict[str, float]:
        """By role, the largest first."""
        return {role: seconds / self._num_clips for role, seconds in self._seconds.most_common()}


class Races:
    """One run. Everything found goes into `findings`."""

    def __init__(self, plan: Plan, bar: Progress) -> None:
        self._plan = plan
        self._bar = bar
        self._numbers = Numbers()
        self.findings = Findings()

    def compare_frames(self, stock: Child, engine: Child) -> tuple[float, float]:
        """Mean differences in 8-bit levels: of stock's and the engine's frames of one clip, and of two clips.

        Raises NotComparable.
        """
        one, other = self._numbers.take(2)
        calls = ((stock, one), (engine, one), (engine, other))
        expected, actual, another = (side.call("frames", number).astype(np.int16) for side, number in calls)
        distance, other_clip = (float(np.abs(expected - frames).mean()) for frames in (actual, another))
        if not distance < MAX_MEAN_DIFFERENCE:
            raise NotComparable(f"the frames of stock and engine differ by {distance:.2f} levels of 255 in the mean")
        return distance, other_clip

    def compare_bytes(self, engine: Child, service: Service) -> bool:
        """Whether the service's MP4 is the engine's, byte by byte."""
        (number,) = self._numbers.take(1)
        _, rendered = engine.call("clip", number)
        _, clip = service.clip(number)
        same: bool = rendered.sha256 == clip.sha256
        return same

    def stock_and_engine(self, stock: Child, engine: Child) -> None:
        """One at a time, clip by clip."""
        for number in self._numbers.take(_WARM_UPS):
            stock.call("clip", number)
            engine.call("clip", number)
        found = self.findings
        pairs = self._numbers.take(self._plan.clips * self._plan.rounds)
        for number in self._bar.track(pairs, description="stock, engine: one at a time"):
            found.stock_s.append(stock.call("clip", number))
            seconds, rendered = engine.call("clip", number)
            found.engine_s.append(seconds)
            found.engine_stages.append(rendered.timings)
        found.memory["stock, one at a time"] = memory([stock.pid])
        found.memory["engine, one at a time"] = memory([engine.pid])

    def stores(self, stores: Mapping[str, SignedStore], clip: bytes) -> None:
        """Upload one clip and sign its URL, in turn on each store."""
        found = self.findings
        for _ in self._bar.track(range(self._plan.clips * self._plan.rounds), description="stores: upload, presign"):
            for name, opened in stores.items():
                key = clip_key(clip_id_of(new_job_id()), "bench")
                began = time.perf_counter()
                opened.store.put(key, clip, if_none_match=True)
                uploaded = time.perf_counter()
                opened.presigner.presign(key, expires_in=timedelta(hours=1))
                found.uploads_s.setdefault(name, []).append(uploaded - began)
                found.presigns_s.setdefault(name, []).append(time.perf_counter() - uploaded)

    def one_client(self, engine: Child, service: Service, found: BesideService) -> None:
        """One at a time, in blocks."""

        def by_engine(block: Iterable[int]) -> None:
            found.engine_blocks_s.append([engine.call("clip", number)[0] for number in block])

        def by_service(block: Iterable[int]) -> None:
            answers = [service.clip(number) for number in block]
            found.service_blocks_s.append([seconds for seconds, _ in answers])
            found.stages.extend(clip.timings for _, clip in answers)

        for number in self._numbers.take(_WARM_UPS):
            engine.call("clip", number)
            service.clip(number)
        for turn in self._bar.track(range(self._plan.rounds), description="engine, service: one at a time"):
            block = self._numbers.take(self._plan.clips)
            _in_turn([partial(by_engine, block), partial(by_service, block)], turn)

    def eight_in_flight(self, engine: Child, service: Service, found: BesideService) -> None:
        """Closed loops, in blocks. The CPU and the memory of the last service are kept."""
        num_timed = self._plan.num_timed
        engine_cpu, service_cpu = CpuMeter(engine.pid), CpuMeter(service.pid)

        def by_engine(first: int) -> None:
            block = engine_cpu.metered(lambda: engine.call("block", first, num_timed))
            found.engine_rates.append(block.clips_per_s)

        def by_service(first: int) -> None:
            def work() -> None:
                block = service_cpu.metered(lambda: service.block(first, num_timed))
                found.service_rates.append(block.clips_per_s)

            found.idle_shares.append(idle_share(service.device_busy_s, work))

        for turn in self._bar.track(range(self._plan.rounds), description="engine, service: eight in flight"):
            first = self._numbers.take(num_timed + 2 * IN_FLIGHT).start
            _in_turn([partial(by_engine, first), partial(by_service, first)], turn)
        self.findings.memory["engine, after 8 in flight"] = memory([engine.pid])
        *of_roles, (_, together) = memory_by_role(service.pid).items()
        self.findings.memory |= {f"service: {role}": one for role, one in of_roles} | {"service, together": together}
        by_role = service_cpu.seconds_per_clip()
        self.findings.cpu_s_per_clip = {
            "engine": sum(engine_cpu.seconds_per_clip().values()),
            "service, together": sum(by_role.values()),
        } | {f"service: {role}": seconds for role, seconds in by_role.items()}


def idle_share(busy_s: Callable[[], float], work: Callable[[], None]) -> float:
    """Do `work`. Returns in what share of its time the device's thread did nothing; busy_s: its work so far."""
    before, began = busy_s(), time.perf_counter()
    work()
    after, ended = busy_s(), time.perf_counter()
    return 1 - (after - before) / (ended - began)


def _in_turn(sides: Sequence[Callable[[], None]], turn: int) -> None:
    """Each side once; who goes first changes from round to round."""
    for side in sides[:: -1 if turn % 2 else 1]:
        side()
