"""What `benchmarks.levers` found: its data, and the tables that the terminal and the Markdown file share."""

from datetime import datetime

from benchmarks.figures import Comparison, Spread
from benchmarks.machine import Machine
from benchmarks.tables import Part, Table
from schemas.presets import Effort, Levers, Preset, PresetName
from schemas.requests import GenerationParameters
from serve_graph.adherence import ATTRIBUTES, Rates
from serve_graph.settings import EncodeSettings


class Variant(Part):
    """One way to make the clips. Compared with `exact`'s clips of the same prompts and seeds, mean of all prompts.

    ratio_to_stock, cpu_ratio_to_stock: of clips made side by side, by the clock and in CPU seconds of all threads.
    effort: of the first prompt; cached_share: of all forwards.
    latents_error: root of the mean squared difference, in standard deviations; None for stock, which shows none.
    psnr_db: None where no value differs.
    """

    name: str
    seconds: Spread
    ratio_to_stock: Spread
    cpu_ratio_to_stock: Spread
    effort: Effort | None
    cached_share: float
    latents_error: float | None
    psnr_db: float | None
    ssim: float
    adherence: Rates


class BlockReport(Part):
    """A guided step's part in one block of the 1.3B model's width. ratios: to the block without levers."""

    tokens: int
    text_tokens: int
    prompt_tokens: int
    seconds: dict[str, Spread]
    ratios: dict[str, float]


class LeversReport(Part):
    """Everything that a run found out."""

    created_at: datetime
    duration_s: float
    machine: Machine
    versions: dict[str, str]
    model: str
    parameters: GenerationParameters
    num_threads: int
    encode: EncodeSettings
    prompts: int
    presets: dict[PresetName, Preset]
    variants: tuple[Variant, ...]
    comparisons: tuple[Comparison, ...]
    block: BlockReport

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)


def markdown(report: LeversReport) -> str:
    """The Markdown file's text."""
    here, clip, encode, block = report.machine, report.parameters, report.encode, report.block
    packages = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    presets = "".join(f"- `{name}`: {_words(preset)}\n" for name, preset in report.presets.items())
    head = f"""# Benchmark: presets and levers

Made by `python -m benchmarks.levers` on {report.created_at:%Y-%m-%d %H:%M} UTC in {report.duration_s:.0f} s: one run,
one process. All variants take turns, each clip has a prompt of its own that was never seen before; a ratio is the
median of clips side by side.

- Machine: {here.cpu}, {here.num_cores} cores, {here.memory_bytes / 2**30:.0f} GiB; load {here.load:g} before the run.
- Versions: {packages}.
- Each clip: {report.model}, {clip.width}x{clip.height}, {clip.num_frames} frames, {clip.num_inference_steps} steps
  where nothing else is said, guidance {clip.guidance_scale:g}. Torch threads: {report.num_threads}. x264:
  crf {encode.crf}, {encode.preset}, {encode.num_threads} thread, for stock as well.
- Timed: from the prompt to the MP4, in a file for stock, in the store for all others.
- Latents, PSNR and SSIM: against `exact`, {report.prompts} held-out prompts. Adherence: of the same clips' frames,
  before the MP4; the share in which shape, colour, background and motion are as the prompt says, and all four.

{presets}"""
    tail = f"""
A guided step's part, two forwards, in one block of Wan 2.1 1.3B's width (12 heads of 128, ffn 8,960) in bfloat16, with
{block.tokens:,} latent tokens (480p with 81 frames has 32,760, too many for this run), {block.text_tokens} text
tokens, {block.prompt_tokens} of them a prompt's. A forward that the first-block cache ends takes one block of 30.
"""
    *first, last = (table.markdown() for table in tables(report))
    return "\n".join([head, *first, last]) + tail


def tables(report: LeversReport) -> list[Table]:
    """The report as tables."""
    return [_goals(report), _variants(report), _adherence(report), _block(report.block)]


def _goals(report: LeversReport) -> Table:
    rows = tuple(
        (
            c.name,
            f"{c.ratio.median:.3f}",
            f"{c.ratio.min:.3f} to {c.ratio.max:.3f}",
            c.goal,
            "pass" if c.passed else "MISS",
        )
        for c in report.comparisons
    )
    return Table("Goals", ("comparison", "ratio", "min to max", "goal", "result"), rows, frozenset({3, 4}))


def _variants(report: LeversReport) -> Table:
    rows = tuple(
        (
            v.name,
            "" if v.effort is None else f"{v.effort.steps}",
            "" if v.effort is None else f"{v.effort.guided_steps}",
            f"{v.cached_share:.0%}" if v.cached_share else "",
            f"{1000 * v.seconds.median:.0f}",
            f"{v.ratio_to_stock.median:.3f}",
            f"{v.cpu_ratio_to_stock.median:.3f}",
            "" if v.latents_error is None else f"{v.latents_error:.2g}",
            "same" if v.psnr_db is None else f"{v.psnr_db:.1f}",
            f"{v.ssim:.4f}",
            f"{v.adherence.all:.2f}",
        )
        for v in report.variants
    )
    header = (
        "variant",
        "steps",
        "guided",
        "cached",
        "ms per clip",
        "of stock",
        "CPU of stock",
        "latents",
        "PSNR dB",
        "SSIM",
        "all four right",
    )
    return Table("Speed, likeness to `exact`, and adherence", header, rows)


def _adherence(report: LeversReport) -> Table:
    rows = tuple(
        (v.name, *(f"{getattr(v.adherence, name):.2f}" for name in (*ATTRIBUTES, "all"))) for v in report.variants
    )
    return Table(f"Adherence by attribute, {report.prompts} prompts", ("variant", *ATTRIBUTES, "all"), rows)


def _block(block: BlockReport) -> Table:
    rows = tuple(
        (name, f"{1000 * seconds.median:.0f}", f"{block.ratios[name]:.3f}") for name, seconds in block.seconds.items()
    )
    return Table("A block at size", ("lever", "ms", "of none"), rows)


def _words(preset: Preset) -> str:
    levers = {name: value for name, value in preset.levers.model_dump().items() if value != getattr(Levers(), name)}
    said = [] if preset.num_inference_steps is None else [f"{preset.num_inference_steps} steps"]
    said += [name if value is True else f"{name} {value}" for name, value in levers.items()]
    return ", ".join(said) or "no lever"
