"""The engine's loop, over the real tiny modules: who shares a step, who leaves and when, and what a failure costs.

Jobs are submitted and cancelled from inside another job's events, on the device thread itself: which unit of work
comes next is then a matter of order and not of time.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from prometheus_client import CollectorRegistry
from torch.utils.hooks import RemovableHandle

from schemas.errors import JobCancelled, OutOfMemory, RenderFailed, ShuttingDown, StoreFull, WanError, WorkerLost
from schemas.handoff import PreparedPrompt, Standing, Started, TextEmbedding
from schemas.jobs import Progress
from serve_graph.engine import loop
from serve_graph.engine.checkpoint import GeneratorParts, load_generator_parts
from serve_graph.engine.job import Denoised, EngineEvent, Failed, Finished

if TYPE_CHECKING:
    from conftest import JobProbe, MakeEngine, MakeProbe

    from serve_graph.engine.loop import Engine

TOKENS = 48
"""Latent tokens of the small clip: 3 latent frames of 8x8, in patches of 2x2."""

PATIENCE_S = 60.0
MARK = 7.0
SURELY_TOO_MUCH = 2**60
"""Elements: more than any machine's address space holds, so that the allocator itself refuses."""


@pytest.fixture
def marked() -> PreparedPrompt:
    """An embedding by which a hook on the transformer recognises its job; it has no negative: guidance is off."""
    return PreparedPrompt(TextEmbedding(np.full((1, 32), MARK, np.float32), "float32", solo=True), None)


def on_marked_forward(parts: GeneratorParts, act: Callable[[], object]) -> RemovableHandle:
    """Call `act` before each forward that the marked job takes part in."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if (kwargs["encoder_hidden_states"][:, 0] == MARK).all(dim=1).any():
            act()

    handle: RemovableHandle = parts.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    return handle


def run_out_of_memory() -> None:
    torch.empty(SURELY_TOO_MUCH)


def error_of(probe: "JobProbe") -> WanError:
    event = probe.end()
    assert isinstance(event, Failed)
    return event.error


def assert_finished(*probes: "JobProbe") -> None:
    for probe in probes:
        assert isinstance(probe.end(), Finished), probe.events[-1]


def at_step(number: int, act: Callable[[], object], stage: str = "denoise") -> Callable[[EngineEvent], None]:
    """An `on_event` that calls `act` after the job's step (or chunk) of this number."""

    def on_event(event: EngineEvent) -> None:
        if isinstance(event, Progress) and (event.stage, event.step) == (stage, number):
            act()

    return on_event


def submit_all(engine: "Engine", probes: "list[JobProbe]") -> Callable[[], None]:
    def submit() -> None:
        for probe in probes:
            engine.submit(probe.job)

    return submit


# Sharing


def test_engine_lets_jobs_join_and_leave_between_steps(
    engine: "Engine", make_probe: "MakeProbe", forward_batches: list[int]
) -> None:
    late = make_probe("late", num_inference_steps=2, guidance_scale=1.0)
    first = make_probe(
        "first", num_inference_steps=6, guidance_scale=1.0, on_event=at_step(2, lambda: engine.submit(late.job))
    )

    engine.submit(first.job)

    assert_finished(first, late)
    assert forward_batches == [1, 1, 2, 2, 1, 1]


def test_engine_holds_no_more_jobs_than_its_cap(
    make_engine: "MakeEngine", make_probe: "MakeProbe", forward_batches: list[int]
) -> None:
    engine = make_engine(max_jobs_in_flight=2)
    held, most_held = 0, 0

    def count(event: EngineEvent) -> None:
        nonlocal held, most_held
        held += isinstance(event, Started) - isinstance(event, Finished | Failed)
        most_held = max(most_held, held)

    others = [make_probe(f"job-{i}", on_event=count) for i in range(4)]
    bring_the_others = submit_all(engine, others)

    def count_and_bring(event: EngineEvent) -> None:
        count(event)
        if isinstance(event, Started):
            bring_the_others()

    first = make_probe("first", on_event=count_and_bring)

    engine.submit(first.job)

    assert_finished(first, *others)
    assert most_held == 2
    assert max(forward_batches) == 2


