"""The report: its data, and one set of tables that the terminal and the Markdown file share. Measures nothing."""

import math
import platform
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib.metadata import version
from statistics import median

from benchmarks.figures import Comparison, Measure, Spread, Unit
from benchmarks.machine import Machine
from benchmarks.processes import Memory
from benchmarks.tables import Part, Table
from schemas.clips import Timings
from schemas.requests import GenerationParameters
from serve_graph.settings import EncodeSettings, EngineSettings, TextSettings

TIMED = {
    "stock": "`WanPipeline.__call__` to numpy, then the MP4 into a file; nothing at once, nothing stored.",
    "engine": "text encoding, steps, decode, MP4 on a thread of its own, SHA-256, the store's put with its fsyncs; "
    "one process, no Ray, no HTTP.",
    "service": "all of the engine's, checks, the job's record in the store, Ray Serve's hops, HTTP; by the clock of a "
    "client that keeps its connection.",
    "service on S3": "the same with ministack for a bucket, a Python server on the same cores; the engine beside it "
    "keeps its local folder. ",
    "upload, presign": "one put of one clip into the store, one signature for it; by this process, nothing beside it.",
    "engine and service": "the negative prompt's embedding is cached from the start, the prompt's never is.",
    "8 in flight": "a closed loop, each finished clip replaced at once; timed between two finishes, all slots taken.",
    "device idle": "the share of a whole block, its start and its end too, in which the device's thread did not work, "
    "by two scrapes of `/metrics`.",
}
"""What the rows of the first table include."""

_PACKAGES = ("wan-serve", "torch", "diffusers", "transformers", "ray", "av", "numpy")
_MIB = 2**20


class Asked(Part):
    """What each clip was, and what made it. Only the prompt and the seed differ from clip to clip."""

    model: str
    parameters: GenerationParameters
    engine: EngineSettings
    text: TextSettings
    encode: EncodeSettings
    clips: int
    rounds: int


class Agreement(Part):
    """That all contenders make the same clip.

    mean_abs_difference: between stock's and the engine's frames of one request, in 8-bit levels.
    other_clip: the same between the frames of two requests, to tell what a difference looks like.
    """

    mean_abs_difference: float
    other_clip: float
    service_sha256_equals_engine: bool


class Report(Part):
    """Everything that a run found out."""

    created_at: datetime
    duration_s: float
    machine: Machine
    versions: dict[str, str]
    asked: Asked
    agreement: Agreement
    measures: tuple[Measure, ...]
    comparisons: tuple[Comparison, ...]
    stages: dict[str, Timings]
    cpu_s_per_clip: dict[str, float]
    memory: dict[str, Memory]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)


def versions() -> dict[str, str]:
    """Of Python and of the packages that do the work."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def median_timings(clips: Iterable[Timings]) -> Timings:
    """The median of each stage."""
    dumped = [clip.model_dump() for clip in clips]
    return Timings(**{name: median(clip[name] for clip in dumped) for name in Timings.model_fields})


class JobsReport(Part):
    """What `benchmarks.jobs` found."""

    created_at: datetime
    duration_s: float
    machine: Machine
    versions: dict[str, str]
    measures: tuple[Measure, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether every goal was met."""
        return all(comparison.passed for comparison in self.comparisons)


def jobs_markdown(report: JobsReport) -> str:
    """The Markdown file's text."""
    here = report.machine
    packages = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    head = f"""# Benchmark: jobs

{report.created_at:%Y-%m-%d %H:%M} UTC, {report.duration_s:.0f} s. {here.cpu}, {here.num_cores} cores, load before:
{here.load:.2f}. {packages}.

"""
    return head + "\n".join(table.markdown() for table in jobs_tables(report))


def jobs_tables(report: JobsReport) -> list[Table]:
    """The report as tables."""
    return [_measures(report.measures), _comparisons(report.comparisons)]


