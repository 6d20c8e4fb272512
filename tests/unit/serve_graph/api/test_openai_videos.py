"""`/v1/videos` as the official `openai` SDK uses it."""

import io
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import openai
import pytest
from answers import assert_nothing_of_the_inside
from api_under_test import Api, open_api, small_mp4
from openai import AsyncOpenAI
from openai.types import Video
from PIL import Image
from random_wan import RANDOM_WAN
from support import CLIP_BYTES, PUBLIC_URL, LogLines

from schemas.errors import OutOfMemory, StoreUnavailable
from schemas.jobs import JobState
from serve_graph.api.auth import Authenticator
from serve_graph.api_keys import ApiKeys, Role, new_key
from storage.keys import thumbnail_key

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")  # every call of the SDK says it

PROMPT = "a red circle moving left"
ALICE, ALICE_LINE = new_key("alice")
BOB, BOB_LINE = new_key("bob", requests_per_minute=2)
MONITOR, MONITOR_LINE = new_key("monitor", Role.MONITOR)
NOWHERE = "job_" + "0" * 32


def sdk_of(api: Api, key: str = "any") -> AsyncOpenAI:
    transport = httpx.ASGITransport(app=api.app, raise_app_exceptions=False)
    http = httpx.AsyncClient(transport=transport, follow_redirects=True)
    return AsyncOpenAI(base_url=PUBLIC_URL + "/v1", api_key=key, http_client=http, max_retries=0)


@pytest.fixture
async def sdk(api: Api) -> AsyncIterator[AsyncOpenAI]:
    async with sdk_of(api) as client:
        yield client


@pytest.fixture
async def guarded(tmp_path: Path, log: LogLines) -> AsyncIterator[Api]:
    keys = ApiKeys(f"{ALICE_LINE} {BOB_LINE} {MONITOR_LINE}")
    async with open_api(tmp_path / "store", log, authenticator=Authenticator(keys, protect_monitoring=False)) as opened:
        yield opened


async def make(sdk: AsyncOpenAI, **fields: Any) -> Video:
    return await sdk.videos.create_and_poll(prompt=PROMPT, poll_interval_ms=1, **fields)


async def test_create_and_poll_gives_a_completed_video_with_all_that_made_it(api: Api, sdk: AsyncOpenAI) -> None:
    extras = {
        "negative_prompt": "blurry",
        "num_inference_steps": 4,
        "guidance_scale": 1.5,
        "flow_shift": 2,
        "seed": 7,
        "fps": 8,
    }
    video = await make(sdk, model="wan-random", seconds="2", size="112x64", extra_body=extras)

    assert (video.object, video.status, video.progress, video.error) == ("video", "completed", 100, None)
    assert (video.model, video.prompt, video.seconds, video.size) == ("wan-random", PROMPT, "2", "112x64")
    assert video.model_extra is not None
    assert extras.items() <= video.model_extra.items()
    assert 0.5 <= video.model_extra["inference_time_s"] < 10  # the script's 0.3 s and 0.2 s, and a real text stage
    assert "peak_memory_mb" not in video.model_extra
    record = api.jobs.record(video.id)
    assert record.parameters.num_frames == 17
    assert video.created_at == int(record.created_at.timestamp())
    assert video.completed_at == int(record.at[JobState.SUCCEEDED].timestamp())
    assert (video.expires_at, video.remixed_from_video_id) == (None, None)


async def test_create_takes_json_as_well(api: Api) -> None:
    answer = await api.http.post("/v1/videos", json={"prompt": PROMPT, "seconds": "1", "size": "64x64", "seed": 3})

    assert answer.status_code == 200, answer.text
    assert answer.headers["x-request-id"]
    assert api.jobs.record(answer.json()["id"]).parameters.seed == 3