def test_engine_keeps_each_forward_within_the_token_budget(
    make_engine: "MakeEngine", make_probe: "MakeProbe", forward_batches: list[int]
) -> None:
    engine = make_engine(max_batch_tokens=3 * TOKENS + TOKENS - 1)
    others = [make_probe(f"job-{i}") for i in range(5)]
    first = make_probe("first", on_event=at_step(1, submit_all(engine, others)))

    engine.submit(first.job)

    assert_finished(first, *others)
    assert max(forward_batches) == 3


def test_engine_runs_a_job_that_alone_is_over_the_token_budget(
    make_engine: "MakeEngine", make_probe: "MakeProbe", forward_batches: list[int]
) -> None:
    probe = make_probe()

    make_engine(max_batch_tokens=1).submit(probe.job)

    assert_finished(probe)
    assert set(forward_batches) == {1}


def test_engine_keeps_jobs_of_different_shapes_apart(
    engine: "Engine", make_probe: "MakeProbe", forward_batches: list[int]
) -> None:
    others = [make_probe("wide", width=112), make_probe("long", num_frames=13)]
    first = make_probe("first", on_event=at_step(1, submit_all(engine, others)))

    engine.submit(first.job)

    assert_finished(first, *others)
    assert set(forward_batches) == {1}


def test_engine_gives_a_reproducible_job_the_same_bits_alone_and_among_seven_strangers(
    make_engine: "MakeEngine", make_probe: "MakeProbe", forward_batches: list[int]
) -> None:
    engine = make_engine(max_jobs_in_flight=9)
    alone = make_probe("alone", reproducible=True, seed=5, num_inference_steps=6)
    engine.submit(alone.job)
    assert_finished(alone)
    assert set(forward_batches) == {1}
    started: set[str] = set()
    company: list[int] = []

    def follow(event: EngineEvent, job_id: str) -> None:
        if isinstance(event, Started):
            started.add(job_id)
        elif isinstance(event, Finished | Failed):
            started.discard(job_id)

    def note_company(event: EngineEvent) -> None:
        if isinstance(event, Progress):
            company.append(len(started))

    strangers = [
        make_probe(f"stranger-{i}", seed=i, num_inference_steps=8, on_event=partial(follow, job_id=f"stranger-{i}"))
        for i in range(7)
    ]
    crowded = make_probe("crowded", reproducible=True, seed=5, num_inference_steps=6, on_event=note_company)
    leader = make_probe("leader", num_inference_steps=3, on_event=at_step(1, submit_all(engine, [crowded, *strangers])))

    engine.submit(leader.job)

    assert_finished(leader, crowded, *strangers)
    assert torch.equal(crowded.latents, alone.latents)
    assert np.array_equal(crowded.frames, alone.frames)
    assert set(company) == {7}
    assert forward_batches.count(8) == 2 * 2  # the strangers had gone along with the leader for two steps


# Taking turns


