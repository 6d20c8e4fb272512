"""Jobs on the real service: asynchronous, idempotent, cancelled, listed."""

import time
from collections.abc import Callable

import httpx
from async_jobs import PROMPT, events, submit
from prometheus_client.parser import text_string_to_metric_families
from service import RunningService

from schemas.clips import Clip
from schemas.jobs import Job, JobState


def job_of(http: httpx.Client, job_id: str) -> Job:
    answer = http.get(f"/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    return Job.model_validate_json(answer.content)


def steps(http: httpx.Client) -> dict[str, float]:
    """Forwards with the condition (one per step of one job), and steps of jobs that came to nothing."""
    found = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == "wan_forwards_total" and sample.labels["kind"] == "cond":
                found["taken"] = sample.value
            if sample.name.startswith("wan_steps_wasted") or sample.name == "wan_wasted_steps_total":
                found["wasted"] = sample.value
    return found


def test_events_tell_of_every_state_and_of_progress(service: RunningService) -> None:
    with service.client() as http:
        job = submit(http, num_inference_steps=40, num_frames=33)
        seen = list(events(http, job.job_id))
        assert seen[-1].state is JobState.SUCCEEDED
        assert seen[-1].clip is not None
        states = [job.state for job in seen]
        assert states == sorted(states, key=list(JobState).index)
        steps_seen = [job.progress.step for job in seen if job.progress and job.progress.stage == "denoise"]
        assert steps_seen == sorted(steps_seen)
        assert list(events(http, job.job_id)) == [job_of(http, job.job_id)] or len(list(events(http, job.job_id))) == 1


def test_the_same_key_gives_the_same_job_and_another_body_is_refused(service: RunningService) -> None:
    with service.client() as http:
        first = submit(http, "key-1", seed=3)
        headers = {"Idempotency-Key": "key-1"}
        clip = Clip.model_validate_json(
            http.post("/generate", json={"prompt": PROMPT, "seed": 3}, headers=headers).content
        )
        assert clip.job_id == first.job_id
        other = http.post("/generate", json={"prompt": PROMPT, "seed": 4}, headers=headers)
        assert (other.status_code, other.json()["type"]) == (422, "urn:wan-serve:problem:idempotency-mismatch")


def test_wait_gives_the_clip_in_time_or_else_the_job(service: RunningService) -> None:
    with service.client() as http:
        quick = http.post("/generate", json={"prompt": PROMPT}, headers={"Prefer": "wait=60"})
        assert quick.status_code == 200
        long = {"num_inference_steps": 100, "num_frames": 81}
        others = [submit(http, **long) for _ in range(6)]  # so that it can't be done in a second
        late = http.post("/generate", json={"prompt": PROMPT, **long}, headers={"Prefer": "wait=1"})
        assert (late.status_code, late.headers["preference-applied"]) == (202, "wait=1")
        ids = [*(job.job_id for job in others), late.json()["job_id"]]
        assert late.headers["location"] == f"/jobs/{ids[-1]}"
        for job_id in reversed(ids):
            http.post(f"/jobs/{job_id}/cancel")
        assert job_of(http, ids[-1]).state is JobState.CANCELLED


def steps_at_rest(http: httpx.Client) -> dict[str, float]:
    """Once the engine has counted those of jobs that other tests have cancelled."""
    last = steps(http)
    while True:
        time.sleep(0.3)  # counters say that they rest by not moving
        now = steps(http)
        if now == last:
            return now
        last = now


def test_cancel_in_the_middle_wastes_at_most_one_more_step(
    service: RunningService, tell: Callable[[str, str], None]
) -> None:
    with service.client() as http:
        before = steps_at_rest(http)
        job = submit(http, num_inference_steps=100, num_frames=81)
        reached = 0
        for seen in events(http, job.job_id):
            reached = seen.progress.step if seen.progress else 0
            if reached >= 5:
                break
        cancelled = http.post(f"/jobs/{job.job_id}/cancel")
        answered = steps(http)
        assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
        assert http.post(f"/jobs/{job.job_id}/cancel").json() == cancelled.json()
        time.sleep(1)  # were the engine still at it, it would take steps now
        after = steps(http)
        late = after["taken"] - answered["taken"]
        wasted = after["wasted"] - before["wasted"]
        assert late <= 1
        assert reached <= wasted < 100
    tell("faults", f"cancelled after step {reached} of 100: {wasted:g} steps wasted, {late:g} after the answer")


def test_jobs_are_listed_and_deleted(service: RunningService) -> None:
    with service.client() as http:
        made = [submit(http, seed=n) for n in range(3)]
        for job in made:
            list(events(http, job.job_id))
        page = http.get("/jobs", params={"limit": 2, "state": "succeeded"}).json()
        assert [job["job_id"] for job in page["jobs"]] == [made[2].job_id, made[1].job_id]
        rest = http.get("/jobs", params={"limit": 1, "after": page["next_cursor"]}).json()
        assert [job["job_id"] for job in rest["jobs"]] == [made[0].job_id]
        clip_id = page["jobs"][0]["clip"]["clip_id"]
        url = page["jobs"][0]["clip"]["output_url"]
        assert http.delete(f"/jobs/{made[2].job_id}").status_code == 204
        assert http.get(f"/jobs/{made[2].job_id}").json()["type"].endswith("job-gone")
        assert http.get(f"/outputs/{clip_id}").json()["type"].endswith("clip-gone")
        assert http.get(url).status_code == 404
        assert http.delete(f"/jobs/{made[2].job_id}").status_code == 410
