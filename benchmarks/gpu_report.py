"""What `benchmarks.gpu` found: its data, and the tables that the terminal and the Markdown file share."""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from rich.console import Console

from benchmarks.figures import Spread
from benchmarks.machine import Machine
from benchmarks.tables import Part, Table, print_tables, write_report_files

_GIB = 2**30


class Card(Part):
    """The GPU. flops: its dense bfloat16 peak per second; None for a card that `benchmarks.gpu` has none of."""

    name: str
    memory_bytes: int
    driver: str
    flops: float | None


class Held(Part):
    """Bytes that torch held on the card: before a row, the most within it, and what it had of the card then."""

    before: int
    allocated: int
    reserved: int


class StepRow(Part):
    """One way to denoise, at one size of one model.

    steps, guided_steps: of a whole clip. guided_s: seconds of a step with guidance; alone_s: of one without, where the
    clip has some; cached_s: of a guided step whose forwards both end after the first block.
    denoise_s: of a clip, from these; where forwards can end early, as if none did, and half_cached_denoise_s as if
    every other did. of_floor: the floor of one guided step without levers over guided_s. failed: why there is nothing.
    """

    model: str
    size: str
    variant: str
    steps: int
    guided_steps: int
    guided_s: Spread | None = None
    alone_s: Spread | None = None
    cached_s: Spread | None = None
    denoise_s: float | None = None
    half_cached_denoise_s: float | None = None
    of_floor: float | None = None
    of_stock: float | None = None
    held: Held | None = None
    failed: str | None = None


class StageRow(Part):
    """One way through another stage: text encoder, decode or mp4. of_floor: its floor over its seconds."""

    stage: str
    size: str
    variant: str
    seconds: Spread | None = None
    of_floor: float | None = None
    held: Held | None = None
    failed: str | None = None


class ClipRow(Part):
    """A whole clip's seconds from its stages; each is measured, or for the steps extrapolated. decode: the variant."""

    model: str
    size: str
    variant: str
    decode: str
    text_s: float
    denoise_s: float
    half_cached_denoise_s: float | None
    decode_s: float
    of_floor: float | None

    @property
    def total_s(self) -> float:
        return self.text_s + self.denoise_s + self.decode_s


class Assumption(Part):
    """One of `serve_graph.plan`'s figures beside what was measured. unit: `GiB`, or empty for a share."""

    name: str
    where: str
    assumed: float
    measured: float
    unit: str = ""


class GpuReport(Part):
    """Everything that a run found out. try_out: on the CPU, of a tiny architecture; its figures say nothing.

    context_bytes: of the card that were taken and not torch's. missing: rows that the budget had no time for, and what
    needs more memory than the card has, by the plan.
    """

    created_at: datetime
    duration_s: float
    try_out: bool
    machine: Machine
    card: Card | None
    versions: dict[str, str]
    num_frames: int
    steps_timed: int
    budget_s: float
    steps: tuple[StepRow, ...]
    stages: tuple[StageRow, ...]
    clips: tuple[ClipRow, ...]
    context_bytes: int | None
    assumptions: tuple[Assumption, ...]
    missing: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """A try-out's is another, so that it can't write over a GPU's results."""
        return "gpu_try_out" if self.try_out else "gpu"


def write_gpu_report(report: GpuReport, folder: Path) -> None:
    """Write `gpu.json` and `gpu.md`, or for a try-out `gpu_try_out.json` and `.md`. Raises OSError."""
    write_report_files(report, report.file_name, markdown(report), folder)


def print_gpu_report(report: GpuReport, console: Console) -> None:
    """The same tables on a terminal."""
    print_tables(tables(report), console)
    if report.missing:
        console.print(f"[bold]Missing:[/bold] {'; '.join(report.missing)}")


def markdown(report: GpuReport) -> str:
    """The Markdown file's text."""
    packages = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    here, parts = report.machine, [_head(report)]
    dimensions = "" if report.try_out else " in the official dimensions"
    parts.append(f"""- Machine: {_card(report.card)}; {here.cpu}, {here.num_cores} cores.
- Versions: {packages}.
- Random weights{dimensions}: time depends on shapes, not on values. {report.num_frames} frames.
- Steps: the median of {report.steps_timed} timed after a warm-up, each with a synchronisation; a clip's seconds are
  extrapolated from these to its steps. Whether a forward ends after its first block does depend on values, so both
  kinds were timed; `denoise` is as if none did, `half cached` as if every other did.
- Of the floor: FLOP over the card's dense bfloat16 peak, over the seconds. FLOP: of a step, its two forwards without
  any lever; of another stage, its own; of a clip, the forwards that its preset takes, each as if without a lever, and
  the decode. float32 counts as such too, so that is a share of a peak which it can't reach.
- Memory: torch's most within the row, with what lay there before (the models of the row).
""")
    parts += [table.markdown() for table in tables(report)]
    if report.missing:
        parts.append("## Missing\n\n" + "".join(f"- {row}\n" for row in report.missing))
    return "\n".join(parts)