class Turns:
    """The jobs in the order of their units of work, and where each ended: ["a", "a", "b", "b ends", …]."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def of(self, name: str, then: Callable[[EngineEvent], None] = lambda event: None) -> Callable[[EngineEvent], None]:
        def on_event(event: EngineEvent) -> None:
            if isinstance(event, Progress):
                self.log.append(name)
            elif isinstance(event, Finished | Failed):
                self.log.append(f"{name} ends")
            then(event)

        return on_event


@pytest.fixture
def turns() -> Turns:
    return Turns()


def at_once(name: str, num_units: int) -> list[str]:
    return [*[name] * num_units, f"{name} ends"]


@pytest.mark.parametrize("max_jobs_in_flight", [1, 2])
def test_engine_lets_a_short_job_overtake_a_long_one_at_the_next_step_even_where_no_slot_is_free(
    make_engine: "MakeEngine", make_probe: "MakeProbe", turns: Turns, max_jobs_in_flight: int
) -> None:
    engine = make_engine(max_jobs_in_flight=max_jobs_in_flight)
    short = make_probe("short", num_inference_steps=2, on_event=turns.of("short"))
    long = make_probe(
        "long", width=112, num_inference_steps=20, on_event=turns.of("long", at_step(3, submit_all(engine, [short])))
    )

    engine.submit(long.job)

    assert_finished(short, long)
    assert turns.log == ["long"] * 3 + at_once("short", 2 + 3) + at_once("long", 17 + 3)


def test_engine_under_fifo_lets_a_short_job_wait_for_a_long_one(
    make_engine: "MakeEngine", make_probe: "MakeProbe", turns: Turns
) -> None:
    engine = make_engine(policy="fifo")
    short = make_probe("short", num_inference_steps=2, on_event=turns.of("short"))
    long = make_probe(
        "long", width=112, num_inference_steps=20, on_event=turns.of("long", at_step(3, submit_all(engine, [short])))
    )

    engine.submit(long.job)

    assert_finished(short, long)
    assert turns.log == at_once("long", 20 + 3) + at_once("short", 2 + 3)


def test_engine_lets_a_short_job_overtake_between_two_chunks_of_a_long_decode(
    engine: "Engine", make_probe: "MakeProbe", turns: Turns
) -> None:
    short = make_probe("short", num_inference_steps=1, on_event=turns.of("short"))
    bring_the_short = at_step(2, submit_all(engine, [short]), stage="decode")
    long = make_probe("long", num_frames=81, num_inference_steps=1, on_event=turns.of("long", bring_the_short))

    engine.submit(long.job)

    assert_finished(short, long)
    assert turns.log == ["long"] * 3 + at_once("short", 1 + 3) + at_once("long", 19)


def test_engine_lets_a_long_job_of_a_higher_class_overtake(
    engine: "Engine", make_probe: "MakeProbe", turns: Turns
) -> None:
    urgent = make_probe(
        "urgent", width=112, num_inference_steps=9, standing=Standing("high"), on_event=turns.of("urgent")
    )
    first = make_probe("first", on_event=turns.of("first", at_step(1, submit_all(engine, [urgent]))))

    engine.submit(first.job)

    assert_finished(first, urgent)
    assert turns.log == ["first", *at_once("urgent", 9 + 3), *at_once("first", 3 + 3)]


def test_engine_lets_nobody_overtake_a_job_that_is_overdue(
    engine: "Engine", make_probe: "MakeProbe", turns: Turns
) -> None:
    others = [
        make_probe("short", num_inference_steps=1, on_event=turns.of("short")),
        make_probe("urgent", num_inference_steps=1, standing=Standing("high"), on_event=turns.of("urgent")),
    ]
    overdue = make_probe(
        "overdue",
        width=112,
        num_inference_steps=9,
        standing=Standing("low", overdue_in_s=-1.0),
        on_event=turns.of("overdue", at_step(1, submit_all(engine, others))),
    )

    engine.submit(overdue.job)

    assert_finished(overdue, *others)
    assert turns.log[: 9 + 3 + 1] == at_once("overdue", 9 + 3)


def test_engine_gives_a_job_that_is_passed_over_the_bits_that_it_has_alone(
    engine: "Engine", make_probe: "MakeProbe"
) -> None:
    alone = make_probe("alone", num_frames=17, num_inference_steps=6, reproducible=True)
    engine.submit(alone.job)
    assert_finished(alone)
    shorts = [make_probe(f"short-{i}", num_inference_steps=1, seed=i) for i in range(2)]
    bring_one, bring_another = (
        at_step(2, submit_all(engine, [shorts[0]])),
        at_step(1, submit_all(engine, [shorts[1]]), stage="decode"),
    )

    def bring_them(event: EngineEvent) -> None:
        bring_one(event)
        bring_another(event)

    passed = make_probe("passed", num_frames=17, num_inference_steps=6, reproducible=True, on_event=bring_them)
    engine.submit(passed.job)

    assert_finished(passed, *shorts)
    assert torch.equal(passed.latents, alone.latents)
    assert np.array_equal(passed.frames, alone.frames)


def test_engine_counts_the_devices_time_for_a_job_without_the_turns_of_others(
    engine: "Engine", make_probe: "MakeProbe"
) -> None:
    short = make_probe("short", num_inference_steps=6)
    long = make_probe(width=112, num_inference_steps=30, on_event=at_step(1, submit_all(engine, [short])))

    engine.submit(long.job)

    assert_finished(short, long)
    told, told_of_short = long.events[-1], short.events[-1]
    assert isinstance(told, Finished)
    assert isinstance(told_of_short, Finished)
    shorts_s = told_of_short.denoise_device_s + told_of_short.decode_device_s
    assert 0 < told.denoise_device_s <= told.denoise_s - shorts_s
    assert 0 < told.decode_device_s <= told.decode_s


def test_engine_counts_the_seconds_of_its_threads_work_apart_from_those_in_which_it_waits_for_a_sink(
    make_engine: "MakeEngine",
    make_probe: "MakeProbe",
    generator_parts: GeneratorParts,
    registry: CollectorRegistry,
    marked: PreparedPrompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that only forwards, also one that fails, decodes and sinks move."""
    now = 0.0

    def take(seconds: float) -> Callable[..., None]:
        def pass_time(*_: object) -> None:
            nonlocal now
            now += seconds

        return pass_time

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now))
    engine = make_engine()
    failing = make_probe("failing", prompt_embeddings=marked)
    probe = make_probe(num_inference_steps=3, guidance_scale=1.0, on_frames=take(1000.0))
    with ExitStack() as hooks:
        hooks.enter_context(generator_parts.transformer.register_forward_pre_hook(take(1.0)))
        hooks.enter_context(generator_parts.vae.decoder.register_forward_pre_hook(take(100.0)))
        hooks.enter_context(on_marked_forward(generator_parts, run_out_of_memory))
        for job in (failing, probe):
            engine.submit(job.job)
            job.end()
    engine.close()

    value, num_chunks = registry.get_sample_value, len(probe.chunks)
    assert num_chunks == 3
    assert value("wan_device_busy_seconds_total") == 1.0 + 3 * 1.0 + num_chunks * 100.0
    assert value("wan_device_blocked_seconds_total") == num_chunks * 1000.0


