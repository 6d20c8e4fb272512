"""Whose turn it is, for any mix of jobs, and the model of work behind it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.handoff import Standing
from schemas.presets import Levers
from schemas.requests import GenerationParameters, Priority
from serve_graph.scheduling import (
    ALONE_STRETCH,
    HOPELESS,
    MIN_FIFO_S,
    NEAR,
    PATIENCE_OF_LOW,
    Policy,
    Shares,
    Turn,
    Work,
    WorkModel,
    next_to_start,
    order,
    outlook,
    work_of,
)

NOW = 1_000.0
STRETCH = 1.5
CLASSES: list[Priority] = ["high", "normal", "low"]

seconds = st.floats(0.01, 1_000.0)


@dataclass(frozen=True)
class Job:
    """The least that the order asks for."""

    turn: Turn
    remaining_s: float


def a_turn(
    priority: Priority = "normal",
    waited_s: float = 1.0,
    overdue_in_s: float = inf,
    deadline_left_s: float = inf,
    fair_start: float | None = None,
) -> Turn:
    return Turn.of(Standing(priority, waited_s, overdue_in_s, deadline_left_s, fair_start), NOW)


turns = st.builds(
    a_turn,
    priority=st.sampled_from(CLASSES),
    waited_s=seconds,
    overdue_in_s=st.floats(-1_000, 1_000),
    deadline_left_s=st.one_of(st.just(inf), st.floats(-10, 1_000)),
    fair_start=st.one_of(st.none(), seconds),
)
jobs_of_any_kind = st.lists(st.builds(Job, turns, seconds), max_size=12)
patient_singles = st.lists(
    st.builds(Job, st.builds(a_turn, priority=st.sampled_from(CLASSES), waited_s=seconds), seconds), max_size=12
)


# The order


@given(jobs_of_any_kind, st.sampled_from(["fifo", "srpt"]))
def test_order_names_each_job_once(jobs: list[Job], policy: Policy) -> None:
    assert sorted(order(jobs, policy, NOW)) == list(range(len(jobs)))


@given(jobs_of_any_kind)
def test_order_under_fifo_is_that_of_submission_whatever_else_jobs_are(jobs: list[Job]) -> None:
    ordered = [jobs[i].turn.submitted for i in order(jobs, "fifo", NOW)]

    assert ordered == sorted(ordered)


@given(jobs_of_any_kind)
def test_order_puts_overdue_jobs_first_the_longest_overdue_before_the_others(jobs: list[Job]) -> None:
    ordered = [jobs[i].turn.overdue_at for i in order(jobs, "srpt", NOW)]
    num_overdue = sum(overdue_at <= NOW for overdue_at in ordered)

    assert ordered[:num_overdue] == sorted(overdue_at for overdue_at in ordered if overdue_at <= NOW)


@given(jobs_of_any_kind)
def test_order_keeps_to_the_classes_among_jobs_that_are_not_overdue(jobs: list[Job]) -> None:
    patient = [jobs[i].turn for i in order(jobs, "srpt", NOW) if jobs[i].turn.overdue_at > NOW]
    classes = [CLASSES.index(turn.priority) for turn in patient]

    assert classes == sorted(classes)


@given(patient_singles)
def test_order_within_a_class_is_by_the_least_work_left(jobs: list[Job]) -> None:
    ordered = [jobs[i] for i in order(jobs, "srpt", NOW)]

    assert ordered == sorted(ordered, key=lambda job: (CLASSES.index(job.turn.priority), job.remaining_s))


@given(st.lists(st.floats(1.01 * HOPELESS, 0.99 * NEAR), min_size=1, max_size=8), st.floats(1.0, 100.0))
def test_order_puts_near_deadlines_before_shorter_jobs_the_nearest_first(lefts: list[float], work: float) -> None:
    near = [Job(a_turn(deadline_left_s=left * work), work) for left in lefts]
    others = [Job(a_turn(), work / 10), Job(a_turn(deadline_left_s=1.01 * NEAR * work), work)]
    jobs = [*others, *near]

    ordered = [jobs[i] for i in order(jobs, "srpt", NOW)]

    assert ordered == [*sorted(near, key=lambda job: job.turn.deadline), *others]


def test_order_spends_no_time_first_on_a_deadline_that_can_not_be_met() -> None:
    hopeless = Job(a_turn(deadline_left_s=0.9 * HOPELESS * 100.0), 100.0)

    assert order([hopeless, Job(a_turn(), 10.0)], "srpt", NOW) == [1, 0]


@given(st.lists(seconds, max_size=6), st.lists(seconds, max_size=6), seconds)
def test_order_puts_singles_before_batch_items_and_those_by_fair_start(
    singles: list[float], starts: list[float], work: float
) -> None:
    items = [Job(a_turn(fair_start=start), work) for start in starts]
    jobs = [*items, *(Job(a_turn(), s) for s in singles)]

    fair_starts = [jobs[i].turn.fair_start for i in order(jobs, "srpt", NOW)]

    assert fair_starts == [None] * len(singles) + sorted(starts)


# Ageing


def submitted(own_s: float, ahead_s: float, priority: Priority = "normal", fair_start: float | None = None) -> Turn:
    return Turn.at_submission(
        NOW, own_s=own_s, ahead_s=ahead_s, max_stretch=STRETCH, priority=priority, fair_start=fair_start
    )


@given(st.floats(MIN_FIFO_S, 1_000), st.floats(0, 10_000))
def test_turn_is_overdue_in_time_to_end_within_its_stretch_of_fifo(own_s: float, ahead_s: float) -> None:
    turn = submitted(own_s, ahead_s)

    may_take_s = max(STRETCH * (ahead_s + own_s), ALONE_STRETCH * own_s)
    assert turn.overdue_at + own_s == pytest.approx(NOW + may_take_s)


@given(st.floats(0, 1_000), st.floats(0, 10_000), st.sampled_from(CLASSES), st.sampled_from([None, 3.0]))
def test_turn_is_not_overdue_before_it_is_submitted(
    own_s: float, ahead_s: float, priority: Priority, fair_start: float | None
) -> None:
    assert submitted(own_s, ahead_s, priority, fair_start).overdue_at >= NOW


@pytest.mark.parametrize(("priority", "fair_start"), [("low", None), ("normal", 0.0), ("high", 0.0), ("low", 0.0)])
def test_turn_of_a_low_job_or_a_batch_item_is_overdue_later(priority: Priority, fair_start: float | None) -> None:
    patient = submitted(10.0, 90.0, priority, fair_start)

    assert patient.overdue_at == pytest.approx(NOW + PATIENCE_OF_LOW * STRETCH * 100.0 - 10.0)


@given(turns, st.floats(0, 1e6))
def test_turn_is_the_same_on_another_clock(turn: Turn, other_now: float) -> None:
    there = Turn.of(turn.standing(NOW), other_now)

    assert there.submitted - other_now == pytest.approx(turn.submitted - NOW, abs=1e-6)
    assert there.overdue_at - other_now == pytest.approx(turn.overdue_at - NOW, abs=1e-6)
    assert there.deadline - other_now == pytest.approx(turn.deadline - NOW, abs=1e-6)
    assert (there.priority, there.fair_start) == (turn.priority, turn.fair_start)


# A device, simulated: a unit of work at a time, and whose turn it is asked anew for each


@dataclass(frozen=True)
class Arrival:
    """after_s: since the one before. estimate: what the model believes, in parts of the truth. batch: its name."""

    after_s: float
    work_s: float
    priority: Priority = "normal"
    deadline_s: float | None = None
    batch: str | None = None
    estimate: float = 1.0


@dataclass
class Simulated:
    arrival: Arrival
    turn: Turn
    left_s: float
    ended: float = inf
    bound: float = inf

    @property
    def remaining_s(self) -> float:
        return self.left_s * self.arrival.estimate


@dataclass
class Device:
    """Serves arrivals to their end, in units of at most `unit_s`, as the job service and the engine would.

    Notes for each job, once it is overdue, when it has to have ended: after the unit in progress, itself and what was
    there to go before it, which is what became overdue earlier and what was in flight.
    """

    policy: Policy
    slots: int
    unit_s: float = 1.0
    now: float = 0.0
    waiting: list[Simulated] = field(default_factory=list)
    in_flight: list[Simulated] = field(default_factory=list)
    shares: Shares = field(default_factory=Shares)

    def serve(self, arrivals: Sequence[Arrival]) -> list[Simulated]:
        to_come, everyone, next_at = list(arrivals), [], 0.0
        while to_come or self.waiting or self.in_flight:
            if to_come and not self.waiting and not self.in_flight:
                self.now = max(self.now, next_at + to_come[0].after_s)
            while to_come and next_at + to_come[0].after_s <= self.now:
                arrival = to_come.pop(0)
                next_at += arrival.after_s
                everyone.append(self._submit(arrival, next_at))
            self._note_bounds()
            self._start()
            self._serve_a_unit()
        return everyone

    def _submit(self, arrival: Arrival, at: float) -> Simulated:
        own_s = arrival.work_s * arrival.estimate
        turn = Turn.at_submission(
            at,
            own_s=own_s,
            ahead_s=sum(job.remaining_s for job in (*self.in_flight, *self.waiting)),
            max_stretch=STRETCH,
            priority=arrival.priority,
            deadline_s=arrival.deadline_s,
            fair_start=None if arrival.batch is None else self.shares.enter(arrival.batch, own_s),
        )
        self.waiting.append(Simulated(arrival, turn, arrival.work_s))
        return self.waiting[-1]

    def _note_bounds(self) -> None:
        there = [*self.in_flight, *self.waiting]
        for job in there:
            if job.bound == inf and self.now >= job.turn.overdue_at:
                before = [
                    other.left_s
                    for other in there
                    if other is not job
                    and (other.turn.overdue_at <= job.turn.overdue_at or any(other is held for held in self.in_flight))
                ]
                job.bound = self.now + self.unit_s + sum(before) + job.left_s

    def _start(self) -> None:
        while (index := next_to_start(self.waiting, self.in_flight, self.slots, self.policy, self.now)) is not None:
            job = self.waiting.pop(index)
            if job.turn.fair_start is not None:
                self.shares.began(job.turn.fair_start)
            self.in_flight.append(job)
        assert len(self.in_flight) <= self.slots + (self.policy == "srpt")

    def _serve_a_unit(self) -> None:
        if not self.in_flight:
            return
        job = self.in_flight[order(self.in_flight, self.policy, self.now)[0]]
        unit_s = min(self.unit_s, job.left_s)
        self.now += unit_s
        job.left_s -= unit_s
        if job.left_s <= 1e-9:
            job.ended = self.now
            self.in_flight = [other for other in self.in_flight if other is not job]


adversarial = st.lists(
    st.builds(
        Arrival,
        after_s=st.floats(0, 20),
        work_s=st.sampled_from([0.5, 1.0, 2.0, 5.0, 30.0]),
        priority=st.sampled_from(CLASSES),
        deadline_s=st.one_of(st.none(), st.floats(0.1, 50)),
        batch=st.sampled_from([None, "a", "b"]),
        estimate=st.sampled_from([0.2, 1.0, 3.0]),
    ),
    min_size=1,
    max_size=25,
)


@given(adversarial, st.integers(1, 5))
def test_no_job_waits_beyond_its_bound_whatever_else_arrives(arrivals: list[Arrival], slots: int) -> None:
    for job in Device("srpt", slots).serve(arrivals):
        assert job.ended < inf
        assert job.ended <= job.bound + 1e-6


@given(st.sampled_from(["high", "normal"]), st.floats(0.3, 2.0), st.integers(1, 5))
def test_a_long_job_ends_though_shorter_ones_of_a_higher_class_never_cease(
    priority: Priority, every_s: float, slots: int
) -> None:
    """Without ageing it would end behind the last of them."""
    flood = [Arrival(every_s, 1.0, priority) for _ in range(150)]
    long = Device("srpt", slots).serve([Arrival(0.0, 20.0, "low"), *flood])[0]

    assert long.ended <= PATIENCE_OF_LOW * STRETCH * 20.0 + (slots + 1) * 1.0 + 1.0


@given(adversarial, st.integers(1, 5))
def test_fifo_ends_jobs_in_the_order_of_their_arrival(arrivals: list[Arrival], slots: int) -> None:
    ends = [job.ended for job in Device("fifo", slots).serve(arrivals)]

    assert ends == sorted(ends)


@given(adversarial)
def test_both_policies_take_the_same_time_altogether(arrivals: list[Arrival]) -> None:
    ends = [max(job.ended for job in Device(policy, 3).serve(arrivals)) for policy in ("fifo", "srpt")]

    assert ends[0] == pytest.approx(ends[1])


def mixed_trace(seed: int, load: float, num_jobs: int = 200) -> list[Arrival]:
    """80% short and 20% long jobs of ten times their work, open arrivals: the trace that `srpt` is made for."""
    draw = random.Random(seed)
    sizes = [60.0 if draw.random() < 0.2 else 6.0 for _ in range(num_jobs)]
    every_s = (0.8 * 6.0 + 0.2 * 60.0) / load
    return [Arrival(draw.expovariate(1 / every_s), size) for size in sizes]


def latencies(policy: Policy, trace: list[Arrival], slots: int) -> tuple[list[float], list[float]]:
    """Of the short and of the long jobs, ascending."""
    served = Device(policy, slots).serve(trace)
    of = {size: sorted(j.ended - j.turn.submitted for j in served if j.arrival.work_s == size) for size in (6.0, 60.0)}
    return of[6.0], of[60.0]


@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("load", [0.8, 0.95])
def test_srpt_halves_the_short_jobs_latency_at_no_more_than_half_as_much_again_for_the_worst_long_one(
    load: float, slots: int
) -> None:
    for seed in range(3):
        trace = mixed_trace(seed, load)
        short, long = latencies("srpt", trace, slots)
        fifo_short, fifo_long = latencies("fifo", trace, slots)
        p95 = int(0.95 * len(short))

        assert mean(short) <= 0.5 * mean(fifo_short)
        assert short[p95] <= 0.5 * fifo_short[p95]
        assert long[-1] <= 1.5 * fifo_long[-1]


# Batches

item_works = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=12)


@given(item_works, item_works, st.integers(0, 12))
def test_batches_with_items_left_are_served_alike_up_to_their_longest_items(
    first: list[float], second: list[float], head_start: int
) -> None:
    """head_start: items of the first batch that were served before the second arrived."""
    shares, works = Shares(), {"first": first, "second": second}
    left = [("first", work, shares.enter("first", work)) for work in first]
    served = {"first": 0.0, "second": 0.0}

    def serve_one() -> None:
        turns = [Job(a_turn(fair_start=start), work) for _, work, start in left]
        name, work, start = left.pop(order(turns, "srpt", NOW)[0])
        shares.began(start)
        served[name] += work

    for _ in range(min(head_start, len(first))):
        serve_one()
    before = served["first"]
    left += [("second", work, shares.enter("second", work)) for work in second]
    while {name for name, *_ in left} == {"first", "second"}:
        serve_one()
        bound = max(works["first"]) + max(works["second"])
        assert abs((served["first"] - before) - served["second"]) <= bound + 1e-6


def test_a_small_batch_does_not_wait_for_a_large_one_that_came_before() -> None:
    shares = Shares()
    large = [shares.enter("large", 1.0) for _ in range(1_000)]
    for start in large[:10]:
        shares.began(start)

    assert shares.enter("small", 1.0) <= large[10]


@given(st.integers(1, 30), st.floats(0.1, 3.0))
def test_a_batch_keeps_a_single_job_waiting_for_no_more_than_the_unit_in_progress(
    num_items: int, work_s: float
) -> None:
    batch = [Arrival(0.0, 5.0, batch="a") for _ in range(num_items)]
    single = Device("srpt", 2).serve([*batch, Arrival(1.5, work_s)])[-1]

    assert single.ended - single.turn.submitted <= work_s + 1.0 + 1e-6


def test_a_batch_gets_its_part_though_singles_never_cease() -> None:
    singles = [Arrival(1.0, 1.0) for _ in range(400)]
    item = Device("srpt", 2).serve([Arrival(0.0, 10.0, batch="a"), *singles])[0]

    assert item.ended <= PATIENCE_OF_LOW * STRETCH * 10.0 + 3.0


# Who begins


@given(jobs_of_any_kind, jobs_of_any_kind, st.integers(1, 12), st.sampled_from(["fifo", "srpt"]))
def test_next_to_start_is_the_first_that_waits_while_a_slot_is_free(
    waiting: list[Job], in_flight: list[Job], slots: int, policy: Policy
) -> None:
    index = next_to_start(waiting, in_flight, slots, policy, NOW)

    if not waiting:
        assert index is None
    elif len(in_flight) < slots:
        assert index == order(waiting, policy, NOW)[0]
    elif policy == "fifo" or len(in_flight) > slots:
        assert index is None
    elif index is not None:
        together = [*in_flight, *waiting]
        assert order(together, policy, NOW)[0] == len(in_flight) + index


def test_next_to_start_lets_one_short_job_overtake_where_long_ones_hold_all_slots() -> None:
    long, short = Job(a_turn(), 100.0), Job(a_turn(), 1.0)

    assert next_to_start([long, short], [long, long], 2, "srpt", NOW) == 1
    assert next_to_start([long, short], [long, long, short], 2, "srpt", NOW) is None
    assert next_to_start([long, short], [long, long], 2, "fifo", NOW) is None


# What clients are told


@given(jobs_of_any_kind, st.sampled_from(["fifo", "srpt"]))
def test_outlook_adds_up_the_work_of_all_that_go_before(jobs: list[Job], policy: Policy) -> None:
    prospects = outlook(jobs, policy, NOW)

    for before, index in enumerate(order(jobs, policy, NOW)):
        ahead = [jobs[i].remaining_s for i in order(jobs, policy, NOW)[: before + 1]]
        assert prospects[index].position == before + 1
        assert prospects[index].seconds_left == pytest.approx(sum(ahead))


# The model of work

SHAPE = (9, 64, 64)
WORK = Work(SHAPE, forwards=4, chunks=3)
LARGER = Work((81, 480, 832), forwards=4, chunks=21)


def test_work_of_a_clip_counts_its_forwards_and_chunks(
    make_parameters: Callable[..., GenerationParameters],
) -> None:
    assert work_of(make_parameters(guidance_scale=3.0)) == Work(SHAPE, forwards=2 * 4, chunks=3)
    assert work_of(make_parameters(guidance_scale=1.0, num_frames=81)).forwards == 4
    assert work_of(make_parameters(num_frames=81)).chunks == 21


def test_work_of_a_clip_counts_guidance_on_the_steps_of_its_interval_only(
    make_parameters: Callable[..., GenerationParameters],
) -> None:
    half = Levers(guidance_interval=(0.0, 0.5))

    assert work_of(make_parameters(preset="fast", levers=half)) == Work(SHAPE, forwards=4 + 2, chunks=3, preset="fast")
    assert work_of(make_parameters(preset="fast", levers=half, guidance_scale=1.0)).forwards == 4


def test_model_is_calibrated_once_it_has_seen_something() -> None:
    model = WorkModel()
    assert not model.is_calibrated

    model.saw_forwards(WORK, 1, 2.0)

    assert model.is_calibrated


def test_model_tells_long_jobs_from_short_ones_before_it_has_seen_any() -> None:
    model = WorkModel()

    assert 0 < model.seconds(WORK) < model.seconds(WORK._replace(forwards=50)) < model.seconds(LARGER)


def test_model_counts_a_chunk_as_a_step_until_one_was_decoded() -> None:
    model = WorkModel()
    model.saw_forwards(WORK, 1, 2.0)

    assert model.seconds(WORK) == pytest.approx((4 + 3) * 2.0)


def test_model_adds_up_steps_and_chunks_once_both_were_seen() -> None:
    model = WorkModel()
    model.saw_forwards(WORK, 1, 2.0)
    model.saw_chunk(WORK, 0.5)

    assert model.seconds(WORK) == pytest.approx(4 * 2.0 + 3 * 0.5)


def test_model_is_zero_when_nothing_is_left() -> None:
    model = WorkModel()
    model.saw_forwards(WORK, 1, 2.0)

    assert model.seconds(WORK._replace(forwards=0, chunks=0)) == 0.0


def test_model_follows_a_lasting_change_and_not_one_slow_step() -> None:
    model, step = WorkModel(), WORK._replace(forwards=1, chunks=0)
    model.saw_forwards(WORK, 1, 1.0)
    model.saw_forwards(WORK, 1, 11.0)
    after_one = model.seconds(step)
    for _ in range(20):
        model.saw_forwards(WORK, 1, 11.0)

    assert after_one < 6.0
    assert model.seconds(step) == pytest.approx(11.0, rel=0.01)


def test_model_carries_over_from_one_shape_to_another_by_tokens_and_pixels() -> None:
    model = WorkModel()
    model.saw_forwards(WORK, 1, 0.5)
    model.saw_chunk(WORK, 0.25)
    wider = Work((9, 64, 128), forwards=1, chunks=1)

    assert model.seconds(wider._replace(chunks=0)) == pytest.approx(2 * 0.5, rel=0.01)
    assert model.seconds(wider._replace(forwards=0)) == pytest.approx(2 * 0.25)
    assert model.seconds(WORK._replace(preset="fast", chunks=0)) == pytest.approx(4 * 0.5)


def test_model_keeps_averages_of_a_preset_apart_from_those_of_another() -> None:
    model = WorkModel()
    model.saw_forwards(WORK, 2, 1.0)
    model.saw_forwards(WORK._replace(preset="fast"), 2, 0.1)

    assert model.seconds(WORK._replace(chunks=0)) == pytest.approx(4 * 0.5)
    assert model.seconds(WORK._replace(preset="fast", chunks=0)) == pytest.approx(4 * 0.05)


def test_model_counts_attentions_quadratic_part() -> None:
    model = WorkModel()
    model.saw_forwards(LARGER, 1, 1.0)
    half = Work((41, 480, 832), forwards=1, chunks=0)

    assert model.seconds(half) < 0.45  # 11 of 21 latent frames, 17,160 of 32,760 tokens


def test_model_knows_a_shape_that_it_saw_better_than_its_units() -> None:
    model = WorkModel()
    model.saw_forwards(LARGER, 1, 3.0)
    model.saw_forwards(WORK, 1, 2.0)

    assert model.seconds(LARGER._replace(forwards=1, chunks=0)) == pytest.approx(3.0)


def test_model_learns_from_whole_jobs_what_it_would_from_their_parts() -> None:
    whole, parts = WorkModel(), WorkModel()
    whole.saw_job(WORK, denoise_s=8.0, decode_s=1.5)
    parts.saw_forwards(WORK, 1, 2.0)
    parts.saw_chunk(WORK, 0.5)

    assert whole.seconds(WORK) == pytest.approx(parts.seconds(WORK))
    assert whole.seconds(LARGER) == pytest.approx(parts.seconds(LARGER))


def test_model_learns_nothing_from_a_job_whose_device_time_is_not_known() -> None:
    model = WorkModel()
    model.saw_job(WORK, denoise_s=0.0, decode_s=0.0)

    assert not model.is_calibrated