async def test_a_preset_is_taken_and_told(api: Api, sdk: AsyncOpenAI) -> None:
    video = await make(sdk, extra_body={"preset": "fast"})

    assert video.model_extra is not None
    assert video.model_extra["preset"] == "fast"
    assert video.model_extra["num_inference_steps"] == RANDOM_WAN.presets["fast"].num_inference_steps
    assert api.jobs.record(video.id).parameters.levers == RANDOM_WAN.presets["fast"].levers


async def test_width_height_and_num_frames_are_taken_instead_of_size_and_seconds(sdk: AsyncOpenAI) -> None:
    video = await make(sdk, extra_body={"width": 64, "height": 112, "num_frames": 13})

    assert (video.size, video.seconds) == ("64x112", "0.75")


async def test_a_video_goes_from_queued_over_in_progress_to_completed(api: Api, sdk: AsyncOpenAI) -> None:
    for stage in ("prepare", "running"):
        api.jobs.worker.gates[stage].close()
    created = await sdk.videos.with_raw_response.create(prompt=PROMPT)
    video = created.parse()
    assert (video.status, video.progress, video.completed_at) == ("queued", 0, None)
    assert int(created.headers["openai-poll-after-ms"]) == 500
    assert created.request_id == created.headers["x-request-id"] == video._request_id
    await api.jobs.worker.gates["prepare"].reached()
    assert (await sdk.videos.retrieve(video.id)).status == "queued"
    api.jobs.worker.gates["prepare"].open()
    await api.jobs.worker.gates["running"].reached()
    running = await sdk.videos.with_raw_response.retrieve(video.id)
    assert (running.parse().status, running.parse().progress) == ("in_progress", 45)
    assert int(running.headers["openai-poll-after-ms"]) == 250
    api.jobs.worker.gates["running"].open()
    ended = await sdk.videos.with_raw_response.retrieve((await sdk.videos.poll(video.id, poll_interval_ms=1)).id)
    assert ended.parse().status == "completed"
    assert "openai-poll-after-ms" not in ended.headers


async def test_a_failed_video_is_a_200_that_says_so(api: Api, sdk: AsyncOpenAI) -> None:
    api.jobs.worker.failures["running"] = OutOfMemory()
    video = await make(sdk)

    assert (video.status, video.progress) == ("failed", 0)
    assert video.error is not None
    assert (video.error.code, video.error.message) == ("out_of_memory", OutOfMemory().detail)
    assert video.completed_at is not None
    with pytest.raises(openai.NotFoundError, match="failed"):
        await sdk.videos.download_content(video.id)


async def test_a_cancelled_video_has_failed_and_its_error_says_why(api: Api, sdk: AsyncOpenAI) -> None:
    api.jobs.worker.gates["running"].close()
    video = await sdk.videos.create(prompt=PROMPT)
    await api.jobs.worker.gates["running"].reached()
    await api.http.post(f"/jobs/{video.id}/cancel")
    video = await sdk.videos.retrieve(video.id)

    assert (video.status, video.error and video.error.code) == ("failed", "job_cancelled")


async def test_content_redirects_to_the_signed_clip(api: Api, sdk: AsyncOpenAI) -> None:
    video = await make(sdk)
    redirect = await api.http.get(f"/v1/videos/{video.id}/content", follow_redirects=False)

    assert redirect.status_code == 302
    assert "signature" in parse_qs(urlsplit(redirect.headers["location"]).query)
    assert redirect.headers["cache-control"] == "no-store"
    content = await sdk.videos.download_content(video.id)
    assert content.content == CLIP_BYTES
    assert content.response.headers["content-type"] == "video/mp4"