# Telling


def test_engine_tells_progress_in_order_and_how_long_the_rest_takes(engine: "Engine", make_probe: "MakeProbe") -> None:
    probe = make_probe(num_inference_steps=5, num_frames=13)

    engine.submit(probe.job)

    assert_finished(probe)
    progress = [event for event in probe.events if isinstance(event, Progress)]
    assert [(event.stage, event.step, event.steps) for event in progress] == [
        *(("denoise", step, 5) for step in range(1, 6)),
        *(("decode", chunk, 4) for chunk in range(1, 5)),
    ]
    assert all(event.seconds_left is not None and event.seconds_left >= 0 for event in progress)
    assert progress[-1].seconds_left == 0
    others = [type(event) for event in probe.events if not isinstance(event, Progress)]
    assert others == [Started, Denoised, Finished]


def test_engine_counts_steps_forwards_and_jobs_in_flight(
    engine: "Engine", make_probe: "MakeProbe", registry: CollectorRegistry, forward_batches: list[int]
) -> None:
    late = make_probe("late", num_inference_steps=2, guidance_scale=1.0)
    first = make_probe("first", num_inference_steps=4, on_event=at_step(1, lambda: engine.submit(late.job)))

    engine.submit(first.job)
    assert_finished(first, late)
    engine.close()

    value = registry.get_sample_value
    assert value("wan_forwards_total", {"kind": "cond"}) == 4
    assert value("wan_forwards_total", {"kind": "uncond"}) == 4
    assert len(forward_batches) == 8
    assert value("wan_step_seconds_count") == 4
    assert value("wan_step_batch_size_sum") == 4 + 2
    assert value("wan_jobs_in_flight") == 0
    assert value("wan_wasted_steps_total") == 0


def test_engine_ends_every_job_exactly_once(
    engine: "Engine", generator_parts: GeneratorParts, make_probe: "MakeProbe", marked: PreparedPrompt
) -> None:
    def no_space(_: npt.NDArray[np.uint8]) -> None:
        raise StoreFull

    others = [
        make_probe("finishes"),
        make_probe("fails", prompt_embeddings=marked),
        make_probe("no-space", on_frames=no_space),
        make_probe("cancelled", on_event=at_step(1, lambda: engine.cancel("cancelled"))),
        make_probe("cancelled-at-once", on_event=lambda event: engine.cancel("cancelled-at-once")),
        make_probe("still-there-at-the-close", num_inference_steps=50, num_frames=17),
    ]
    first = make_probe("first", on_event=at_step(1, submit_all(engine, others)))
    with on_marked_forward(generator_parts, run_out_of_memory):
        engine.submit(first.job)
        for probe in (first, *others[:-1]):
            probe.end()
            engine.cancel(probe.job.job_id)  # too late: nothing more is told
        engine.close()

    for probe in (first, *others):
        last = probe.end()
        assert [event for event in probe.events if isinstance(event, Finished | Failed)] == [last]


