"""`/batches` over HTTP: JSON and JSON Lines, problems, results, cancel, lists."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from answers import problem_of
from api_under_test import Api

from schemas.batches import MAX_BATCH_BYTES, Batch, BatchPage, BatchResult
from schemas.errors import ModelNotReady
from schemas.jobs import JobPage, JobState

NDJSON = {"content-type": "application/x-ndjson"}
PATIENCE_S = 30.0


def request(index: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"a red circle, number {index}", "seed": index, **more}


async def post(api: Api, body: Any, **headers: str) -> httpx.Response:
    return await api.http.post("/batches", json=body, headers=headers)


async def ended(api: Api, batch_id: str) -> Batch:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = await api.http.get(f"/batches/{batch_id}")
            batch = Batch.model_validate_json(answer.content)
            if batch.state == "ended":
                assert "retry-after" not in answer.headers
                return batch
            assert int(answer.headers["retry-after"]) >= 1
            await asyncio.sleep(0.02)


async def results(api: Api, batch_id: str) -> list[BatchResult]:
    answer = await api.http.get(f"/batches/{batch_id}/results")
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [BatchResult.model_validate_json(line) for line in answer.content.splitlines()]


async def test_a_batch_of_json_ends_with_results_in_order(api: Api) -> None:
    answer = await post(api, {"requests": [request(i) for i in range(5)], "defaults": {"num_inference_steps": 3}})
    assert answer.status_code == 202
    batch = Batch.model_validate_json(answer.content)
    assert answer.headers["location"] == f"/batches/{batch.batch_id}"
    assert (await ended(api, batch.batch_id)).counts.succeeded == 5
    found = await results(api, batch.batch_id)
    assert [result.clip.seed for result in found if result.clip] == list(range(5))
    assert {result.clip.num_inference_steps for result in found if result.clip} == {3}
    assert found[0].clip is not None
    assert (await api.http.get(found[0].clip.output_url)).status_code == 200


async def test_a_batch_of_json_lines_is_taken_in_any_pieces(api: Api) -> None:
    body = b"\n".join(json.dumps(request(i)).encode() for i in range(3)) + b"\r\n\n  \n"

    async def pieces() -> Any:
        for at in range(0, len(body), 7):
            yield body[at : at + 7]

    answer = await api.http.post("/batches", content=pieces(), headers=NDJSON)
    batch = Batch.model_validate_json(answer.content)
    assert batch.total == 3
    assert [r.clip.seed for r in await _done(api, batch) if r.clip] == [0, 1, 2]


async def _done(api: Api, batch: Batch) -> list[BatchResult]:
    await ended(api, batch.batch_id)
    return await results(api, batch.batch_id)


async def test_every_bad_line_is_named_and_nothing_exists(api: Api) -> None:
    lines = [json.dumps(request(i)).encode() for i in range(8)]
    lines[1] = b"{"
    lines[2] = b'{"prompt": "x", "colour": 1}'
    lines[4] = b'{"prompt": "x", "num_frames": 80, "fps": 5}'
    lines[5] = b"7"
    lines[6] = b'{"prompt": "\xff"}'
    lines[7] = b'{"prompt": "' + b"x" * 70_000 + b'"}'
    answer = await api.http.post("/batches", content=b"\n".join(lines), headers=NDJSON)
    problem = problem_of(answer, 422, "invalid-request")
    fields = [error.field for error in problem.errors or ()]
    assert fields == [
        *("requests.1", "requests.2.colour", "requests.4.fps", "requests.4.num_frames"),
        *("requests.5", "requests.6", "requests.7"),
    ]
    assert api.jobs.store.list("batches/").stats == ()
    assert api.jobs.store.list("active/").stats == ()


async def test_thousands_of_bad_lines_are_all_named(api: Api) -> None:
    answer = await post(api, {"requests": [{"prompt": "x", "num_frames": 80}] * 5_000})
    problem = problem_of(answer, 422, "invalid-request")
    assert len(problem.errors or ()) == 5_000
    assert len(problem.detail) < 20_000
    assert len(answer.content) < 2_000_000


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"", ["body"]),
        (b"[]", ["body"]),
        (b"{", ["body"]),
        (b'{"requests": [{"prompt": "x"}]', ["body"]),
        (b'{"requests": [{"prompt": "x"}]} x', ["body"]),
        (b'{"requests": [{"prompt": "x"} {"prompt": "x"}]}', ["body"]),
        (b'{"requests": [{"prompt": NaN}]}', ["body"]),
        (b'{"requests": [' + b"[" * 50_000, ["body"]),
        (b"{}", ["requests"]),
        (b'{"requests": {}}', ["requests"]),
        (b'{"requests": []}', ["requests"]),
        (b'{"requests": [null, 1, {}]}', ["requests.0", "requests.1", "requests.2.prompt"]),
        (b'{"requests": [{"prompt": "x"}], "colour": 1}', ["colour"]),
        (b'{"requests": [{"prompt": "x"}], "defaults": 7}', ["defaults"]),
        (b'{"requests": [{"prompt": "x"}], "defaults": null}', ["defaults"]),
        (b'{"requests": [{"prompt": "x"}], "defaults": {"prompt": "y"}}', ["defaults.prompt"]),
        (b'{"requests": [{"prompt": "x"}], "defaults": {"colour": 1}}', ["defaults.colour"]),
        (b'{"requests": [{"prompt": "x"}], "webhook_url": "nowhere"}', ["webhook_url"]),
        (b'{"requests": [' + b'{"prompt": "x"},' * 10_001, ["requests"]),
    ],
)
async def test_a_bad_body_is_refused(api: Api, body: bytes, fields: list[str]) -> None:
    answer = await api.http.post("/batches", content=body, headers={"content-type": "application/json"})
    problem = problem_of(answer, 422, "invalid-request")
    assert [error.field for error in problem.errors or ()] == fields


async def test_another_content_type_is_refused(api: Api) -> None:
    answer = await api.http.post("/batches", content=b"x", headers={"content-type": "text/plain"})
    problem_of(answer, 422, "invalid-request")


async def test_what_a_request_says_one_way_the_defaults_do_not_say_another_way(api: Api) -> None:
    answer = await post(
        api,
        {
            "requests": [request(0, num_frames=9), request(1, width=64, height=64), request(2)],
            "defaults": {"duration": 1, "resolution": "64p", "aspect_ratio": "1:1"},
        },
    )
    assert answer.status_code == 202, answer.text
    found = await _done(api, Batch.model_validate_json(answer.content))
    assert [result.clip.num_frames for result in found if result.clip] == [9, 17, 17]


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_beyond_16_mib_is_refused(api: Api, announced: bool) -> None:
    async def pieces() -> Any:
        for _ in range(17):
            yield b" " * 2**20

    content = b" " * (MAX_BATCH_BYTES + 1) if announced else pieces()
    answer = await api.http.post("/batches", content=content, headers={"content-type": "application/json"})
    problem_of(answer, 413, "body-too-large")


async def test_the_same_key_answers_the_same_batch(api: Api) -> None:
    body = {"requests": [request(0)]}
    first = await post(api, body, **{"Idempotency-Key": "k"})
    again = await api.http.post("/batches", content=json.dumps(request(0)), headers={**NDJSON, "Idempotency-Key": "k"})
    assert again.json()["batch_id"] == first.json()["batch_id"]
    other = await post(api, {"requests": [request(1)]}, **{"Idempotency-Key": "k"})
    problem_of(other, 422, "idempotency-mismatch")


async def test_jobs_of_a_batch_are_listed_and_cancelled(api: Api) -> None:
    api.jobs.worker.gates["running"].close()
    batch = Batch.model_validate_json((await post(api, {"requests": [request(i) for i in range(6)]})).content)
    await api.jobs.worker.gates["running"].reached()
    page = JobPage.model_validate_json((await api.http.get("/jobs", params={"batch": batch.batch_id})).content)
    assert [job.parameters.seed for job in page.jobs] == list(range(6))
    queued = JobPage.model_validate_json(
        (await api.http.get("/jobs", params={"batch": batch.batch_id, "state": "queued", "limit": 2})).content
    )
    assert [job.parameters.seed for job in queued.jobs] == [1, 2]
    assert queued.next_cursor is not None
    answer = await api.http.post(f"/jobs/{queued.jobs[0].job_id}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    answer = await api.http.post(f"/batches/{batch.batch_id}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "ended")
    assert answer.json()["counts"]["cancelled"] == 6
    assert {result.state for result in await results(api, batch.batch_id)} == {JobState.CANCELLED}


async def test_batches_are_listed(api: Api) -> None:
    made = [(await post(api, {"requests": [request(i)]})).json()["batch_id"] for i in range(3)]
    for batch_id in made:
        await ended(api, batch_id)
    page = BatchPage.model_validate_json((await api.http.get("/batches", params={"limit": 2})).content)
    assert len(page.batches) == 2
    rest = await api.http.get("/batches", params={"limit": 2, "after": page.next_cursor})
    found = [*page.batches, *BatchPage.model_validate_json(rest.content).batches]
    assert {batch.batch_id for batch in found} == set(made)
    problem_of(await api.http.get("/batches", params={"after": "x"}), 422, "invalid-request")


@pytest.mark.parametrize("path", ["/batches/batch_" + "0" * 32, "/batches/x", "/batches/batch_0/results"])
async def test_an_unknown_batch_is_a_404(api: Api, path: str) -> None:
    problem_of(await api.http.get(path), 404, "batch-not-found")
    problem_of(await api.http.get("/jobs", params={"batch": "x"}), 404, "batch-not-found")


async def test_a_service_that_is_not_ready_takes_no_batch(api: Api) -> None:
    api.probe.problem = ModelNotReady("loading")
    problem_of(await post(api, {"requests": [request(0)]}), 503, "model-not-ready")
