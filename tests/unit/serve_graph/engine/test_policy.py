"""Which work comes next: the promises of `next_work`, for any mix of jobs."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from serve_graph.engine.policy import Decode, Step, next_work


@dataclass(frozen=True)
class Job:
    """The least that the policy asks for."""

    shape: tuple[int, ...] = (9, 64, 64)
    num_tokens: int = 48
    travels_alone: bool = False
    is_decoding: bool = False


jobs_in_flight = st.lists(
    st.builds(
        Job,
        shape=st.sampled_from([(9, 64, 64), (17, 64, 64), (9, 64, 112)]),
        num_tokens=st.integers(1, 100),
        travels_alone=st.booleans(),
    ),
    min_size=1,
    max_size=10,
)
budgets = st.integers(1, 400)


@given(jobs_in_flight, budgets)
def test_next_work_keeps_to_the_budget_unless_a_job_alone_is_over_it(jobs: list[Job], budget: int) -> None:
    work = next_work(jobs, budget)

    assert isinstance(work, Step)
    tokens = sum(jobs[i].num_tokens for i in work.indices)
    assert len(work.indices) == 1 or tokens <= budget


@given(jobs_in_flight, budgets)
def test_next_work_is_led_by_the_oldest_and_takes_each_job_once(jobs: list[Job], budget: int) -> None:
    work = next_work(jobs, budget)

    assert isinstance(work, Step)
    assert work.indices[0] == 0
    assert list(work.indices) == sorted(set(work.indices))


@given(jobs_in_flight, budgets)
def test_next_work_leaves_loners_alone(jobs: list[Job], budget: int) -> None:
    work = next_work(jobs, budget)

    assert isinstance(work, Step)
    assert len(work.indices) == 1 or not any(jobs[i].travels_alone for i in work.indices)


@given(jobs_in_flight, budgets)
def test_next_work_never_mixes_shapes(jobs: list[Job], budget: int) -> None:
    work = next_work(jobs, budget)

    assert isinstance(work, Step)
    assert len({jobs[i].shape for i in work.indices}) == 1


@given(st.integers(1, 10), st.integers(1, 10))
def test_next_work_takes_along_all_that_fit_oldest_first(num_jobs: int, num_fitting: int) -> None:
    work = next_work([Job() for _ in range(num_jobs)], num_fitting * Job.num_tokens)

    assert work == Step(tuple(range(min(num_jobs, num_fitting))))


@given(jobs_in_flight, st.lists(st.just(Job(is_decoding=True)), min_size=1, max_size=3), st.data(), budgets)
def test_next_work_decodes_the_oldest_first_when_any_job_decodes(
    denoising: list[Job], decoding: list[Job], data: st.DataObject, budget: int
) -> None:
    jobs = data.draw(st.permutations([*denoising, *decoding]))

    assert next_work(jobs, budget) == Decode([job.is_decoding for job in jobs].index(True))


def test_next_work_is_none_when_no_job_is_in_flight() -> None:
    assert next_work([], 1) is None