# Cancelling


def test_engine_cancels_a_waiting_job_within_one_unit(
    make_engine: "MakeEngine", make_probe: "MakeProbe", registry: CollectorRegistry
) -> None:
    engine = make_engine(max_jobs_in_flight=1)
    log: list[tuple[str, EngineEvent]] = []
    waiting = make_probe("waiting", on_event=lambda event: log.append(("waiting", event)))

    def first_event(event: EngineEvent) -> None:
        log.append(("first", event))
        if isinstance(event, Started):
            engine.submit(waiting.job)
        at_step(2, lambda: engine.cancel("waiting"))(event)

    first = make_probe("first", on_event=first_event)

    engine.submit(first.job)

    assert_finished(first)
    assert isinstance(error_of(waiting), JobCancelled)
    assert len(waiting.events) == 1
    names = [name for name, _ in log]
    assert names.index("waiting") == 1 + 2  # right behind `Started` and the two steps of the first
    assert registry.get_sample_value("wan_wasted_steps_total") == 0


def test_engine_cancels_a_denoising_job_within_one_unit(
    engine: "Engine", make_probe: "MakeProbe", registry: CollectorRegistry, forward_batches: list[int]
) -> None:
    probe = make_probe(
        "cancelled", num_inference_steps=9, guidance_scale=1.0, on_event=at_step(3, lambda: engine.cancel("cancelled"))
    )

    engine.submit(probe.job)

    assert isinstance(error_of(probe), JobCancelled)
    assert len(forward_batches) == 3
    assert registry.get_sample_value("wan_wasted_steps_total") == 3
    assert probe.chunks == []


def test_engine_cancels_a_decoding_job_within_one_unit(
    engine: "Engine", make_probe: "MakeProbe", registry: CollectorRegistry
) -> None:
    probe = make_probe("cancelled", on_event=at_step(1, lambda: engine.cancel("cancelled"), stage="decode"))

    engine.submit(probe.job)

    assert isinstance(error_of(probe), JobCancelled)
    assert len(probe.chunks) == 1
    assert registry.get_sample_value("wan_wasted_steps_total") == 4


def test_engine_cancels_a_job_that_is_passed_over_within_one_unit(
    engine: "Engine", make_probe: "MakeProbe", turns: Turns
) -> None:
    short = make_probe("short", on_event=turns.of("short", at_step(2, lambda: engine.cancel("long"))))
    long = make_probe(
        "long", width=112, num_inference_steps=20, on_event=turns.of("long", at_step(1, submit_all(engine, [short])))
    )

    engine.submit(long.job)

    assert_finished(short)
    assert isinstance(error_of(long), JobCancelled)
    assert turns.log == ["long", "short", "short", "long ends", *at_once("short", 2 + 3)]


def test_engine_cancels_a_job_that_is_just_being_admitted(engine: "Engine", make_probe: "MakeProbe") -> None:
    """It once was in no list while those before it in the queue began, and ran to its end."""

    def cancel_the_next(event: EngineEvent) -> None:
        if isinstance(event, Started):
            engine.cancel("second")

    both = [make_probe("first", on_event=cancel_the_next), make_probe("second")]
    opener = make_probe("opener", on_event=at_step(1, submit_all(engine, both)))

    engine.submit(opener.job)

    assert_finished(opener, both[0])
    assert isinstance(error_of(both[1]), JobCancelled)


def test_engine_leaves_the_others_unchanged_when_one_is_cancelled(
    engine: "Engine", make_probe: "MakeProbe", forward_batches: list[int]
) -> None:
    alone = make_probe("alone", seed=3, num_inference_steps=6)
    engine.submit(alone.job)
    assert_finished(alone)
    leaver = make_probe("leaver", num_inference_steps=9, on_event=at_step(2, lambda: engine.cancel("leaver")))
    stayer = make_probe("stayer", seed=3, num_inference_steps=6, on_event=at_step(1, submit_all(engine, [leaver])))

    engine.submit(stayer.job)

    assert_finished(stayer)
    assert isinstance(error_of(leaver), JobCancelled)
    assert max(forward_batches) == 2
    assert_close(stayer, alone)


def assert_close(actual: "JobProbe", expected: "JobProbe") -> None:
    assert float((actual.latents - expected.latents).abs().max() / expected.latents.std()) <= 1e-5