def markdown(report: Report) -> str:
    """The whole report. The Markdown file's text."""
    asked, clip, here, same = report.asked, report.asked.parameters, report.machine, report.agreement
    packages = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    has = "has" if same.service_sha256_equals_engine else "does not have"
    head = f"""# Benchmark

Made by `make bench` on {report.created_at:%Y-%m-%d %H:%M} UTC in {report.duration_s:.0f} s: one run on
one machine. Contenders take turns; a ratio is the median of pairs measured side by side.

- Machine: {here.cpu}, {here.num_cores} cores, {here.memory_bytes / 2**30:.0f} GiB; load {here.load:g} before the run.
- Versions: {packages}.
- Each clip: {asked.model}, {clip.width}x{clip.height}, {clip.num_frames} frames, {clip.num_inference_steps} steps,
  guidance {clip.guidance_scale:g}, a prompt of its own that was never seen before. Torch threads:
  {asked.engine.num_threads}. x264: crf {asked.encode.crf}, {asked.encode.preset}, {asked.encode.num_threads} thread.
- The same clips: the frames of stock and engine differ by {same.mean_abs_difference:.2g} levels of 255 in the mean
  (two different clips: {same.other_clip:.2g}); the service's MP4 {has} the SHA-256 of the engine's.
- The other contenders run at the niceness of the service's generator.
"""
    timed = "## What is timed\n\n" + "".join(f"- {who}: {what}\n" for who, what in TIMED.items())
    return "\n".join([head, timed, *(table.markdown() for table in tables(report))])


def tables(report: Report) -> list[Table]:
    """The report as tables."""
    return [
        _measures(report.measures),
        _comparisons(report.comparisons),
        _stages(report.stages),
        _cpu(report.cpu_s_per_clip),
        _memory(report.memory),
    ]


def _measures(measures: Iterable[Measure]) -> Table:
    rows = tuple(
        (m.name, *_spread(m.spread, m.unit), "ms" if m.unit == "s" else m.unit, str(m.spread.count)) for m in measures
    )
    return Table("Measured", ("what", "median", "min", "max", "unit", "samples"), rows, frozenset({4}))


def _comparisons(comparisons: Iterable[Comparison]) -> Table:
    rows = tuple(
        (
            c.name,
            f"{c.ratio.median:.3f}",
            f"{c.ratio.min:.3f} to {c.ratio.max:.3f}",
            f"{1000 * c.difference_s.median:+.1f} ms" if c.difference_s is not None else "",
            str(c.ratio.count),
            c.goal,
            "pass" if c.passed else "MISS",
        )
        for c in comparisons
    )
    header = ("comparison", "ratio", "min to max", "difference", "pairs", "goal", "result")
    return Table("Ratios", header, rows, frozenset({5, 6}))


def _stages(stages: Mapping[str, Timings]) -> Table:
    names = tuple(Timings.model_fields)
    rows = tuple((who, *(_milliseconds(getattr(timings, name)) for name in names)) for who, timings in stages.items())
    return Table("Stages of one clip at a time (median, ms)", ("what", *names), rows)


def _cpu(seconds: Mapping[str, float]) -> Table:
    rows = tuple((who, f"{1000 * value:.1f}") for who, value in seconds.items())
    return Table("CPU time per clip with 8 in flight", ("process", "ms"), rows)


def _memory(found: Mapping[str, Memory]) -> Table:
    rows = tuple(
        (who, str(m.num_processes), f"{m.peak_rss_bytes / _MIB:.0f}", f"{m.pss_bytes / _MIB:.0f}")
        for who, m in found.items()
    )
    return Table("Memory (MiB)", ("process", "processes", "peak RSS of the largest", "PSS"), rows)


def _spread(values: Spread, unit: Unit) -> tuple[str, ...]:
    if unit == "s":
        return tuple(_milliseconds(value) for value in (values.median, values.min, values.max))
    return tuple(f"{value:.2f}" for value in (values.median, values.min, values.max))


def _milliseconds(seconds: float) -> str:
    decimals = 1 if seconds >= 0.001 else 3
    return "" if math.isclose(seconds, 0.0) else f"{1000 * seconds:.{decimals}f}"
