"""`python -m benchmarks.levers`: what each preset and each lever saves, and what it does to the clips.

One process: diffusers' `WanPipeline` and an engine per variant take turns, clip by clip. Then all of them render the
same held-out prompts, and their latents and frames are held against those of `exact`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import fmean

from rich.console import Console

from benchmarks.block import PROMPT_TOKENS, TEXT_TOKENS, TOKENS_PER_LATENT_FRAME, block_times
from benchmarks.command import RESULTS, positive, progress, run_command
from benchmarks.contenders import BareEngine, Outcome, Stock
from benchmarks.figures import at_most, ratios, spread
from benchmarks.levers_report import BlockReport, LeversReport, Variant, markdown, tables
from benchmarks.likeness import psnr, relative_error, ssim
from benchmarks.machine import machine
from benchmarks.report import versions
from benchmarks.service import write_config
from benchmarks.tables import print_tables, write_report_files
from benchmarks.workload import request
from schemas.presets import EXACT, Effort, Levers, Preset
from schemas.requests import GenerateRequest, GenerationParameters
from serve_graph.adherence import Answer, Question, held_out_questions, report
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.tuning import tune
from serve_graph.settings import Settings, StorageSettings, TextSettings
from serve_graph.tiny_wan.measure import measure

GOALS = {"exact": 0.75, "balanced": 0.5, "fast": 0.35}
"""Of stock's seconds. Source: the issue that asked for the presets."""


def _fused(parts: GeneratorParts) -> None:
    tune(parts, fuse_qkv=True)


def _int8(parts: GeneratorParts) -> None:
    tune(parts, int8_weights=True)


def _compiled(parts: GeneratorParts) -> None:
    tune(parts, compile_mode="regional")


@dataclass(frozen=True)
class _Way:
    """How a variant differs from `exact`. text: the settings of the text encoder that do."""

    preset: Preset = EXACT
    tuning: Callable[[GeneratorParts], None] | None = None
    text: TextSettings | None = None


def _ways(settings: Settings, *, with_compile: bool, with_int8: bool) -> dict[str, _Way]:
    presets = settings.profile.presets
    levers = {
        "batched_guidance": Levers(batched_guidance=True),
        "one_key_padding": Levers(one_key_padding=True),
        "guidance_interval 0 to 0.75": Levers(guidance_interval=(0.0, 0.75)),
        "guidance_interval 0 to 0.5": Levers(guidance_interval=(0.0, 0.5)),
        "first_block_threshold 0.2": Levers(first_block_threshold=0.2),
        "first_block_threshold 0.3": Levers(first_block_threshold=0.3),
        "bfloat16_decode": Levers(bfloat16_decode=True),
    }
    int8_text = settings.text.model_copy(update={"int8_weights": True})
    int8 = {"engine.int8_weights": _Way(tuning=_int8), "text.int8_weights": _Way(text=int8_text)}
    compiled = {"engine.compile regional": _Way(tuning=_compiled)}
    return {
        **{name: _Way(preset) for name, preset in presets.items()},
        "8 steps": _Way(Preset(num_inference_steps=8)),
        "5 steps": _Way(Preset(num_inference_steps=5)),
        **{name: _Way(Preset(levers=lever)) for name, lever in levers.items()},
        "engine.fuse_qkv": _Way(tuning=_fused),
        **(int8 if with_int8 else {}),
        **(compiled if with_compile else {}),
    }


class _Contestant:
    """One variant on an engine; variants without a tuning of their own share one."""

    def __init__(self, settings: Settings, engine: BareEngine, preset: Preset) -> None:
        self._profile = settings.profile.model_copy(update={"presets": {"exact": EXACT, "fast": preset}})
        self._engine = engine
        self._named = {} if preset == EXACT else {"preset": "fast"}

    def seconds(self, number: int) -> float:
        """Make one clip, from its prompt to its object in the store."""
        return self._engine.clip_of(self._parameters(request(number)))[0]

    def outcome(self, asked: GenerateRequest) -> Outcome:
        return self._engine.outcome_of(self._parameters(asked))

    def _parameters(self, asked: GenerateRequest) -> GenerationParameters:
        """Under `fast`, whatever the levers: the clip is this benchmark's alone."""
        return self._profile.resolve(asked.model_copy(update=self._named))


@dataclass
class _Likeness:
    """Of one variant's clips to those of `exact`, and to what was asked for. Stock shows no latents and no effort."""

    errors: list[float] = field(default_factory=list)
    psnrs: list[float | None] = field(default_factory=list)
    ssims: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    efforts: list[Effort] = field(default_factory=list)