# Failing


def fail_in_one_step_batch_with_strangers(
    engine: "Engine", make_probe: "MakeProbe", culprit: "JobProbe", forward_batches: list[int]
) -> WanError:
    """Bring the culprit and two strangers into one step batch. Returns the culprit's error.

    The strangers have to finish with the results that they have without it.
    """
    solo = [make_probe(f"solo-{i}", seed=i, num_inference_steps=6, guidance_scale=1.0) for i in range(2)]
    for probe in solo:
        engine.submit(probe.job)
        assert_finished(probe)
    forward_batches.clear()
    second = make_probe("second", seed=1, num_inference_steps=6, guidance_scale=1.0)
    first = make_probe(
        "first",
        seed=0,
        num_inference_steps=6,
        guidance_scale=1.0,
        on_event=at_step(2, submit_all(engine, [second, culprit])),
    )
    engine.submit(first.job)
    assert_finished(first, second)
    for probe, expected in zip((first, second), solo, strict=True):
        assert_close(probe, expected)
    return error_of(culprit)


def test_engine_fails_only_the_job_that_runs_out_of_memory_in_a_shared_step(
    make_engine: "MakeEngine",
    generator_parts: GeneratorParts,
    make_probe: "MakeProbe",
    marked: PreparedPrompt,
    forward_batches: list[int],
) -> None:
    told: list[tuple[str, type[BaseException]]] = []
    engine = make_engine(on_error=lambda job_id, error: told.append((job_id, type(error))))
    culprit = make_probe("culprit", prompt_embeddings=marked)

    with on_marked_forward(generator_parts, run_out_of_memory):
        error = fail_in_one_step_batch_with_strangers(engine, make_probe, culprit, forward_batches)

    assert isinstance(error, OutOfMemory)
    assert told == [(job_id, RuntimeError) for job_id in ("first", "second", "culprit", "culprit")]


def test_engine_shares_less_after_a_shared_step_ran_out_of_memory(
    engine: "Engine",
    generator_parts: GeneratorParts,
    make_probe: "MakeProbe",
    marked: PreparedPrompt,
    forward_batches: list[int],
) -> None:
    culprit = make_probe("culprit", prompt_embeddings=marked)
    with on_marked_forward(generator_parts, run_out_of_memory):
        fail_in_one_step_batch_with_strangers(engine, make_probe, culprit, forward_batches)
    forward_batches.clear()
    others = [make_probe(f"job-{i}") for i in range(4)]
    first = make_probe("first", on_event=at_step(1, submit_all(engine, others)))

    engine.submit(first.job)

    assert_finished(first, *others)
    assert max(forward_batches) == 2  # three were too many