async def test_thumbnail_is_the_first_frame_made_once_and_deleted_with_the_video(api: Api, sdk: AsyncOpenAI) -> None:
    video = await make(sdk)
    key = put_real_clip(api, video.id)
    first = await sdk.videos.download_content(video.id, variant="thumbnail")
    etag = api.jobs.store.stat(thumbnail_key(key)).etag
    again = await sdk.videos.download_content(video.id, variant="thumbnail")

    assert first.response.headers["content-type"] == "image/jpeg"
    assert first.response.headers["content-disposition"].endswith('.jpg"')
    assert (again.content, api.jobs.store.stat(thumbnail_key(key)).etag) == (first.content, etag)
    with Image.open(io.BytesIO(first.content)) as image:
        assert (image.format, image.size) == ("JPEG", (112, 64))
        red, green, blue = (int(value) for value in np.asarray(image)[32, 56])
    assert red > 200 > 60 > max(green, blue)
    await sdk.videos.delete(video.id)
    assert [stat.key for stat in api.jobs.store.list("clips/").stats] == []


def put_real_clip(api: Api, video_id: str) -> str:
    """A clip in the place of what the scripted worker wrote; returns its key."""
    result = api.jobs.record(video_id).result
    assert result is not None
    api.jobs.store.put(result.key, small_mp4(api.jobs.store.folder))
    return result.key