@dataclass(frozen=True)
class _Times:
    """Seconds of each variant's clips: by the clock, and of all of this process's threads."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]


class _Race:
    def __init__(self, settings: Settings, scratch: Path, ways: Mapping[str, _Way]) -> None:
        self._settings = settings
        self._stock = Stock(settings)
        engines: dict[tuple[Callable[[GeneratorParts], None] | None, bool], BareEngine] = {}
        self.contestants: dict[str, _Contestant] = {}
        for name, way in ways.items():
            engine = way.tuning, way.text is not None
            if engine not in engines:
                own = {
                    "storage": StorageSettings(folder=scratch / f"store-{len(engines)}"),
                    "text": way.text or settings.text,
                }
                given = (way.tuning,) if way.tuning is not None else ()
                engines[engine] = BareEngine(settings.model_copy(update=own), *given)
            self.contestants[name] = _Contestant(settings, engines[engine], way.preset)

    def times(self, clips: int, advance: Callable[[], None]) -> "_Times":
        """Seconds per clip, in turns; each clip has a prompt of its own. The first round is the warm-up."""
        numbers = count()
        names = ("stock", *self.contestants)
        found = _Times({name: [] for name in names}, {name: [] for name in names})
        for turn in range(clips + 1):
            for name in _turned(list(found.wall), turn):
                number = next(numbers)
                one = self._stock.clip if name == "stock" else self.contestants[name].seconds
                began = time.process_time()
                seconds = one(number)
                if turn:
                    found.wall[name].append(seconds)
                    found.cpu[name].append(time.process_time() - began)
                advance()
        return found

    def likeness(self, questions: Sequence[Question], advance: Callable[[], None]) -> dict[str, _Likeness]:
        """All variants on the same prompts."""
        found = {name: _Likeness() for name in ("stock", *self.contestants)}
        for seed, question in enumerate(questions):
            asked = GenerateRequest(prompt=question.prompt, seed=seed)
            exact = self.contestants["exact"].outcome(asked)
            for name, seen in found.items():
                if name == "stock":
                    frames = self._stock.frames_of(self._settings.profile.resolve(asked))
                else:
                    outcome = exact if name == "exact" else self.contestants[name].outcome(asked)
                    seen.errors.append(relative_error(outcome.latents.numpy(), exact.latents.numpy()))
                    seen.efforts.append(outcome.effort)
                    frames = outcome.frames
                seen.psnrs.append(psnr(frames, exact.frames))
                seen.ssims.append(ssim(frames, exact.frames))
                seen.answers.append(Answer(question, measure(frames)))
                advance()
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 1 when, with --check, a goal was missed."""
    options = _parser().parse_args(arguments)

    def tell(report: LeversReport, console: Console) -> None:
        write_report_files(report, "levers", markdown(report), options.out)
        print_tables(tables(report), console)

    return run_command(lambda scratch, console: run(options, scratch, console), tell, check=options.check)


def run(options: argparse.Namespace, scratch: Path, console: Console) -> LeversReport:
    """Measure everything. scratch: an empty folder for all that is made on the way."""
    began, created_at, here = time.monotonic(), datetime.now(UTC), machine()
    _, settings = write_config(scratch)
    with progress(console) as bar:

        def task(description: str, total: int) -> Callable[[], None]:
            made = bar.add_task(description, total=total)
            return lambda: bar.advance(made)

        race = _Race(settings, scratch, _ways(settings, with_compile=options.compile, with_int8=options.int8))
        num_variants = 1 + len(race.contestants)
        times = race.times(options.clips, task("clips, in turns", num_variants * (options.clips + 1)))
        questions = held_out_questions(options.prompts)
        seen = race.likeness(questions, task("the same prompts", num_variants * options.prompts))
        block = _block(options, task("a block at size", (5 + options.compile) * (options.block_rounds + 1)))
    return LeversReport(
        created_at=created_at,
        duration_s=time.monotonic() - began,
        machine=here,
        versions=versions(),
        model=settings.profile.name,
        parameters=settings.profile.resolve(request(0)),
        num_threads=settings.engine.num_threads,
        encode=settings.encode,
        prompts=options.prompts,
        presets=settings.profile.presets,
        variants=tuple(_variant(name, times, seen[name]) for name in times.wall),
        comparisons=tuple(
            at_most(f"{name} / stock", times.wall[name], times.wall["stock"], share=share)
            for name, share in GOALS.items()
        ),
        block=block,
    )


def _variant(name: str, times: _Times, seen: _Likeness) -> Variant:
    known = [value for value in seen.psnrs if value is not None]
    rates = report(seen.answers, model=name, permuted=False, seed=0, seconds=0.0).total
    return Variant(
        name=name,
        seconds=spread(times.wall[name]),
        ratio_to_stock=ratios(times.wall[name], times.wall["stock"]),
        cpu_ratio_to_stock=ratios(times.cpu[name], times.cpu["stock"]),
        effort=seen.efforts[0] if seen.efforts else None,
        cached_share=_cached(seen.efforts),
        latents_error=fmean(seen.errors) if seen.errors else None,
        psnr_db=fmean(known) if known else None,
        ssim=fmean(seen.ssims),
        adherence=rates,
    )


def _cached(efforts: Sequence[Effort]) -> float:
    return sum(e.cached_forwards for e in efforts) / max(1, sum(e.forwards for e in efforts))


def _block(options: argparse.Namespace, advance: Callable[[], None]) -> BlockReport:
    found = block_times(options.block_frames, options.block_rounds, advance, with_compile=options.compile)
    return BlockReport(
        tokens=options.block_frames * TOKENS_PER_LATENT_FRAME,
        text_tokens=TEXT_TOKENS,
        prompt_tokens=PROMPT_TOKENS,
        seconds={name: spread(times) for name, times in found.items()},
        ratios={name: ratios(times, found["none"]).median for name, times in found.items()},
    )


def _turned(names: Sequence[str], turn: int) -> Iterator[str]:
    """Everyone once; who begins changes from round to round."""
    start = turn % len(names)
    yield from (*names[start:], *names[:start])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.levers", description=__doc__)
    parser.add_argument("--clips", type=positive, default=12, help="timed clips of each variant (%(default)s)")
    parser.add_argument("--prompts", type=positive, default=48, help="held-out prompts that all render (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="regional compilation, too: takes a minute to compile")
    parser.add_argument("--int8", action="store_true", help="weights in int8, too: needs `pip install -e '.[int8]'`")
    parser.add_argument(
        "--block-frames", type=positive, default=2, help="latent frames of the block at size (%(default)s)"
    )
    parser.add_argument("--block-rounds", type=positive, default=5, help="timed rounds of it (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for levers.json and levers.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a goal is missed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
