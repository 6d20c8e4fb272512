"""The client's calls, the same on the real service and on the scripted one, so that the script stays the contract."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from polling import until
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
def client(request: pytest.FixtureRequest, service: RunningService) -> Iterator[WanClient]:
    if request.param == "real":
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
    with pytest.raises(ApiProblem) as caught:
        client.batch(f"batch_{NOBODYS}")
    assert names(caught) == (404, "batch-not-found")


def test_batch_runs_to_its_end_and_its_results_come_in_order(client: WanClient, tmp_path: Path) -> None:
    requests = [GenerateRequest(prompt=f"circle {n}", num_inference_steps=2, seed=n) for n in range(4)]
    key = f"batch-{time.time_ns()}"
    batch = client.submit_batch(requests, key)
    assert (batch.total, client.submit_batch(requests, key).batch_id) == (4, batch.batch_id)
    until(lambda: client.batch(batch.batch_id).state == "ended", "the batch's end")
    batch = client.batch(batch.batch_id)

    results = list(client.batch_results(batch.batch_id))
    assert [(result.index, result.state) for result in results] == [(n, JobState.SUCCEEDED) for n in range(4)]
    assert [job.job_id for job in client.jobs(batch_id=batch.batch_id)] in (
        [result.job_id for result in results],
        [result.job_id for result in results][::-1],
    )
    assert batch.counts.succeeded == 4
    assert results[3].clip is not None
    assert holds(client.download(results[3].clip, tmp_path / "3.mp4"), results[3].clip)


def test_batch_can_be_cancelled(client: WanClient) -> None:
    batch = client.submit_batch([LONG] * 3)
    client.cancel_batch(batch.batch_id)
    until(lambda: client.batch(batch.batch_id).state == "ended", "the batch's end")

    assert client.batch(batch.batch_id).counts.cancelled >= 1
    assert client.cancel_batch(batch.batch_id).state == "ended"


def test_batch_with_a_wrong_request_is_refused_whole_and_named_by_its_index(client: WanClient) -> None:
    with pytest.raises(ApiProblem) as caught:
        client.submit_batch([SHORT, GenerateRequest(prompt="x", num_frames=80)])
    assert names(caught) == (422, "invalid-request")
    assert [error.field for error in caught.value.problem.errors or ()] == ["requests.1.num_frames"]


def test_batches_are_listed_newest_first(client: WanClient) -> None:
    made = [client.submit_batch([SHORT]).batch_id for _ in range(2)]

    assert [batch.batch_id for batch in client.batches()][:2] == made[::-1]


def test_models_and_health_are_typed(client: WanClient) -> None:
    client.ping()

    assert [model.name for model in client.models()] == ["wan-random"]
    assert client.health().status == "ok"
