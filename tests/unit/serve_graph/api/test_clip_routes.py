"""The bytes behind a signed URL: who gets them, and how."""

import re
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import pytest
from answers import assert_nothing_of_the_inside, problem_of
from api_under_test import Api, send_raw
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import CLIP_BYTES, PUBLIC_URL

from schemas.clips import Clip

SIZE = len(CLIP_BYTES)
CONTENT_RANGE = re.compile(rf"bytes ([0-9]+)-([0-9]+)/{SIZE}")

many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
positions = st.integers(0, 2 * SIZE) | st.sampled_from([SIZE - 1, SIZE, SIZE + 1, 10**17])
header_values = st.binary(max_size=40).map(lambda value: re.sub(rb"[\x00-\x1f\x7f]", b"", value).strip())
url_characters = st.sampled_from("0123456789abcdef%&=+./?;, ~") | st.characters(max_codepoint=0x7F)
range_like = st.from_regex(rb"(bytes ?= ?)?[0-9, -]{0,12}", fullmatch=True).map(bytes.strip)


@pytest.fixture
async def clip(api: Api) -> Clip:
    answer = await api.http.post("/generate", json={"prompt": "a red circle"})
    assert answer.status_code == 200
    return Clip.model_validate_json(answer.content)


def changed(url: str, **query: str | None) -> str:
    """The URL with other query parameters; None takes one out."""
    parts = urlsplit(url)
    pairs = {**dict(parse_qsl(parts.query)), **query}
    kept = {name: value for name, value in pairs.items() if value is not None}
    return parts._replace(query=urlencode(kept)).geturl()


async def test_get_answers_the_bytes_with_the_headers_of_a_video(api: Api, clip: Clip) -> None:
    answer = await api.http.get(clip.output_url)

    assert answer.status_code == 200
    assert answer.content == CLIP_BYTES
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-disposition"] == f'inline; filename="{clip.clip_id}.mp4"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"].startswith("private")
    assert answer.headers["etag"].strip('"')
    assert answer.headers["last-modified"]
    assert answer.headers["x-request-id"]
    assert_nothing_of_the_inside(answer, api.jobs.store.folder)


async def test_head_answers_the_same_headers_and_no_bytes(api: Api, clip: Clip) -> None:
    got, head = await api.http.get(clip.output_url), await api.http.head(clip.output_url)

    assert head.status_code == 200
    assert head.content == b""
    assert {**head.headers, "x-request-id": ""} == {**got.headers, "x-request-id": ""}


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-9", 0, 9),
        ("bytes=100-199", 100, 199),
        ("bytes=10-", 10, SIZE - 1),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE - 1),
        ("bytes=10-999999999999999999", 10, SIZE - 1),
        ("bytes=-1", SIZE - 1, SIZE - 1),
        ("bytes=-10", SIZE - 10, SIZE - 1),
        ("bytes=-999999999999999999", 0, SIZE - 1),
    ],
)
async def test_get_answers_a_part(api: Api, clip: Clip, asked: str, first: int, last: int) -> None:
    answer = await api.http.get(clip.output_url, headers={"range": asked})

    assert answer.status_code == 206
    assert answer.content == CLIP_BYTES[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{SIZE}"
    assert answer.headers["content-length"] == str(last - first + 1)
    assert answer.headers["content-type"] == "video/mp4"


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=9-0",
        "bytes=0-1,5-6",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=--1",
        "lines=0-1",
        "0-1",
        "bytes=1-2-3",
        "@",
    ],
)
async def test_get_answers_the_whole_where_the_range_is_none_that_is_served(api: Api, clip: Clip, asked: str) -> None:
    answer = await api.http.get(clip.output_url, headers={"range": asked})

    assert answer.status_code == 200
    assert answer.content == CLIP_BYTES
    assert "content-range" not in answer.headers


@pytest.mark.parametrize(
    "asked", [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 5}", "bytes=999999999999999999-", "bytes=-0"]
)
async def test_get_refuses_a_range_behind_the_end(api: Api, clip: Clip, asked: str) -> None:
    answer = await api.http.get(clip.output_url, headers={"range": asked})

    assert str(SIZE) in problem_of(answer, 416, "range-not-satisfiable").detail
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


async def test_get_answers_the_part_only_of_the_version_that_if_range_names(api: Api, clip: Clip) -> None:
    etag = (await api.http.get(clip.output_url)).headers["etag"]

    same = await api.http.get(clip.output_url, headers={"range": "bytes=0-9", "if-range": etag})
    other = await api.http.get(clip.output_url, headers={"range": "bytes=0-9", "if-range": '"other"'})
    assert (same.status_code, other.status_code) == (206, 200)
    assert other.content == CLIP_BYTES


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', "*"])
async def test_get_answers_no_bytes_to_who_has_them(api: Api, clip: Clip, form: str) -> None:
    etag = (await api.http.get(clip.output_url)).headers["etag"]
    answer = await api.http.get(clip.output_url, headers={"if-none-match": form.format(etag)})

    assert answer.status_code == 304
    assert answer.content == b""
    assert answer.headers["etag"] == etag


async def test_get_answers_the_bytes_to_who_has_others(api: Api, clip: Clip) -> None:
    answer = await api.http.get(clip.output_url, headers={"if-none-match": '"other"'})

    assert answer.status_code == 200


async def test_url_works_until_it_expires_and_not_after(api: Api, clip: Clip) -> None:
    left_s = (clip.expires_at - api.jobs.clock.now).total_seconds()
    api.jobs.clock.forward(left_s - 1)
    assert (await api.http.get(clip.output_url)).status_code == 200

    api.jobs.clock.forward(1)
    problem_of(await api.http.get(clip.output_url), 403, "url-expired")
    head = await api.http.head(clip.output_url)
    assert (head.status_code, head.headers["content-type"]) == (403, "application/problem+json")


