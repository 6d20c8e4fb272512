"""Lists of jobs: pages over all states, newest first, each job once. The records are written without a service."""

import pytest
from processes import PATHS, recorded, running
from support import Jobs

from schemas.errors import InvalidRequest
from schemas.jobs import Job, JobState, new_job_id
from serve_graph.api_keys import NOBODY, Principal
from storage.job_records import entry_of


async def pages(
    jobs: Jobs, limit: int, *, state: JobState | None = None, principal: Principal = NOBODY
) -> list[list[Job]]:
    """All pages, each as it is asked for with the cursor of the one before."""
    found, after = [], None
    while True:
        page = await jobs.service.jobs(principal, state=state, limit=limit, after=after)
        found.append(list(page.jobs))
        assert len(page.jobs) <= limit
        if page.next_cursor is None:
            return found
        after = page.next_cursor


def ids(found: list[list[Job]]) -> list[str]:
    return [job.job_id for page in found for job in page]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7, 12, 13, 100])
async def test_pages_hold_each_job_of_every_state_once_newest_first(jobs: Jobs, limit: int) -> None:
    made = [recorded(jobs, state, age) for age, state in enumerate([*PATHS, *PATHS])]

    found = await pages(jobs, limit)
    assert ids(found) == made
    assert [len(page) for page in found[:-1]] == [limit] * (len(found) - 1)
    assert found[-1] != []


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_jobs_of_the_same_moment_are_each_listed_once(jobs: Jobs, limit: int) -> None:
    made = [recorded(jobs, state, 0) for state in [*PATHS, *PATHS]]

    assert ids(await pages(jobs, limit)) == sorted(made)


@pytest.mark.parametrize("limit", [1, 2, 4, 50])
async def test_a_state_s_list_holds_its_jobs_only(jobs: Jobs, limit: int) -> None:
    made = [(state, recorded(jobs, state, age)) for age, state in enumerate([*PATHS] * 3)]

    for state in PATHS:
        assert ids(await pages(jobs, limit, state=state)) == [job_id for at, job_id in made if at is state]
    assert await pages(jobs, limit, state=JobState.DELETED) == [[]]


async def test_an_ended_job_that_is_still_active_is_listed_once(jobs: Jobs) -> None:
    """A crash may leave it in both indexes, or in the active one only."""
    both, unfiled = recorded(jobs, JobState.FAILED, 1), recorded(jobs, JobState.SUCCEEDED, 2, filed=False)
    jobs.store.put("active/anonymous/" + entry_of(jobs.record(both)), b"")

    assert ids(await pages(jobs, 1)) == [both, unfiled]


async def test_each_principal_has_a_list_of_its_own(jobs: Jobs) -> None:
    names = ["alice", "alice.b", "alice-b", "a"]
    made = {name: recorded(jobs, JobState.FAILED, 1, principal=name) for name in names}
    made |= {name + "'s other": recorded(jobs, JobState.QUEUED, 2, principal=name) for name in names}

    for name in names:
        assert ids(await pages(jobs, 1, principal=Principal(name))) == [made[name], made[name + "'s other"]]
    assert await pages(jobs, 5) == [[]]


async def test_a_cursor_outlives_the_job_that_it_names(jobs: Jobs) -> None:
    made = [recorded(jobs, JobState.FAILED, age) for age in range(4)]
    first = await jobs.service.jobs(limit=2)
    await jobs.service.delete(made[1])

    rest = await jobs.service.jobs(limit=2, after=first.next_cursor)
    assert [job.job_id for job in rest.jobs] == made[2:]


async def test_jobs_that_come_meanwhile_shift_no_page(jobs: Jobs) -> None:
    made = [recorded(jobs, JobState.FAILED, age) for age in range(4)]
    first = await jobs.service.jobs(limit=2)
    recorded(jobs, JobState.FAILED, -1)

    rest = await jobs.service.jobs(limit=2, after=first.next_cursor)
    assert [job.job_id for job in rest.jobs] == made[2:]


@pytest.mark.parametrize("cursor", ["", "x", "0" * 11, "../jobs", "00000000000-job_x", "%00", "z" * 9_999])
async def test_a_cursor_that_is_none_is_refused(jobs: Jobs, cursor: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await jobs.service.jobs(after=cursor)
    assert [error.field for error in refusal.value.errors] == ["after"]


async def test_an_entry_that_leads_nowhere_is_passed_over(jobs: Jobs) -> None:
    made = [recorded(jobs, JobState.FAILED, age) for age in range(3)]
    jobs.store.delete(f"jobs/{made[1]}.json")
    jobs.store.put("active/anonymous/" + entry_of(jobs.record(made[0])).replace(made[0], new_job_id()), b"")

    for limit in (1, 2, 3):
        assert ids(await pages(jobs, limit)) == [made[0], made[2]]


async def test_a_running_job_is_listed_with_its_progress(jobs: Jobs) -> None:
    record = await running(jobs)
    (job,) = (await jobs.service.jobs(state=JobState.RUNNING)).jobs
    assert job.progress is not None
    jobs.worker.gates["running"].open()
    await jobs.service.wait(record.job_id)

    (job,) = (await jobs.service.jobs()).jobs
    assert job.clip is not None
