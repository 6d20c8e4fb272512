"""The client's calls, the same on the real service and on the scripted one, so that the script stays the contract."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted.service import scripted_service

from schemas.jobs import Job, JobState
from schemas.requests import GenerateRequest
from serve_graph.client import ApiProblem, WanClient
from serve_graph.client.files import holds
from serve_graph.client.wan_client import clip_of
from tests.integration.service import RunningService

SHORT = GenerateRequest(prompt="a red circle moving left", num_inference_steps=2)
LONG = GenerateRequest(prompt="a long one", num_frames=81, num_inference_steps=100)
NOBODYS = "0" * 32


@pytest.fixture(params=["real", "scripted"])
def client(request: pytest.FixtureRequest) -> Iterator[WanClient]:
    if request.param == "real":
        service: RunningService = request.getfixturevalue("service")
        with WanClient(service.base) as client:
            yield client
    else:
        with scripted_service() as scripted, WanClient(scripted.base) as client:
            yield client


def names(error: pytest.ExceptionInfo[ApiProblem]) -> tuple[int, str]:
    return error.value.problem.status, error.value.problem.name


def test_generate_gives_a_clip_that_can_be_downloaded(client: WanClient, tmp_path: Path) -> None:
    seen: list[Job] = []
    clip = client.generate(SHORT, seen.append)

    assert client.download(clip, tmp_path / "clip.mp4") == tmp_path / "clip.mp4"
    assert holds(tmp_path / "clip.mp4", clip)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert seen[-1].state is JobState.SUCCEEDED
    assert seen[0].job_id == clip.job_id


def test_submit_with_the_same_key_gives_the_same_job_and_refuses_another_body(client: WanClient) -> None:
    key = f"key-{time.time_ns()}"
    first = client.submit(SHORT, key)
    client.wait(first.job_id)

    assert client.submit(SHORT, key).job_id == first.job_id
    with pytest.raises(ApiProblem) as caught:
        client.submit(LONG, key)
    assert names(caught) == (422, "idempotency-mismatch")


def test_jobs_lists_the_newest_first_across_pages_and_by_state(client: WanClient) -> None:
    made = [client.submit(SHORT).job_id for _ in range(3)]
    for job_id in made:
        client.wait(job_id)

    found = [job.job_id for job in client.jobs()]
    assert found[:3] == made[::-1]
    assert len(found) == len(set(found))
    assert made[-1] == next(client.jobs(state=JobState.SUCCEEDED)).job_id
    assert made[-1] not in [job.job_id for job in client.jobs(state=JobState.FAILED)]


def test_cancel_ends_a_job_and_changes_nothing_the_second_time(client: WanClient) -> None:
    job = client.submit(LONG)
    client.cancel(job.job_id)
    ended = client.wait(job.job_id)

    assert ended.state is JobState.CANCELLED
    assert client.cancel(job.job_id).state is JobState.CANCELLED
    with pytest.raises(ApiProblem) as caught:
        clip_of(ended)
    assert names(caught) == (409, "job-cancelled")


def test_delete_is_for_ended_jobs_and_may_be_repeated(client: WanClient) -> None:
    running = client.submit(LONG)
    with pytest.raises(ApiProblem) as caught:
        client.delete(running.job_id)
    assert names(caught) == (409, "job-not-ended")
    client.cancel(running.job_id)
    client.wait(running.job_id)

    client.delete(running.job_id)
    client.delete(running.job_id)
    with pytest.raises(ApiProblem) as caught:
        client.job(running.job_id)
    assert names(caught) == (410, "job-gone")


def test_unknown_ids_are_problems(client: WanClient) -> None:
    with pytest.raises(ApiProblem) as caught:
        client.wait(f"job_{NOBODYS}")
    assert names(caught) == (404, "job-not-found")


def test_models_and_health_are_typed(client: WanClient) -> None:
    client.ping()

    assert [model.name for model in client.models()] == ["wan-tiny"]
    assert client.health().status == "ok"
