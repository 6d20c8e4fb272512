"""POST /generate, GET /jobs/{job_id} and GET /outputs/{clip_id}: the way of a prompt to its clip."""

import asyncio
import hashlib
from contextlib import suppress
from datetime import timedelta
from urllib.parse import urlsplit

import httpx
import pytest
from answers import assert_nothing_of_the_inside, problem_of
from api_under_test import Api
from hypothesis import example, given
from hypothesis import strategies as st
from support import CLIP_BYTES, PATIENCE_S, PROGRESS, PUBLIC_URL

from schemas.clips import Clip
from schemas.errors import OutOfMemory, RecordedFailure
from schemas.jobs import Job, JobState
from serve_graph.api.prefer import RESPOND_ASYNC, Preference

OTHER_PREFERENCES = st.sampled_from(
    ["", " ", "wait=soon", "return=minimal", "respond-asynchronously", "no-respond-async", "foo;respond-async"]
)
PREFERENCES = OTHER_PREFERENCES | st.text(st.characters(exclude_characters=","), max_size=12)

PROMPT = "a red circle moving left"
ASYNC = {"prefer": "respond-async"}


async def generate(api: Api, **fields: object) -> Clip:
    answer = await api.http.post("/generate", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 200, answer.text
    return Clip.model_validate_json(answer.content)


async def submit(api: Api) -> Job:
    answer = await api.http.post("/generate", json={"prompt": PROMPT}, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    return Job.model_validate_json(answer.content)


async def job_once_done(api: Api, job_id: str) -> Job:
    """The job as `GET /jobs/{job_id}` answers it when it has ended."""
    with suppress(RecordedFailure):
        async with asyncio.timeout(PATIENCE_S):
            await api.jobs.service.wait(job_id)
    return Job.model_validate_json((await api.http.get(f"/jobs/{job_id}")).content)


async def test_generate_answers_the_clip_and_its_url_gives_the_bytes(api: Api) -> None:
    answer = await api.http.post("/generate", json={"prompt": PROMPT, "seed": 7, "duration": 1})

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    clip = Clip.model_validate_json(answer.content)
    assert (clip.prompt, clip.seed, clip.num_frames, clip.duration) == (PROMPT, 7, 17, 1.0)
    assert clip.request_id == answer.headers["x-request-id"]
    assert clip.output_url.startswith(PUBLIC_URL + "/outputs/")
    video = await api.http.get(clip.output_url)
    assert video.status_code == 200
    assert hashlib.sha256(video.content).hexdigest() == clip.sha256
    assert len(video.content) == clip.size_bytes


async def test_generate_reports_the_seed_that_it_drew(api: Api) -> None:
    first, second = await generate(api), await generate(api)

    assert first.seed != second.seed
    assert api.jobs.record(first.job_id).parameters.seed == first.seed


async def test_generate_signs_for_as_long_as_the_request_asks(api: Api) -> None:
    clip = await generate(api, url_ttl_s=5)

    assert clip.expires_at == api.jobs.clock.now + timedelta(seconds=5)
    api.jobs.clock.forward(5)
    problem_of(await api.http.get(clip.output_url), 403, "url-expired")


async def test_generate_makes_its_urls_from_the_public_address_and_not_from_the_host_header(api: Api) -> None:
    answer = await api.http.post("/generate", json={"prompt": PROMPT}, headers={"host": "evil.test"})
    again = await api.http.get(f"/outputs/{answer.json()['clip_id']}", headers={"host": "evil.test"})

    assert answer.json()["output_url"].startswith(PUBLIC_URL)
    assert again.headers["location"].startswith(PUBLIC_URL)


@pytest.mark.parametrize(
    "prefer",
    ["respond-async", "Respond-Async", "wait=soon, respond-async", "respond-async;x=1", "foo,respond-async ,bar"],
)
async def test_generate_answers_the_job_at_once_when_asked_to(api: Api, prefer: str) -> None:
    gate = api.jobs.worker.gates["prepare"]
    gate.close()
    answer = await api.http.post("/generate", json={"prompt": PROMPT}, headers={"prefer": prefer})

    assert answer.status_code == 202
    job = Job.model_validate_json(answer.content)
    assert answer.headers["location"] == f"/jobs/{job.job_id}"
    assert answer.headers["preference-applied"] == "respond-async"
    assert not job.state.is_terminal
    assert job.clip is None
    assert job.request_id == answer.headers["x-request-id"]
    gate.open()
    assert (await job_once_done(api, job.job_id)).state is JobState.SUCCEEDED


async def test_generate_sees_a_preference_in_a_second_header_line(api: Api) -> None:
    headers = [("prefer", "handling=strict"), ("prefer", "respond-async")]
    answer = await api.http.post("/generate", json={"prompt": PROMPT}, headers=headers)

    assert answer.status_code == 202
    await job_once_done(api, answer.json()["job_id"])


@pytest.mark.parametrize("prefer", ["", "wait=soon", "respond-asynchronously", "no-respond-async", "return=minimal"])
async def test_generate_waits_for_any_other_preference(api: Api, prefer: str) -> None:
    answer = await api.http.post("/generate", json={"prompt": PROMPT}, headers={"prefer": prefer})

    assert answer.status_code == 200
    assert "preference-applied" not in answer.headers


@given(
    before=st.lists(PREFERENCES, max_size=3),
    after=st.lists(PREFERENCES, max_size=3),
    name=st.sampled_from(["respond-async", "Respond-Async", "RESPOND-ASYNC"]),
    space=st.sampled_from(["", " ", "\t "]),
    parameter=st.sampled_from(["", ";x=1", " ; x", ";"]),
)
def test_respond_async_is_seen_wherever_it_stands(
    before: list[str], after: list[str], name: str, space: str, parameter: str
) -> None:
    preferences = [*before, f"{space}{name}{parameter}{space}", *after]
    assert Preference.of([",".join(preferences)]) == Preference(0.0, RESPOND_ASYNC)
    assert Preference.of(preferences) == Preference(0.0, RESPOND_ASYNC)


@given(st.lists(OTHER_PREFERENCES | st.text(max_size=20), max_size=4))
@example(["respond", "-async"])
@example(["\u017frespond-async"])
def test_nothing_else_is_respond_async(lines: list[str]) -> None:
    said = [preference.split(";")[0].strip().lower() for line in lines for preference in line.split(",")]
    assert (Preference.of(lines).applied == RESPOND_ASYNC) is ("respond-async" in said)


async def test_job_shows_its_progress_and_then_its_clip(api: Api) -> None:
    gate = api.jobs.worker.gates["running"]
    gate.close()
    job = await submit(api)
    await gate.reached()

    running = Job.model_validate_json((await api.http.get(f"/jobs/{job.job_id}")).content)
    assert running.state is JobState.RUNNING
    assert running.progress == PROGRESS
    gate.open()
    done = await job_once_done(api, job.job_id)
    assert done.clip is not None
    assert done.clip.job_id == job.job_id
    assert (await api.http.get(done.clip.output_url)).content == CLIP_BYTES


async def test_job_that_failed_is_a_200_that_holds_the_problem(api: Api) -> None:
    api.jobs.worker.failures["running"] = OutOfMemory()
    job = await submit(api)

    done = await job_once_done(api, job.job_id)
    assert done.state is JobState.FAILED
    assert done.error == OutOfMemory().problem(job_id=job.job_id)
    assert done.clip is None


async def test_output_redirects_to_a_url_that_is_signed_anew(api: Api) -> None:
    clip = await generate(api)
    api.jobs.clock.forward(60)
    answer = await api.http.get(f"/outputs/{clip.clip_id}")

    assert answer.status_code == 307
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["location"] != clip.output_url
    assert (await api.http.get(answer.headers["location"])).content == CLIP_BYTES


async def test_output_answers_head_as_get(api: Api) -> None:
    clip = await generate(api)
    answer = await api.http.head(f"/outputs/{clip.clip_id}")

    assert answer.status_code == 307
    assert answer.content == b""
    assert (await api.http.get(answer.headers["location"])).content == CLIP_BYTES


async def test_output_is_not_found_while_the_job_runs(api: Api) -> None:
    gate = api.jobs.worker.gates["running"]
    gate.close()
    job = await submit(api)
    await gate.reached()
    clip_id = job.job_id.replace("job_", "clip_")

    problem_of(await api.http.get(f"/outputs/{clip_id}"), 404, "clip-not-found")
    gate.open()
    await job_once_done(api, job.job_id)


async def test_models_answers_what_may_be_asked_for(api: Api) -> None:
    (model,) = (await api.http.get("/models")).json()

    assert model["name"] == "wan-random"
    assert {"width": 64, "height": 64}.items() <= model["resolutions"][0].items()


async def test_answers_tell_nothing_of_the_inside(api: Api) -> None:
    answers: list[httpx.Response] = [await api.http.post("/generate", json={"prompt": PROMPT})]
    clip = Clip.model_validate_json(answers[0].content)
    for path in (f"/jobs/{clip.job_id}", f"/outputs/{clip.clip_id}", "/models", "/health/live", "/health/ready"):
        answers.append(await api.http.get(path))
    answers.append(await api.http.get(urlsplit(clip.output_url).path))

    for answer in answers:
        assert_nothing_of_the_inside(answer, api.jobs.store.folder)
