"""What every object store does, whichever it is. `conftest.STORES` lists the stores."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pytest
from store_cases import Answer, StoreCase, race

from storage.keys import clip_key
from storage.store import InvalidKey, InvalidRange, ObjectNotFound, ObjectStat, PreconditionFailed

CLIP = clip_key("clip_" + "a" * 32, "first")
OTHER_CLIP = clip_key("clip_" + "b" * 32, "first")
BODY = bytes(range(256)) * 40
MINUTE = timedelta(minutes=1)
LONGEST = timedelta(days=7)
DISPOSITION = 'inline; filename="clip.mp4"'


@pytest.mark.parametrize("body", [b"", b"\x00", BODY], ids=len)
def test_put_keeps_every_byte(case: StoreCase, body: bytes) -> None:
    written = case.store.put("jobs/a.json", body)
    found = case.store.get("jobs/a.json")
    assert found.body == body
    assert found.stat == case.store.stat("jobs/a.json")
    assert found.stat == replace(written, last_modified=found.stat.last_modified)
    assert (written.key, written.size_bytes) == ("jobs/a.json", len(body))


def test_put_copies_a_file_that_may_go_afterwards(case: StoreCase, tmp_path: Path) -> None:
    source = tmp_path / "source.mp4"
    source.write_bytes(BODY * 500)  # 5 MB, several copy buffers
    stat = case.store.put(CLIP, source)
    source.unlink()
    assert stat.size_bytes == len(BODY) * 500
    assert case.store.get(CLIP).body == BODY * 500


def test_put_replaces_when_unconditional(case: StoreCase) -> None:
    case.store.put(CLIP, b"a long first version")
    case.store.put(CLIP, b"second")
    assert case.store.get(CLIP).body == b"second"


def test_put_stamps_the_time(case: StoreCase) -> None:
    written = case.store.put(CLIP, BODY).last_modified
    assert written.utcoffset() == timedelta(0)
    assert abs(written - datetime.now(UTC)) < MINUTE
    assert abs(written - case.store.stat(CLIP).last_modified) <= timedelta(seconds=2)


def test_put_creates_when_absent(case: StoreCase) -> None:
    case.store.put(CLIP, b"first", if_none_match=True)
    with pytest.raises(PreconditionFailed):
        case.store.put(CLIP, b"second", if_none_match=True)
    assert case.store.get(CLIP).body == b"first"


def test_put_replaces_the_version_it_names(case: StoreCase) -> None:
    first = case.store.put(CLIP, b"1")
    second = case.store.put(CLIP, b"2", if_match=first.etag)
    assert case.store.get(CLIP).stat.etag == second.etag != first.etag
    with pytest.raises(PreconditionFailed):
        case.store.put(CLIP, b"3", if_match=first.etag)
    assert case.store.get(CLIP).body == b"2"


@pytest.mark.parametrize("etag", ["", "*", "0" * 32, 'W/"1"'])
def test_put_refuses_an_etag_that_never_was(case: StoreCase, etag: str) -> None:
    case.store.put(CLIP, b"1")
    with pytest.raises(PreconditionFailed):
        case.store.put(CLIP, b"2", if_match=etag)
    assert case.store.get(CLIP).body == b"1"


def test_put_does_not_revive_what_was_deleted(case: StoreCase) -> None:
    first = case.store.put(CLIP, b"1")
    case.store.delete(CLIP)
    with pytest.raises(PreconditionFailed):
        case.store.put(CLIP, b"2", if_match=first.etag)
    with pytest.raises(ObjectNotFound):
        case.store.stat(CLIP)


def test_put_refuses_both_conditions(case: StoreCase) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        case.store.put(CLIP, b"", if_none_match=True, if_match="etag")


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../b", "a/.b", "a\x00", "a\n", "ä", "x" * 513])
def test_every_method_refuses_an_illegal_key(case: StoreCase, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: case.store.put(key, b""),
        lambda: case.store.get(key),
        lambda: case.store.get_range(key, 0, 1),
        lambda: case.store.stat(key),
        lambda: case.store.delete(key),
        lambda: case.presigner.presign(key, expires_in=MINUTE),
    ]
    for call in calls:
        with pytest.raises(InvalidKey):
            call()


def test_reads_tell_what_is_missing(case: StoreCase) -> None:
    case.store.put(CLIP, BODY)
    for key in (OTHER_CLIP, "clips", CLIP + "/below"):
        for call in (case.store.get, case.store.stat):
            with pytest.raises(ObjectNotFound):
                call(key)
        with pytest.raises(ObjectNotFound):
            case.store.get_range(key, 0, 1)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, 9), (5, 5), (255, 300), (10_239, 10_239), (0, 10_239)])
def test_get_range_includes_both_ends(case: StoreCase, start: int, end: int) -> None:
    case.store.put(CLIP, BODY)
    assert case.store.get_range(CLIP, start, end) == BODY[start : end + 1]


def test_get_range_stops_at_the_end(case: StoreCase) -> None:
    case.store.put(CLIP, BODY)
    assert case.store.get_range(CLIP, len(BODY) - 3, 10**12) == BODY[-3:]


def test_get_range_refuses_a_start_behind_the_end(case: StoreCase) -> None:
    case.store.put(CLIP, BODY)
    with pytest.raises(InvalidRange):
        case.store.get_range(CLIP, len(BODY), len(BODY) + 1)


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (3, 2)])
def test_get_range_refuses_what_is_no_range(case: StoreCase, start: int, end: int) -> None:
    case.store.put(CLIP, BODY)
    with pytest.raises(ValueError, match="range"):
        case.store.get_range(CLIP, start, end)


KEYS = sorted(["a/b-c/d", "a/b/c", "a/b/d", "a/b.x", "a/b0", "a0", "Z/z", "c/1", "c/10", "c/2"])


def test_list_pages_in_the_order_of_the_keys(case: StoreCase) -> None:
    for key in reversed(KEYS):
        case.store.put(key, key.encode())
    for limit in (1, 3, len(KEYS), 1000):
        listed: list[ObjectStat] = []
        after = None
        while True:
            page = case.store.list("", start_after=after, limit=limit)
            assert len(page.stats) <= limit
            listed += page.stats
            after = page.next_after
            if after is None:
                break
        assert [stat.key for stat in listed] == KEYS
        assert listed == [case.store.stat(key) for key in KEYS]


@pytest.mark.parametrize("prefix", ["a", "a/", "a/b", "a/b/", "a/b/c", "c/1", "nothing/", "../", "/"])
def test_list_keeps_to_the_prefix_and_starts_behind(case: StoreCase, prefix: str) -> None:
    for key in KEYS:
        case.store.put(key, b"")
    for after in [None, "a/b", "a/b/c", "a/b/", "zzz", "0"]:
        expected = [key for key in KEYS if key.startswith(prefix) and key > (after or "")]
        page = case.store.list(prefix, start_after=after)
        assert [stat.key for stat in page.stats] == expected
        assert page.next_after is None


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_list_refuses_a_limit_outside_its_bounds(case: StoreCase, limit: int) -> None:
    with pytest.raises(ValueError, match="1 to 1000"):
        case.store.list("", limit=limit)


def test_delete_happens_once_and_may_be_repeated(case: StoreCase) -> None:
    case.store.put(CLIP, BODY)
    case.store.put(OTHER_CLIP, BODY)
    case.store.delete(CLIP)
    case.store.delete(CLIP)
    case.store.delete("clips")
    with pytest.raises(ObjectNotFound):
        case.store.get(CLIP)
    assert [stat.key for stat in case.store.list("").stats] == [OTHER_CLIP]


def test_check_passes_and_leaves_nothing(case: StoreCase) -> None:
    case.store.check()
    assert case.store.list("").stats == ()


def test_create_has_one_winner_among_16_processes(case: StoreCase) -> None:
    keys = [f"race/{number}" for number in range(12)]
    won_by = race(case.open_store, 16, "create", ",".join(keys))
    assert sorted(key for won in won_by for key in won.split(",") if key) == sorted(keys)
    for number, won in enumerate(won_by):
        for key in filter(None, won.split(",")):
            assert case.store.get(key).body == str(number).encode()


def test_compare_and_swap_loses_no_update_between_processes(case: StoreCase) -> None:
    case.store.put("counter", b"0")
    lost = race(case.open_store, 8, "increment", "counter", "25")
    assert case.store.get("counter").body == b"200"
    assert sum(map(int, lost)) > 0, "the processes never met, so this proved nothing"


def test_put_leaves_nothing_visible_when_its_process_dies(case: StoreCase) -> None:
    case.crash_in_put(CLIP)
    with pytest.raises(ObjectNotFound):
        case.store.get(CLIP)
    assert case.store.list("").stats == ()
    reopened = case.open_store()
    reopened.put(CLIP, BODY, if_none_match=True)
    assert reopened.get(CLIP).body == BODY


def signed_clip(case: StoreCase) -> str:
    case.store.put(CLIP, BODY)
    case.store.put(OTHER_CLIP, b"other")
    return case.presigner.presign(CLIP, expires_in=MINUTE, response_content_disposition=DISPOSITION).url


def with_query(url: str, query: list[tuple[str, str]]) -> str:
    return urlunsplit(urlsplit(url)._replace(query=urlencode(query)))


def assert_refused(answer: Answer) -> None:
    assert answer.status in (400, 403)
    assert BODY not in answer.body


def test_presigned_get_answers_the_clip(case: StoreCase) -> None:
    answer = case.fetch(signed_clip(case))
    assert (answer.status, answer.body) == (200, BODY)
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["content-disposition"] == DISPOSITION


def test_presigned_get_needs_no_disposition(case: StoreCase) -> None:
    case.store.put(CLIP, BODY)
    answer = case.fetch(case.presigner.presign(CLIP, expires_in=MINUTE).url)
    assert (answer.status, answer.body) == (200, BODY)
    assert "content-disposition" not in answer.headers


def test_presigned_head_answers_the_size(case: StoreCase) -> None:
    case.store.put(CLIP, BODY)
    url = case.presigner.presign(CLIP, method="HEAD", expires_in=MINUTE).url
    answer = case.fetch(url, "HEAD")
    assert (answer.status, answer.headers["content-length"]) == (200, str(len(BODY)))


def test_presigned_url_of_a_missing_clip_is_not_found(case: StoreCase) -> None:
    assert case.fetch(case.presigner.presign(CLIP, expires_in=MINUTE).url).status == 404


def test_presigned_url_dies_when_it_says(case: StoreCase) -> None:
    case.store.put(CLIP, BODY)
    signed = case.presigner.presign(CLIP, expires_in=timedelta(seconds=2))
    assert case.fetch(signed.url).status == 200
    case.wait_until(signed.expires_at)
    answer = case.fetch(signed.url)
    assert answer.status == 403
    assert BODY not in answer.body


def test_presigned_url_names_its_end(case: StoreCase) -> None:
    before = datetime.now(UTC)
    signed = case.presigner.presign(CLIP, expires_in=LONGEST)
    assert signed.expires_at.utcoffset() == timedelta(0)
    assert signed.expires_at.microsecond == 0
    assert abs(signed.expires_at - before - LONGEST) < MINUTE


def test_presigned_url_is_refused_when_any_part_of_its_query_changes(case: StoreCase) -> None:
    url = signed_clip(case)
    query = parse_qsl(urlsplit(url).query)
    assert len(query) >= 3
    for position, (name, value) in enumerate(query):
        changed = value[:-1] + ("0" if value[-1] != "0" else "1")
        assert_refused(case.fetch(with_query(url, [*query[:position], (name, changed), *query[position + 1 :]])))


def test_presigned_url_is_refused_when_any_part_of_its_query_is_missing(case: StoreCase) -> None:
    url = signed_clip(case)
    query = parse_qsl(urlsplit(url).query)
    for position in range(len(query)):
        assert_refused(case.fetch(with_query(url, query[:position] + query[position + 1 :])))
    assert_refused(case.fetch(with_query(url, [])))


def test_presigned_url_is_refused_for_another_key(case: StoreCase) -> None:
    url = signed_clip(case)
    other = case.presigner.presign(OTHER_CLIP, expires_in=MINUTE).url
    mixed = urlunsplit(urlsplit(other)._replace(query=urlsplit(url).query))
    assert_refused(case.fetch(mixed))
    assert case.fetch(other).body == b"other"


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_presigned_url_is_refused_for_another_method(case: StoreCase, method: str) -> None:
    assert_refused(case.fetch(signed_clip(case), method))
    assert case.store.get(CLIP).body == BODY


def test_presigned_head_serves_no_get(case: StoreCase) -> None:
    case.store.put(CLIP, BODY)
    assert_refused(case.fetch(case.presigner.presign(CLIP, method="HEAD", expires_in=MINUTE).url))


@pytest.mark.parametrize(
    "expires_in",
    [LONGEST + timedelta(microseconds=1), timedelta(microseconds=999_999), timedelta(0), -MINUTE],
)
def test_presign_refuses_a_lifetime_outside_its_bounds(case: StoreCase, expires_in: timedelta) -> None:
    with pytest.raises(ValueError, match="lives 1 to 604800 seconds"):
        case.presigner.presign(CLIP, expires_in=expires_in)