def test_engine_fails_only_the_job_whose_decode_runs_out_of_memory(
    engine: "Engine", generator_parts: GeneratorParts, make_probe: "MakeProbe"
) -> None:
    def too_wide(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[-1] == 112 // 8:
            run_out_of_memory()

    wide = make_probe("wide", width=112, num_inference_steps=2)
    first = make_probe("first", on_event=at_step(1, submit_all(engine, [wide])))
    alone = make_probe("alone")
    engine.submit(alone.job)
    assert_finished(alone)

    with generator_parts.vae.decoder.register_forward_pre_hook(too_wide):
        engine.submit(first.job)
        assert_finished(first)
        assert isinstance(error_of(wide), OutOfMemory)

    assert np.array_equal(first.frames, alone.frames)


@pytest.mark.parametrize("chunk", [0, 2])
def test_engine_decodes_once_more_after_running_out_of_memory(
    engine: "Engine", generator_parts: GeneratorParts, make_probe: "MakeProbe", chunk: int
) -> None:
    calls = 0

    def too_much_once(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls == chunk + 1:
            run_out_of_memory()

    usual, hit = make_probe("usual"), make_probe("hit")
    engine.submit(usual.job)
    assert_finished(usual)

    with generator_parts.vae.decoder.register_forward_pre_hook(too_much_once):
        engine.submit(hit.job)
        assert_finished(hit)

    assert np.array_equal(hit.frames, usual.frames)


@pytest.mark.parametrize("reproducible", [False, True])
def test_engine_decodes_in_tiles_where_the_whole_does_not_fit(
    engine: "Engine",
    generator_parts: GeneratorParts,
    make_probe: "MakeProbe",
    monkeypatch: pytest.MonkeyPatch,
    reproducible: bool,
) -> None:
    """A reproducible job fails instead: its frames may not depend on the memory that is free."""
    for side in ("height", "width"):
        monkeypatch.setattr(generator_parts.vae, f"tile_sample_min_{side}", 48)
        monkeypatch.setattr(generator_parts.vae, f"tile_sample_stride_{side}", 32)

    def larger_than_a_tile(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[-1] > 48 // 8:
            run_out_of_memory()

    probe = make_probe("large", reproducible=reproducible)
    with generator_parts.vae.decoder.register_forward_pre_hook(larger_than_a_tile):
        engine.submit(probe.job)
        if reproducible:
            assert isinstance(error_of(probe), OutOfMemory)
        else:
            assert_finished(probe)
            parameters = probe.job.parameters
            assert probe.frames.shape == (parameters.num_frames, parameters.height, parameters.width, 3)


def test_engine_fails_only_the_job_whose_forward_raises(
    make_engine: "MakeEngine",
    generator_parts: GeneratorParts,
    make_probe: "MakeProbe",
    marked: PreparedPrompt,
    forward_batches: list[int],
) -> None:
    told: list[BaseException] = []
    engine = make_engine(on_error=lambda job_id, error: told.append(error))
    culprit = make_probe("culprit", prompt_embeddings=marked)
    reason = ValueError("the shapes of /secret/path do not match")

    def fail() -> None:
        raise reason

    with on_marked_forward(generator_parts, fail):
        error = fail_in_one_step_batch_with_strangers(engine, make_probe, culprit, forward_batches)

    assert isinstance(error, RenderFailed)
    assert "secret" not in error.detail
    assert told[-1] is reason


def test_engine_fails_only_the_job_whose_prompt_does_not_fit_the_model(
    engine: "Engine", make_probe: "MakeProbe"
) -> None:
    misfit = PreparedPrompt(TextEmbedding(np.ones((500, 32), np.float32), "float32", solo=True), None)
    probe = make_probe("misfit", prompt_embeddings=misfit)
    other = make_probe("other")

    engine.submit(probe.job)
    engine.submit(other.job)

    assert isinstance(error_of(probe), RenderFailed)
    assert_finished(other)


def test_engine_fails_only_the_job_whose_sink_is_full(
    engine: "Engine", make_probe: "MakeProbe", registry: CollectorRegistry
) -> None:
    full = StoreFull()

    def refuse(_: npt.NDArray[np.uint8]) -> None:
        raise full

    probe = make_probe("full", on_frames=refuse)
    other = make_probe("other", on_event=at_step(1, submit_all(engine, [probe])))

    engine.submit(other.job)

    assert error_of(probe) is full
    assert_finished(other)
    assert registry.get_sample_value("wan_wasted_steps_total") == 4


def test_engine_reports_no_error_when_a_sink_stops_because_its_job_was_cancelled(
    make_engine: "MakeEngine", make_probe: "MakeProbe"
) -> None:
    """A client that went away during a decode was once logged as a failure of the engine."""
    told: list[BaseException] = []
    engine = make_engine(on_error=lambda job_id, error: told.append(error))

    def stopped(_: npt.NDArray[np.uint8]) -> None:
        raise JobCancelled

    probe = make_probe(on_frames=stopped)

    engine.submit(probe.job)

    assert isinstance(error_of(probe), JobCancelled)
    assert told == []


# Dying, hanging, closing


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # that is what it is about
def test_engine_loses_all_jobs_and_says_so_when_its_thread_dies(
    make_engine: "MakeEngine", generator_parts: GeneratorParts, make_probe: "MakeProbe", marked: PreparedPrompt
) -> None:
    engine = make_engine(max_jobs_in_flight=2)
    engine.check()
    too_late: list[BaseException] = []
    latecomer = make_probe("latecomer")

    def submit_in_the_moment_of_death(event: EngineEvent) -> None:
        """Nobody would ever tell this job that it ended."""
        if isinstance(event, Failed):
            try:
                engine.submit(latecomer.job)
            except WanError as error:
                too_late.append(error)

    culprit = make_probe("culprit", prompt_embeddings=marked, on_event=submit_in_the_moment_of_death)
    waiting = make_probe("waiting")
    first = make_probe("first", on_event=at_step(1, submit_all(engine, [culprit, waiting])))

    with on_marked_forward(generator_parts, exit_the_thread):
        engine.submit(first.job)
        for probe in (first, culprit, waiting):
            assert isinstance(error_of(probe), WorkerLost)

    assert [type(error) for error in too_late] == [WorkerLost]
    with pytest.raises(WorkerLost):
        engine.check()
    with pytest.raises(WorkerLost):
        engine.submit(latecomer.job)


def exit_the_thread() -> None:
    raise SystemExit  # no `Exception`, so it passes every job's boundary


@pytest.mark.parametrize("unit", ["begin", "step", "begin-decoding", "decode"])
def test_engine_check_raises_while_a_unit_of_work_hangs(
    unit: str, make_engine: "MakeEngine", generator_parts: GeneratorParts, make_probe: "MakeProbe"
) -> None:
    hang_timeout_s = 0.05
    entered, let_go = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        entered.set()
        let_go.wait(PATIENCE_S)

    class HangingScheduler(UniPCMultistepScheduler):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            hang()
            super().set_timesteps(*args, **kwargs)

    parts, hooks = generator_parts, ExitStack()
    if unit == "begin":
        parts = replace(parts, scheduler=HangingScheduler.from_config(parts.scheduler.config))
    else:
        modules = {"step": parts.transformer, "begin-decoding": parts.vae.post_quant_conv, "decode": parts.vae.decoder}
        hooks.enter_context(modules[unit].register_forward_pre_hook(hang))
    engine = make_engine(parts, hang_timeout_s=hang_timeout_s)
    probe = make_probe()
    with hooks:
        engine.submit(probe.job)
        assert entered.wait(PATIENCE_S)
        let_go.wait(2 * hang_timeout_s)  # the very time that makes it a hang
        with pytest.raises(WorkerLost, match="not answered"):
            engine.check()
        let_go.set()
        assert_finished(probe)


def test_engine_answers_at_once_while_a_unit_of_work_hangs(
    make_engine: "MakeEngine", generator_parts: GeneratorParts, make_probe: "MakeProbe", marked: PreparedPrompt
) -> None:
    engine = make_engine()
    entered, let_go = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        assert let_go.wait(PATIENCE_S)

    probe, waiting = make_probe("hangs", prompt_embeddings=marked), make_probe("waiting")
    with on_marked_forward(generator_parts, hang):
        engine.submit(probe.job)
        assert entered.wait(PATIENCE_S)
        engine.submit(waiting.job)
        engine.cancel("hangs")
        engine.check()  # not for long enough yet
        engine.close(timeout_s=0.0)
        with pytest.raises(ShuttingDown):
            engine.submit(make_probe("too-late").job)
        let_go.set()

        assert isinstance(error_of(probe), ShuttingDown | JobCancelled)
        assert isinstance(error_of(waiting), ShuttingDown)


def test_engine_close_ends_what_is_in_flight_and_what_waits(make_engine: "MakeEngine", make_probe: "MakeProbe") -> None:
    engine = make_engine(max_jobs_in_flight=1)
    begun = threading.Event()
    waiting = make_probe("waiting")

    def submit_the_other() -> None:
        engine.submit(waiting.job)
        begun.set()

    running = make_probe("running", num_inference_steps=100, num_frames=81, on_event=at_step(1, submit_the_other))
    engine.submit(running.job)
    assert begun.wait(PATIENCE_S)

    engine.close()

    assert isinstance(running.events[-1], Failed)
    assert isinstance(error_of(running), ShuttingDown)
    assert isinstance(error_of(waiting), ShuttingDown)
    with pytest.raises(ShuttingDown):
        engine.submit(make_probe("too-late").job)


def test_engine_renders_in_bfloat16(tiny_folder: Path, make_engine: "MakeEngine", make_probe: "MakeProbe") -> None:
    parts = load_generator_parts(tiny_folder, torch.device("cpu"), "bfloat16", "bfloat16")
    probe = make_probe()

    make_engine(parts).submit(probe.job)

    assert_finished(probe)
    assert probe.latents.dtype == torch.float32
    assert probe.latents.isfinite().all()
    assert probe.frames.shape == (9, 64, 64, 3)
