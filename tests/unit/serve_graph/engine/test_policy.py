"""Which work comes next: the promises of `next_work`, for any mix of jobs."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.handoff import Standing
from serve_graph.engine.policy import MAX_OPEN_DECODES, Decode, Step, next_work
from serve_graph.scheduling import Policy, Turn, order

NOW = 100.0


@dataclass(frozen=True)
class Job:
    """The least that the policy asks for."""

    remaining_s: float = 1.0
    waited_s: float = 0.0
    company: tuple[int, int, int] = (9, 64, 64)
    num_tokens: int = 48
    travels_alone: bool = False
    is_decoding: bool = False
    has_open_decode: bool = False

    @property
    def turn(self) -> Turn:
        return Turn.of(Standing(waited_s=self.waited_s), NOW)


def jobs_that(**are: st.SearchStrategy[object]) -> st.SearchStrategy[Job]:
    return st.builds(
        Job,
        remaining_s=st.floats(0.1, 100.0),
        waited_s=st.floats(0.0, 100.0),
        company=st.sampled_from([(9, 64, 64), (17, 64, 64), (9, 64, 112)]),
        num_tokens=st.just(48),
        travels_alone=st.booleans(),
        **are,
    )


denoising = jobs_that()
decoding = st.one_of(
    jobs_that(is_decoding=st.just(True), has_open_decode=st.just(False)),
    jobs_that(is_decoding=st.just(True), has_open_decode=st.just(True)),
)
jobs_in_flight = st.lists(denoising, min_size=1, max_size=10)
jobs_in_any_phase = st.lists(st.one_of(denoising, decoding), min_size=1, max_size=10)
policies: st.SearchStrategy[Policy] = st.sampled_from(["fifo", "srpt"])
budgets = st.integers(1, 400)


@given(jobs_in_flight, budgets, policies)
def test_next_work_keeps_to_the_budget_unless_a_job_alone_is_over_it(
    jobs: list[Job], budget: int, policy: Policy
) -> None:
    work = next_work(jobs, budget, policy, NOW)

    assert isinstance(work, Step)
    tokens = sum(jobs[i].num_tokens for i in work.indices)
    assert len(work.indices) == 1 or tokens <= budget


@given(jobs_in_flight, budgets, policies)
def test_next_work_is_led_by_the_first_in_order_and_takes_others_along_in_theirs(
    jobs: list[Job], budget: int, policy: Policy
) -> None:
    work = next_work(jobs, budget, policy, NOW)
    ordered = order(jobs, policy, NOW)

    assert isinstance(work, Step)
    assert work.indices[0] == ordered[0]
    assert all(ordered.index(before) < ordered.index(after) for before, after in pairwise(work.indices))


@given(jobs_in_any_phase, budgets)
def test_next_work_under_srpt_is_for_the_first_in_order_whatever_its_phase(jobs: list[Job], budget: int) -> None:
    work = next_work(jobs, budget, "srpt", NOW)
    first = order(jobs, "srpt", NOW)[0]

    if not jobs[first].is_decoding:
        assert isinstance(work, Step)
        assert work.indices[0] == first
    else:
        assert isinstance(work, Decode)
        num_open = sum(job.has_open_decode for job in jobs)
        assert work.index == first or (num_open >= MAX_OPEN_DECODES and jobs[work.index].has_open_decode)


@given(jobs_in_any_phase, budgets)
def test_next_work_under_srpt_opens_no_more_decodes_than_may_be_open(jobs: list[Job], budget: int) -> None:
    work = next_work(jobs, budget, "srpt", NOW)

    if isinstance(work, Decode) and not jobs[work.index].has_open_decode:
        assert sum(job.has_open_decode for job in jobs) < MAX_OPEN_DECODES


@given(jobs_in_any_phase, budgets, policies)
def test_next_work_leaves_loners_alone(jobs: list[Job], budget: int, policy: Policy) -> None:
    work = next_work(jobs, budget, policy, NOW)

    if isinstance(work, Step):
        assert len(work.indices) == 1 or not any(jobs[i].travels_alone for i in work.indices)


@given(jobs_in_any_phase, budgets, policies)
def test_next_work_steps_only_jobs_of_one_shape_that_denoise(jobs: list[Job], budget: int, policy: Policy) -> None:
    work = next_work(jobs, budget, policy, NOW)

    if isinstance(work, Step):
        assert len({jobs[i].company for i in work.indices}) == 1
        assert not any(jobs[i].is_decoding for i in work.indices)


@pytest.mark.parametrize("policy", ["fifo", "srpt"])
@given(st.integers(1, 10), st.integers(1, 10))
def test_next_work_takes_along_all_that_fit(policy: Policy, num_jobs: int, num_fitting: int) -> None:
    work = next_work([Job() for _ in range(num_jobs)], num_fitting * Job.num_tokens, policy, NOW)

    assert work == Step(tuple(range(min(num_jobs, num_fitting))))


@given(jobs_in_any_phase, decoding, st.data(), budgets)
def test_next_work_under_fifo_decodes_the_oldest_first_when_any_job_decodes(
    jobs: list[Job], decodes: Job, data: st.DataObject, budget: int
) -> None:
    jobs = data.draw(st.permutations([*jobs, decodes]))

    work = next_work(jobs, budget, "fifo", NOW)

    assert isinstance(work, Decode)
    assert jobs[work.index].waited_s == max(job.waited_s for job in jobs if job.is_decoding)


def test_next_work_under_srpt_lets_a_short_job_between_two_chunks_of_a_long_decode() -> None:
    long = Job(remaining_s=20.0, is_decoding=True, has_open_decode=True)

    assert next_work([long, Job(remaining_s=2.0)], 400, "srpt", NOW) == Step((1,))
    assert next_work([long, Job(remaining_s=2.0)], 400, "fifo", NOW) == Decode(0)


@pytest.mark.parametrize("policy", ["fifo", "srpt"])
def test_next_work_is_none_when_no_job_is_in_flight(policy: Policy) -> None:
    assert next_work([], 1, policy, NOW) is None