async def test_thumbnail_of_a_video_that_is_deleted_meanwhile_leaves_nothing(
    api: Api, sdk: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = await make(sdk)
    key = put_real_clip(api, video.id)
    put = api.jobs.store.put

    def put_late(name: str, body: Any, **conditions: Any) -> Any:
        if name == thumbnail_key(key):
            api.jobs.records.delete(*api.jobs.records.get(video.id))
        return put(name, body, **conditions)

    monkeypatch.setattr(api.jobs.store, "put", put_late)
    with pytest.raises(openai.NotFoundError):
        await sdk.videos.download_content(video.id, variant="thumbnail")
    assert [stat.key for stat in api.jobs.store.list("clips/").stats] == []


async def test_thumbnail_that_cannot_be_made_is_a_server_error_without_the_inside(api: Api, sdk: AsyncOpenAI) -> None:
    video = await make(sdk)
    answer = await api.http.get(f"/v1/videos/{video.id}/content", params={"variant": "thumbnail"})

    error_of(answer, 500, "render_failed")


async def test_content_of_a_video_that_is_not_ready_is_a_404_that_says_so(api: Api, sdk: AsyncOpenAI) -> None:
    api.jobs.worker.gates["running"].close()
    video = await sdk.videos.create(prompt=PROMPT)

    with pytest.raises(openai.NotFoundError, match="not ready yet") as refused:
        await sdk.videos.download_content(video.id)
    assert refused.value.type == "invalid_request_error"
    api.jobs.worker.gates["running"].open()


@pytest.mark.parametrize("variant", ["spritesheet", "poster"])
async def test_other_variants_are_refused(sdk: AsyncOpenAI, variant: Any) -> None:
    video = await make(sdk)

    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.videos.download_content(video.id, variant=variant)
    assert refused.value.param == "variant"


async def test_list_has_the_newest_first_and_pages_through_all(sdk: AsyncOpenAI) -> None:
    ids = [(await make(sdk)).id for _ in range(5)]
    page = await sdk.videos.list(limit=2)

    assert ([video.id for video in page.data], page.has_more, page.last_id) == (ids[:2:-1], True, ids[3])
    assert page.model_extra is not None
    assert (page.model_extra["first_id"], page.model_extra["object"]) == (ids[4], "list")
    assert [video.id async for video in sdk.videos.list(limit=2)] == ids[::-1]
    last = await sdk.videos.list(after=ids[1])
    assert ([video.id for video in last.data], last.has_more) == ([ids[0]], False)


async def test_list_goes_on_behind_a_video_that_was_just_deleted(sdk: AsyncOpenAI) -> None:
    ids = [(await make(sdk)).id for _ in range(4)]
    deleted = []
    async for video in sdk.videos.list(limit=2):
        deleted.append((await sdk.videos.delete(video.id)).id)

    assert deleted == ids[::-1]
    assert (await sdk.videos.list()).data == []


@pytest.mark.parametrize(
    ("query", "param"),
    [({"order": "asc"}, "order"), ({"order": "up"}, "order"), ({"limit": 0}, "limit"), ({"limit": 101}, "limit")],
)
async def test_list_refuses_what_it_cannot_do(sdk: AsyncOpenAI, query: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.videos.list(extra_query=query)
    assert refused.value.param == param


async def test_list_behind_an_unknown_video_is_a_404(sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await sdk.videos.list(after=NOWHERE)


async def test_delete_is_answered_in_openai_s_form_and_the_video_is_gone(sdk: AsyncOpenAI) -> None:
    video = await make(sdk)
    deleted = await sdk.videos.delete(video.id)

    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    for call in (sdk.videos.retrieve, sdk.videos.delete, sdk.videos.download_content):
        with pytest.raises(openai.NotFoundError) as refused:
            await call(video.id)
        assert refused.value.code == "job_gone"


async def test_delete_of_a_running_video_is_a_conflict_that_is_not_sent_again(api: Api, sdk: AsyncOpenAI) -> None:
    api.jobs.worker.gates["running"].close()
    video = await sdk.videos.create(prompt=PROMPT)

    with pytest.raises(openai.ConflictError) as refused:
        await sdk.videos.delete(video.id)
    assert refused.value.response.headers["x-should-retry"] == "false"
    api.jobs.worker.gates["running"].open()


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"seconds": "6"}, "seconds", "legal: 1, 2, 3, 4, 5, (num_frames - 1) / 16"),
        ({"seconds": "4", "extra_body": {"fps": 24}}, "seconds", "legal: 1, 2, 3, ("),
        ({"seconds": "0.1"}, "seconds", "legal: 1, 2"),
        ({"seconds": "four"}, "seconds", "legal: 1, 2"),
        ({"seconds": "-1"}, "seconds", "legal: 1, 2"),
        ({"seconds": "1", "extra_body": {"num_frames": 17}}, None, "not both"),
        ({"size": "1280x720"}, "size", "legal: one of 64x64, 112x64"),
        ({"size": "large"}, "size", "legal: one of 64x64"),
        ({"size": "64x64", "extra_body": {"width": 64, "height": 64}}, None, "not both"),
        ({"extra_body": {"width": 64}}, None, "go together"),
        ({"extra_body": {"width": 65, "height": 64}}, "width", "nearest: 64x64"),
        ({"model": "sora-2"}, "model", "legal: wan-random"),
        ({"extra_body": {"fps": 7}}, "fps", "legal: one of"),
        ({"extra_body": {"fps": 7}, "seconds": "1"}, "fps", "legal: one of"),
        ({"extra_body": {"num_frames": 80}}, "num_frames", "nearest: 77, 81"),
        ({"extra_body": {"num_frames": "17.0"}}, "num_frames", "integer"),
        ({"extra_body": {"num_frames": " 17"}}, "num_frames", "integer"),
        ({"extra_body": {"num_frames": "0x11"}}, "num_frames", "integer"),
        ({"extra_body": {"seed": True}}, "seed", "integer"),
        ({"extra_body": {"seed": ""}}, "seed", "integer"),
        ({"extra_body": {"seed": "9" * 30}}, "seed", "integer"),
        ({"extra_body": {"guidance_scale": "nan"}}, "guidance_scale", "number"),
        ({"extra_body": {"guidance_scale": "1e999"}}, "guidance_scale", "finite"),
        ({"extra_body": {"lora": {"path": "x"}}}, "lora[path]", "not a field"),
        ({"extra_body": {"loras": ["x", "y"]}}, "loras[]", "twice"),
        ({"extra_body": {"loras": '[{"name": "x"}]'}}, "loras", "legal: none"),
        ({"extra_body": {"loras": "x=1"}}, "loras", "tuple"),
        ({"extra_body": {"url_ttl_s": 5}}, "url_ttl_s", "not a field"),
        ({"input_reference": b"\x89PNG\r\n\x1a\n\xff\xfe"}, "input_reference", "from text only"),
    ],
    ids=str,
)
async def test_what_is_not_legal_is_a_400_that_says_what_is(
    api: Api, sdk: AsyncOpenAI, fields: dict[str, Any], param: str | None, says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.videos.create(prompt=PROMPT, **fields)

    assert refused.value.param == param
    assert says in refused.value.message
    assert (refused.value.type, refused.value.code) == ("invalid_request_error", "invalid_request")
    assert api.jobs.job_records() == []


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer in OpenAI's form, which gives nothing away."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.json().keys() == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    assert answer.headers["x-request-id"]
    assert_nothing_of_the_inside(answer)
    return error


BOUNDARY = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[]", "application/json"),
        (b'{"prompt": "a", "num_frames": "17"}', "application/json"),
        (b'{"prompt": "a", "seconds": 1}', "application/json"),
        (b'{"prompt": "a", "seed": 1.0}', "application/json"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "application/json"),
        (b'{"prompt": "a", "input_reference": {"image_url": "x"}}', "application/json"),
        (b'{"prompt": "\xff"}', "application/json"),
        (b"prompt=a", "application/x-www-form-urlencoded"),
        (b'{"prompt": "a"}', ""),
        (b"", "multipart/form-data"),
        (b"", BOUNDARY),
        (b"no parts", BOUNDARY),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\r\n--b--\r\n', BOUNDARY),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"; filename="a"\r\n\r\na\r\n--b--\r\n', BOUNDARY),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\na\r\n--b--\r\n", BOUNDARY),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na', BOUNDARY),
    ],
)
async def test_a_bad_body_is_a_400(api: Api, content: bytes, media_type: str) -> None:
    answer = await api.http.post("/v1/videos", content=content, headers={"content-type": media_type})

    error_of(answer, 400, "invalid_request")
    assert api.jobs.job_records() == []