def tables(report: GpuReport) -> list[Table]:
    """The report as tables."""
    stages = [_stages(title, report.stages, stage) for stage, title in _STAGES.items()]
    made = [_clips(report.clips), _steps(report.steps), *stages, _assumptions(report.assumptions), _failed(report)]
    return [table for table in made if table.rows]


_STAGES = {"text": "Text encoder", "decode": "Decode", "mp4": "MP4, on the CPU"}


def _head(report: GpuReport) -> str:
    if report.try_out:
        return f"""# Benchmark: a GPU (try-out without one)

**No GPU was at hand.** Made by `python -m benchmarks.gpu --small` on {report.created_at:%Y-%m-%d %H:%M} UTC in
{report.duration_s:.0f} s, on the CPU, with a tiny architecture: it shows that the script runs. No figure here says
anything about a GPU or about Wan 2.1.
"""
    return f"""# Benchmark: a GPU

Made by `python -m benchmarks.gpu` on {report.created_at:%Y-%m-%d %H:%M} UTC in {report.duration_s:.0f} s: one run, one
process.
"""


def _card(card: Card | None) -> str:
    if card is None:
        return "no GPU"
    peak = "peak unknown" if card.flops is None else f"{card.flops / 1e12:.0f} TFLOP/s dense bfloat16"
    return f"{card.name}, {card.memory_bytes / _GIB:.1f} GiB, driver {card.driver}, {peak}"


def _clips(clips: Iterable[ClipRow]) -> Table:
    rows = tuple(
        (
            c.model,
            c.size,
            c.variant,
            c.decode,
            f"{c.text_s:.3f}",
            f"{c.denoise_s:.2f}",
            "" if c.half_cached_denoise_s is None else f"{c.half_cached_denoise_s:.2f}",
            f"{c.decode_s:.2f}",
            f"{c.total_s:.2f}",
            _share(c.of_floor),
        )
        for c in clips
    )
    stages = ("text s", "denoise s", "half cached s", "decode s", "sum s", "of the floor")
    header = ("model", "size", "variant", "decode by", *stages)
    return Table("A clip (extrapolated)", header, rows, frozenset({1, 2, 3}))


def _steps(steps: Iterable[StepRow]) -> Table:
    rows = tuple(
        (
            s.model,
            s.size,
            s.variant,
            f"{s.steps}",
            f"{s.guided_steps}",
            *(_seconds(seconds) for seconds in (s.guided_s, s.alone_s, s.cached_s)),
            _share(s.of_floor),
            "" if s.of_stock is None else f"{s.of_stock:.3f}",
            *_held(s.held),
        )
        for s in steps
    )
    header = ("model", "size", "variant", "steps", "guided", "s per guided step", "without guidance", "cached")
    header += ("of the floor", "of stock", "allocated GiB", "reserved GiB")
    return Table("Steps", header, rows, frozenset({1, 2}))


def _stages(title: str, stages: Iterable[StageRow], stage: str) -> Table:
    rows = tuple(
        (s.size, s.variant, _seconds(s.seconds), _share(s.of_floor), *_held(s.held)) for s in stages if s.stage == stage
    )
    header = ("size", "variant", "s", "of the floor", "allocated GiB", "reserved GiB")
    return Table(title, header, rows, frozenset({1}))


def _failed(report: GpuReport) -> Table:
    steps = [(f"{s.model} {s.size}", s.variant, s.failed) for s in report.steps if s.failed]
    stages = [(f"{s.stage} {s.size}".strip(), s.variant, s.failed) for s in report.stages if s.failed]
    return Table("Failed", ("row", "variant", "why"), tuple(steps + stages), frozenset({1, 2}))


def _assumptions(assumptions: Iterable[Assumption]) -> Table:
    rows = tuple(
        (a.name, a.where, f"{a.assumed:.2f} {a.unit}".strip(), f"{a.measured:.2f} {a.unit}".strip())
        for a in assumptions
    )
    header = ("what", "where", "assumed", "measured")
    return Table("`wan-serve plan`, assumed and measured", header, rows, frozenset({1}))


def _seconds(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3f}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _held(held: Held | None) -> tuple[str, str]:
    return ("", "") if held is None else (f"{held.allocated / _GIB:.2f}", f"{held.reserved / _GIB:.2f}")