@pytest.mark.parametrize(
    "query",
    [
        {"signature": "0" * 64},
        {"signature": ""},
        {"signature": None},
        {"expires": "9999999999"},
        {"expires": "-1"},
        {"expires": None},
        {"response-content-disposition": "attachment"},
        {"response-content-disposition": None},
        {"more": "1"},
    ],
    ids=str,
)
async def test_url_is_refused_when_its_query_was_changed(api: Api, clip: Clip, query: dict[str, str | None]) -> None:
    answer = await api.http.get(changed(clip.output_url, **query))

    problem_of(answer, 403, "url-invalid")
    assert "signature=" not in answer.text


async def test_url_is_refused_when_its_query_is_stripped_or_doubled(api: Api, clip: Clip) -> None:
    bare, _, query = clip.output_url.partition("?")

    for url in (bare, bare + "?", f"{bare}?{query}&{query}", f"{bare}?{query.upper()}"):
        problem_of(await api.http.get(url), 403, "url-invalid")


async def test_url_is_refused_for_another_clip(api: Api, clip: Clip) -> None:
    other = Clip.model_validate_json((await api.http.post("/generate", json={"prompt": "b"})).content)
    query = urlsplit(clip.output_url).query

    problem_of(await api.http.get(urlsplit(other.output_url)._replace(query=query).geturl()), 403, "url-invalid")


async def test_url_is_refused_for_other_methods(api: Api, clip: Clip) -> None:
    for method in ("POST", "PUT", "DELETE"):
        problem_of(await api.http.request(method, clip.output_url), 405, "method-not-allowed")


async def test_url_of_a_clip_that_is_gone_is_not_found(api: Api, clip: Clip) -> None:
    for stat in api.jobs.store.list("clips/").stats:
        api.jobs.store.delete(stat.key)

    problem_of(await api.http.get(clip.output_url), 404, "clip-not-found")


@given(first=positions, last=st.none() | positions)
@many
async def test_get_answers_any_range_as_http_means_it(api: Api, clip: Clip, first: int, last: int | None) -> None:
    answer = await api.http.get(clip.output_url, headers={"range": f"bytes={first}-{'' if last is None else last}"})

    end = SIZE - 1 if last is None else last
    if end < first < SIZE or (last is not None and last < first):
        assert (answer.status_code, answer.content) == (200, CLIP_BYTES)
    elif first >= SIZE:
        problem_of(answer, 416, "range-not-satisfiable")
    else:
        assert (answer.status_code, answer.content) == (206, CLIP_BYTES[first : end + 1])


@given(count=positions)
@many
async def test_get_answers_any_last_bytes_as_http_means_it(api: Api, clip: Clip, count: int) -> None:
    answer = await api.http.get(clip.output_url, headers={"range": f"bytes=-{count}"})

    if count == 0:
        problem_of(answer, 416, "range-not-satisfiable")
    else:
        assert (answer.status_code, answer.content) == (206, CLIP_BYTES[-count:])


@given(ranges=st.lists(header_values | range_like, min_size=1, max_size=2), if_range=st.none() | header_values)
@example(ranges=[b"bytes=0-1", b"bytes=2-3,5-"], if_range=None)
@example(ranges=[b"bytes=" + b"9" * 5_000 + b"-"], if_range=None)
@many
async def test_get_answers_right_bytes_whatever_the_range(
    api: Api, clip: Clip, ranges: list[bytes], if_range: bytes | None
) -> None:
    headers = [(b"range", value) for value in ranges] + ([] if if_range is None else [(b"if-range", if_range)])
    answer = await api.http.get(clip.output_url, headers=headers)

    if answer.status_code == 206:
        part = CONTENT_RANGE.fullmatch(answer.headers["content-range"])
        assert part is not None
        assert answer.content == CLIP_BYTES[int(part[1]) : int(part[2]) + 1]
    elif answer.status_code == 416:
        problem_of(answer, 416, "range-not-satisfiable")
    else:
        assert (answer.status_code, answer.content) == (200, CLIP_BYTES)


@given(known=header_values)
@many
async def test_get_answers_any_if_none_match(api: Api, clip: Clip, known: bytes) -> None:
    answer = await api.http.get(clip.output_url, headers={b"if-none-match": known})

    assert (answer.status_code, answer.content) == ((304, b"") if known == b"*" else (200, CLIP_BYTES))


@given(
    at=st.integers(0, 300),
    removed=st.integers(0, 2),
    inserted=st.text(url_characters, max_size=3),
)
@many
async def test_no_changed_url_gets_the_bytes(api: Api, clip: Clip, at: int, removed: int, inserted: str) -> None:
    target = clip.output_url.removeprefix(PUBLIC_URL)
    at %= len(target)
    changed_target = target[:at] + inserted + target[at + removed :]
    if not changed_target.startswith("/"):
        changed_target = "/" + changed_target
    answer = await send_raw(api, "GET", changed_target)

    assert answer.status_code < 500
    if answer.status_code == 200 and answer.content == CLIP_BYTES:
        assert meaning(changed_target) == meaning(target)
    if meaning(changed_target) == meaning(target):
        assert answer.status_code == 200


def meaning(target: str) -> tuple[str, list[tuple[str, str]]]:
    """What a request target says, however it spells it."""
    path, _, query = target.partition("?")
    return unquote(path), sorted(parse_qsl(query, keep_blank_values=True))