async def test_a_body_that_is_too_large_is_a_413(api: Api) -> None:
    answer = await api.http.post("/v1/videos", content=b"x" * 100_000, headers={"content-type": BOUNDARY})

    error_of(answer, 413, "body_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/videos/" + NOWHERE, 404, "job_not_found"),
        ("GET", "/v1/videos/video_123", 404, "job_not_found"),
        ("DELETE", "/v1/videos/" + NOWHERE, 404, "job_not_found"),
        ("GET", f"/v1/videos/{NOWHERE}/content", 404, "job_not_found"),
        ("GET", "/v1/models", 404, "route_not_found"),
        ("GET", "/v1", 404, "route_not_found"),
        ("POST", f"/v1/videos/{NOWHERE}/remix", 404, "route_not_found"),
        ("PUT", "/v1/videos", 405, "method_not_allowed"),
    ],
)
async def test_what_is_not_there_is_said_in_openai_s_form(
    api: Api, method: str, path: str, status: int, code: str
) -> None:
    error = error_of(await api.http.request(method, path), status, code)

    assert error["type"] == "invalid_request_error"


async def test_a_405_lists_the_methods_of_every_route_on_its_path(api: Api) -> None:
    assert (await api.http.put("/v1/videos")).headers["allow"] == "GET, POST"
    assert (await api.http.put("/v1/videos/" + NOWHERE)).headers["allow"] == "DELETE, GET"


async def test_a_path_that_only_begins_alike_gets_a_problem(api: Api) -> None:
    assert (await api.http.get("/v10/videos")).headers["content-type"] == "application/problem+json"


async def test_a_full_queue_is_a_rate_limit_error_with_retry_after(api: Api, sdk: AsyncOpenAI) -> None:
    api.jobs.worker.gates["running"].close()
    for _ in range(4):  # one runs, three may wait
        await sdk.videos.create(prompt=PROMPT)
        await api.jobs.worker.gates["running"].reached()
    with pytest.raises(openai.RateLimitError) as refused:
        await sdk.videos.create(prompt=PROMPT)

    assert (refused.value.code, refused.value.type) == ("queue_full", "rate_limit_error")
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert refused.value.request_id
    api.jobs.worker.gates["running"].open()


