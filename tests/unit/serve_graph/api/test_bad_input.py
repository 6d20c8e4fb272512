"""Every way to send a bad request: its status, its problem, the field and what would have been legal."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from answers import problem_of
from api_under_test import MAX_BODY_BYTES, Api, send_raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_wan import RANDOM_WAN

from schemas.errors import (
    FieldError,
    InternalError,
    ModelNotReady,
    OutOfMemory,
    PromptTooLong,
    RenderFailed,
    StoreFull,
    StoreUnavailable,
    WanError,
    WorkerLost,
)
from schemas.jobs import JobState
from schemas.requests import MAX_PROMPT_CHARS

JSON = {"content-type": "application/json"}
PROMPT = "a secret otter in a red boat"
HUGE = "1" + "0" * 400


async def send(api: Api, body: bytes | str, content_type: str | None = "application/json") -> httpx.Response:
    headers = {} if content_type is None else {"content-type": content_type}
    return await api.http.post("/generate", content=body, headers=headers)


async def refused_fields(api: Api, body: bytes | str) -> dict[str, FieldError]:
    problem = problem_of(await send(api, body), 422, "invalid-request")
    assert problem.errors
    assert api.jobs.job_records() == []
    return {error.field: error for error in problem.errors}


@pytest.mark.parametrize(
    "prompt",
    [
        '""',
        '" \\t\\n\\u2003"',
        json.dumps("x" * (MAX_PROMPT_CHARS + 1)),
        "5",
        "null",
        "true",
        '["a"]',
        '{"a": 1}',
        '"a\\u0000b"',
        '"a\\ud800b"',
    ],
    ids=["empty", "blank", "oversized", "number", "null", "boolean", "list", "object", "NUL", "surrogate"],
)
async def test_generate_refuses_a_bad_prompt(api: Api, prompt: str) -> None:
    assert set(await refused_fields(api, f'{{"prompt": {prompt}}}')) == {"prompt"}


async def test_generate_refuses_a_missing_prompt(api: Api) -> None:
    assert set(await refused_fields(api, "{}")) == {"prompt"}


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ('"num_frames": "17"', "num_frames"),
        ('"num_frames": 17.0', "num_frames"),
        ('"num_frames": true', "num_frames"),
        ('"num_frames": 80', "num_frames"),
        (f'"num_frames": {HUGE}', "num_frames"),
        ('"duration": "1"', "duration"),
        ('"duration": true', "duration"),
        ('"duration": NaN', "duration"),
        ('"duration": Infinity', "duration"),
        ('"duration": 1e999', "duration"),
        ('"duration": 1.01', "duration"),
        (f'"duration": {HUGE}', "duration"),
        ('"seed": -1', "seed"),
        ('"seed": 9007199254740992', "seed"),
        ('"fps": 17', "fps"),
        ('"resolution": "720p"', "resolution"),
        ('"resolution": "128p", "aspect_ratio": "16:9"', "aspect_ratio"),
        ('"num_inference_steps": 101', "num_inference_steps"),
        (f'"num_inference_steps": {HUGE}', "num_inference_steps"),
        ('"guidance_scale": -Infinity', "guidance_scale"),
        ('"guidance_scale": 21', "guidance_scale"),
        ('"flow_shift": 0', "flow_shift"),
    ],
)
async def test_generate_refuses_a_field_and_says_what_is_legal(api: Api, fields: str, refused: str) -> None:
    errors = await refused_fields(api, f'{{"prompt": "a", {fields}}}')

    assert set(errors) == {refused}
    legal = RANDOM_WAN.legal(refused)
    assert legal
    assert errors[refused].legal == legal
    assert legal in errors[refused].message


@pytest.mark.parametrize("url", ["", "/hook", "https://u:hunter2@a.example/", "http://0x7f.1/", "https://a.example/#b"])
async def test_generate_refuses_a_webhook_url_that_is_none_and_quotes_nothing(api: Api, url: str) -> None:
    errors = await refused_fields(api, json.dumps({"prompt": "a", "webhook_url": url}))

    assert set(errors) == {"webhook_url"}
    assert "hunter2" not in errors["webhook_url"].message


async def test_generate_names_the_nearest_frame_counts(api: Api) -> None:
    errors = await refused_fields(api, '{"prompt": "a", "num_frames": 80}')

    assert errors["num_frames"].nearest == (77, 81)


async def test_generate_refuses_a_size_that_the_model_does_not_have(api: Api) -> None:
    errors = await refused_fields(api, '{"prompt": "a", "width": 100, "height": 100}')

    assert set(errors) == {"width", "height"}
    assert all("64x64" in (error.legal or "") for error in errors.values())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ('"duration": 1, "num_frames": 17', ("duration", "num_frames")),
        ('"width": 64', ("width", "height")),
        ('"width": 64, "height": 64, "resolution": "64p"', ("resolution", "width", "height")),
    ],
)
async def test_generate_names_the_fields_that_exclude_each_other(api: Api, fields: str, says: tuple[str, ...]) -> None:
    errors = await refused_fields(api, f'{{"prompt": "a", {fields}}}')

    assert set(errors) == {"body"}
    assert all(name in errors["body"].message for name in says)


async def test_generate_names_every_mistake_at_once(api: Api) -> None:
    errors = await refused_fields(api, '{"prompt": 5, "seed": -1, "frames": 3}')

    assert set(errors) == {"prompt", "seed", "frames"}


@pytest.mark.parametrize("name", ["frames", "body", "Prompt", "__proto__", "", "a.b", "x" * 5_000, "пример"])
async def test_generate_refuses_an_unknown_field(api: Api, name: str) -> None:
    (error,) = (await refused_fields(api, json.dumps({"prompt": "a", name: 1}))).values()

    assert error.field == (name[:64] or "body")
    assert error.message == "is not a field of this request"


@pytest.mark.parametrize("name", ["\\ud800", "\\u0000", "a\\udfffb"])
async def test_generate_refuses_an_unknown_field_whose_name_is_no_text(api: Api, name: str) -> None:
    assert len(await refused_fields(api, f'{{"prompt": "a", "{name}": 1}}')) == 1


async def test_generate_names_a_bounded_number_of_unknown_fields(api: Api) -> None:
    body = json.dumps({"prompt": "a", **{f"f{n}": 1 for n in range(5_000)}})
    answer = await send(api, body)

    problem_of(answer, 422, "invalid-request")
    assert len(answer.content) < 16 * 1024


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": "a"',
        "not json",
        "{'prompt': 'a'}",
        '{"prompt": "a"}}',
        '{"prompt": "a", "seed": 01}',
        '{"prompt": "' + "\x01" + '"}',
        b'{"prompt": "\xff\xfe"}',
        b"\xff",
        b"\x00",
        "[" * 60_000,
        '{"prompt": ' * 5_000,
        '{"prompt": "a", "seed": 1' + "0" * 5_000 + "}",
    ],
    ids=[
        *("cut off", "text", "quotes", "too long", "leading zero", "control", "UTF-8", "byte", "NUL"),
        *("deep list", "deep object", "huge integer"),
    ],
)
async def test_generate_refuses_a_body_that_is_not_json(api: Api, body: bytes | str) -> None:
    assert set(await refused_fields(api, body)) == {"body"}


@pytest.mark.parametrize("body", ["null", "5", '"a prompt"', "[]", '[{"prompt": "a"}]', "true", "NaN"])
async def test_generate_refuses_a_body_that_is_not_an_object(api: Api, body: str) -> None:
    assert set(await refused_fields(api, body)) == {"body"}


async def test_generate_refuses_a_deeply_nested_value(api: Api) -> None:
    deep = "[" * 500 + "]" * 500

    assert set(await refused_fields(api, f'{{"prompt": {deep}}}')) == {"prompt"}


async def test_generate_refuses_an_empty_body(api: Api) -> None:
    assert set(await refused_fields(api, "")) == {"body"}


@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "video/mp4", "@"],
)
async def test_generate_refuses_another_content_type(api: Api, content_type: str | None) -> None:
    problem = problem_of(await send(api, '{"prompt": "a"}', content_type), 422, "invalid-request")

    assert problem.errors is not None
    assert [error.field for error in problem.errors] == ["body"]
    assert "application/json" in problem.detail


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.x+json"]
)
async def test_generate_takes_any_spelling_of_json(api: Api, content_type: str) -> None:
    assert (await send(api, '{"prompt": "a"}', content_type)).status_code == 200


async def test_refusal_does_not_repeat_the_prompt(api: Api) -> None:
    answer = await send(api, json.dumps({"prompt": PROMPT, "negative_prompt": [PROMPT], "num_frames": 80}))

    problem_of(answer, 422, "invalid-request")
    assert "otter" not in answer.text


# ---- 413


async def test_generate_refuses_a_large_body_by_its_content_length(api: Api) -> None:
    answer = await send(api, json.dumps({"prompt": "x" * MAX_BODY_BYTES}))

    assert str(MAX_BODY_BYTES) in problem_of(answer, 413, "body-too-large").detail


async def test_generate_refuses_a_large_body_without_reading_it(api: Api) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100:
            sent += 1
            yield b" " * 4_096

    answer = await api.http.post("/generate", content=endless(), headers=JSON)

    problem_of(answer, 413, "body-too-large")
    assert answer.request.headers["transfer-encoding"] == "chunked"
    assert sent <= MAX_BODY_BYTES // 4_096 + 1


async def test_generate_takes_a_body_of_the_largest_size(api: Api) -> None:
    body = json.dumps({"prompt": "a"}).ljust(MAX_BODY_BYTES)

    assert (await send(api, body)).status_code == 200
    assert (await send(api, body + " ")).status_code == 413


# ---- 404 and 405


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/nothing", "/generate/x", "/Generate", "/jobs/", "/outputs", "/outputs/", "/health/nothing"),
        *("/generate/", "/health/", "/metrics/", "//health", "/.env", "/static-offline-docs/nothing.js"),
        *("/static-offline-docs/../../schemas/errors.py", "/static-offline-docs/%2e%2e/app.py"),
    ],
)
async def test_unknown_routes_are_not_found(api: Api, path: str) -> None:
    answer = await api.http.get(path)

    problem_of(answer, 404, "route-not-found")
    assert "location" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/generate", {"POST"}),
        ("PUT", "/generate", {"POST"}),
        ("POST", "/health", {"GET"}),
        ("DELETE", "/models", {"GET"}),
        ("POST", "/outputs/clip_" + "0" * 32, {"GET", "HEAD"}),
        ("PATCH", "/jobs/job_" + "0" * 32, {"DELETE", "GET"}),
        ("PROPFIND", "/metrics", {"GET"}),
    ],
)
async def test_wrong_methods_are_refused_with_the_right_ones(
    api: Api, method: str, path: str, allowed: set[str]
) -> None:
    answer = await api.http.request(method, path)

    problem_of(answer, 405, "method-not-allowed")
    assert {name.strip() for name in answer.headers["allow"].split(",")} == allowed


BAD_IDS = [
    "nothing",
    "..",
    ".",
    "%2e%2e",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "%00",
    "job_" + "0" * 32 + "%00",
    "job_" + "0" * 32 + "%0a",
    "job_" + "G" * 32,
    "job_" + "0" * 31,
    "job_" + "0" * 32 + ".json",
    "clip_" + "0" * 32 + "%2f..%2f.secret",
    ".secret",
    "C%3a%5cwindows",
    "%ff%fe",
    "x" * 20_000,
    "job_" + "0" * 32,
    "clip_" + "0" * 32,
]


@pytest.mark.parametrize("bad", BAD_IDS, ids=lambda bad: bad[:40])
@pytest.mark.parametrize(("prefix", "name"), [("/jobs/", "job-not-found"), ("/outputs/", "clip-not-found")])
async def test_ids_that_are_none_are_not_found(api: Api, prefix: str, name: str, bad: str) -> None:
    answer = await send_raw(api, "GET", prefix + bad)

    assert answer.status_code == 404
    problem_of(answer, 404, name if "%2f" not in bad and bad not in {"..", "."} else _any_not_found(answer))


@pytest.mark.parametrize("name", ["x.mp4", "..", "%2e%2e", "%00.mp4", ".mp4", "a.json", "x" * 9_000 + ".mp4", "a"])
@pytest.mark.parametrize("clip_id", ["clip_" + "0" * 32, "..", "%2e%2e", "jobs", ".tmp"])
async def test_names_that_are_none_are_never_served(api: Api, clip_id: str, name: str) -> None:
    answer = await send_raw(api, "GET", f"/outputs/{clip_id}/{name}")

    if answer.status_code == 403:  # a well-formed name, and no signature
        problem_of(answer, 403, "url-invalid")
        assert (clip_id, name) == ("clip_" + "0" * 32, "x.mp4")
    else:
        problem_of(answer, 404, _any_not_found(answer))


# ---- the service's own failures


async def test_generate_is_refused_while_the_model_is_not_ready(api: Api) -> None:
    api.probe.problem = ModelNotReady("the model is loading", 7)

    problem = problem_of(await send(api, '{"prompt": "a"}'), 503, "model-not-ready")
    assert problem.retry_after_s == 7
    assert api.jobs.job_records() == []


async def test_generate_is_refused_with_both_numbers_when_the_prompt_has_too_many_tokens(api: Api) -> None:
    api.jobs.worker.failures["check"] = PromptTooLong("prompt", 600, 128)

    problem = problem_of(await send(api, '{"prompt": "ä"}'), 422, "prompt-too-long")
    assert "600" in problem.detail
    assert "128" in problem.detail
    assert problem.errors is not None
    assert problem.errors[0].field == "prompt"


async def test_generate_is_refused_when_the_queue_is_full(api: Api) -> None:
    gate = api.jobs.worker.gates["prepare"]
    gate.close()
    for _ in range(3):
        answer = await api.http.post("/generate", json={"prompt": "a"}, headers={"prefer": "respond-async"})
        assert answer.status_code == 202

    assert (problem_of(await send(api, '{"prompt": "a"}'), 429, "queue-full").retry_after_s or 0) >= 1
    gate.open()
    await api.jobs.service.drain(20)


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemory(),
        RenderFailed("the encoder failed on this clip"),
        StoreFull(),
        StoreUnavailable("the storage folder is gone"),
        WorkerLost("the process that worked on this went away", 1),
        InternalError(),
    ],
    ids=lambda error: error.name,
)
async def test_generate_answers_the_problem_that_its_job_ended_with(api: Api, error: WanError) -> None:
    api.jobs.worker.failures["running"] = error

    problem = problem_of(await send(api, '{"prompt": "a"}'), error.status, error.name)
    assert problem.detail == error.detail
    assert problem.job_id is not None
    assert api.jobs.record(problem.job_id).state is JobState.FAILED
    assert api.jobs.store.list("clips/").stats == ()


async def test_generate_answers_a_full_disk_before_there_is_a_job(api: Api) -> None:
    api.jobs.store.failures[JobState.QUEUED] = StoreFull()

    problem = problem_of(await send(api, '{"prompt": "a"}'), 507, "store-full")
    assert problem.job_id is None
    assert api.jobs.job_records() == []


async def test_generate_tells_nothing_of_an_unknown_exception_in_the_job(api: Api) -> None:
    api.jobs.worker.failures["prepare"] = RuntimeError(f"/srv/weights.bin {PROMPT}")
    answer = await send(api, '{"prompt": "a"}')

    problem = problem_of(answer, 500, "internal-error")
    assert problem.detail == InternalError().detail
    assert "weights" not in answer.text


async def test_an_unknown_exception_in_a_route_is_a_problem_that_tells_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def explode(*_: object) -> None:
        raise RuntimeError(f"/srv/weights.bin {PROMPT}")

    monkeypatch.setattr(api.jobs.service, "job", explode)
    answer = await api.http.get("/jobs/job_" + "0" * 32)

    problem_of(answer, 500, "internal-error")
    assert "weights" not in answer.text
    assert "weights" not in api.log.text
    assert [line["status"] for line in api.log.of("request")] == [500]
    (failure,) = api.log.of("request_failed")
    assert failure["exc_type"] == "RuntimeError"


async def test_a_broken_record_is_a_problem_that_tells_nothing(api: Api) -> None:
    job_id = "job_" + "1" * 32
    api.jobs.store.put(f"jobs/{job_id}.json", f'{{"state": "queued", "prompt": "{PROMPT}"}}'.encode())
    answer = await api.http.get(f"/jobs/{job_id}")

    problem_of(answer, 500, "internal-error")
    assert "otter" not in answer.text
    assert "otter" not in api.log.text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["prompt", "seed", "num_frames", "duration", "width", "height", "fps", "resolution", "x"])


@given(body=st.dictionaries(fields | st.text(max_size=8), json_values, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_generate_refuses_whatever_else_is_json_with_a_problem(api: Api, body: dict[str, Any]) -> None:
    answer = await send(api, json.dumps(body))

    if answer.status_code != 200:
        problem_of(answer, 422, "invalid-request")


def _any_not_found(answer: httpx.Response) -> str:
    name: str = answer.json()["type"].rpartition(":")[2]
    assert name in {"route-not-found", "clip-not-found", "job-not-found"}
    return name