async def test_a_store_that_is_away_is_a_server_error_with_retry_after(api: Api, sdk: AsyncOpenAI) -> None:
    api.jobs.store.failures[JobState.QUEUED] = StoreUnavailable("the store does not answer", 7)

    with pytest.raises(openai.InternalServerError) as refused:
        await sdk.videos.create(prompt=PROMPT)
    assert (refused.value.status_code, refused.value.code) == (503, "store_unavailable")
    assert refused.value.response.headers["retry-after"] == "7"


async def test_an_unforeseen_failure_is_a_server_error_without_the_inside(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("inside/secret.py")

    monkeypatch.setattr(api.jobs.service, "job", fail)
    answer = await api.http.get("/v1/videos/" + NOWHERE)

    assert error_of(answer, 500, "internal_error")["type"] == "server_error"
    assert "secret" not in answer.text


async def test_the_same_idempotency_key_gives_the_same_video(api: Api, sdk: AsyncOpenAI) -> None:
    headers = {"Idempotency-Key": "once"}
    first = await sdk.videos.create(prompt=PROMPT, extra_headers=headers)

    assert (await sdk.videos.create(prompt=PROMPT, extra_headers=headers)).id == first.id
    with pytest.raises(openai.BadRequestError) as refused:
        await sdk.videos.create(prompt="another", extra_headers=headers)
    assert refused.value.code == "idempotency_mismatch"


async def test_keys_are_asked_for_and_own_their_videos(guarded: Api) -> None:
    async with sdk_of(guarded, ALICE) as alice, sdk_of(guarded, BOB) as bob, sdk_of(guarded, "wrong") as stranger:
        video = await make(alice)
        assert guarded.jobs.record(video.id).principal == "alice"
        assert (await alice.videos.download_content(video.id)).content == CLIP_BYTES
        with pytest.raises(openai.AuthenticationError) as unknown:
            await stranger.videos.create(prompt=PROMPT)
        with pytest.raises(openai.NotFoundError):
            await bob.videos.retrieve(video.id)
        assert (await bob.videos.list()).data == []
        with pytest.raises(openai.RateLimitError) as limited:
            await bob.videos.list()
    assert (unknown.value.type, unknown.value.code) == ("authentication_error", "unauthorized")
    assert unknown.value.response.headers["www-authenticate"].startswith("Bearer")
    assert limited.value.code == "rate_limited"
    assert "retry-after" in limited.value.response.headers


async def test_a_monitor_s_key_makes_no_videos(guarded: Api) -> None:
    async with sdk_of(guarded, MONITOR) as monitor:
        with pytest.raises(openai.PermissionDeniedError):
            await monitor.videos.create(prompt=PROMPT)


async def test_the_log_knows_the_job_and_not_the_prompt(api: Api, sdk: AsyncOpenAI) -> None:
    video = await make(sdk)
    line = next(line for line in api.log.of("request") if line["method"] == "POST")

    assert (line["route"], line["job_id"], line["status"]) == ("/v1/videos", video.id, 200)
    assert PROMPT not in api.log.text


async def test_a_video_made_by_generate_is_a_video_too(api: Api, sdk: AsyncOpenAI) -> None:
    clip = (await api.http.post("/generate", json={"prompt": PROMPT})).json()

    assert (await sdk.videos.retrieve(clip["job_id"])).status == "completed"
    assert json.loads((await api.http.get("/v1/videos")).content)["data"][0]["id"] == clip["job_id"]


async def test_expires_at_is_when_the_clip_is_deleted(tmp_path: Path, log: LogLines) -> None:
    async with open_api(tmp_path / "store", log, clip_retention=timedelta(days=2)) as api, sdk_of(api) as sdk:
        video = await make(sdk)

    assert video.completed_at is not None
    assert video.expires_at == video.completed_at + 2 * 86_400
