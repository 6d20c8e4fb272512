"""Keys: what is one, and that none leads out of a folder."""

import re
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.jobs import clip_id_of, new_job_id
from storage.keys import (
    MAX_KEY_CHARS,
    check_key,
    clip_key,
    clip_prefix,
    job_key,
    output_key,
    parse_clip_key,
    parse_output_key,
    thumbnail_key,
)
from storage.store import InvalidKey

CLIP_ID = "clip_" + "0123456789abcdef" * 2
JOB_ID = "job_" + "0123456789abcdef" * 2


def test_check_key_accepts_every_key_of_the_scheme() -> None:
    job_id = new_job_id()
    for key in (job_key(job_id), clip_key(clip_id_of(job_id), "token-1_B")):
        assert check_key(key) == key


@pytest.mark.parametrize("key", ["a", "-", "_a.b-c/d", "a/b/c/d", "x" * 255, "/".join(["x" * 127] * 4)])
def test_check_key_accepts_legal_keys(key: str) -> None:
    assert check_key(key) == key


ILLEGAL_KEYS = [
    *("", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/..", "a/../b", "a..b", ".a", "a/.tmp", ".secret"),
    *("a\\b", "a b", "a\n", "a\x00", "a%2e", "a:b", "~", "ä", "a\u0660", "\ud800", "\N{KELVIN SIGN}"),
    *("x" * 256, "x" * 513, "/".join(["x" * 127] * 4) + "yz"),
]


@pytest.mark.parametrize("key", ILLEGAL_KEYS)
def test_check_key_refuses_illegal_keys(key: str) -> None:
    with pytest.raises(InvalidKey) as refusal:
        check_key(key)
    assert str(refusal.value) == "not a legal object key"


@given(st.text(alphabet=st.sampled_from("ab./\\\x00~-_\n é"), max_size=12) | st.text())
@example("a/./b")
def test_check_key_lets_nothing_out_of_the_folder(key: str) -> None:
    try:
        check_key(key)
    except InvalidKey:
        return
    folder = Path("/folder")
    assert (folder / key).resolve().is_relative_to(folder)
    assert PurePosixPath(key).as_posix() == key  # one spelling only
    assert len(key) <= MAX_KEY_CHARS
    assert not any(part.startswith(".") for part in key.split("/"))


@given(st.from_regex(r"clip_[0-9a-f]{32}", fullmatch=True), st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
def test_clip_key_round_trips(clip_id: str, attempt_token: str) -> None:
    key = clip_key(clip_id, attempt_token)
    assert parse_clip_key(key) == (clip_id, attempt_token)
    assert check_key(key) == key


@given(st.text(), st.text())
@example(CLIP_ID, "a/b")
@example(CLIP_ID, "")
@example(CLIP_ID, "x" * 65)
@example(CLIP_ID + "/a", "b")
@example(CLIP_ID.upper(), "a")
@example("job_" + "0" * 32, "a")
@example(CLIP_ID, "a.mp4/../b")
@example(CLIP_ID, "a\n")
def test_clip_key_refuses_anything_else(clip_id: str, attempt_token: str) -> None:
    with pytest.raises(InvalidKey):
        clip_key(clip_id, attempt_token)


@given(st.text())
@example(f"clips/{CLIP_ID}/a.mp4\n")
@example(f"clips/{CLIP_ID}/a.png")
@example(f"clips/{CLIP_ID}/a/b.mp4")
@example(f"/clips/{CLIP_ID}/a.mp4")
@example(f"jobs/{JOB_ID}.json")
def test_parse_clip_key_refuses_anything_else(key: str) -> None:
    with pytest.raises(InvalidKey):
        parse_clip_key(key)


@pytest.mark.parametrize(
    "job_id",
    ["", "job_", JOB_ID + "0", JOB_ID + "\n", JOB_ID.upper(), CLIP_ID, f"../{JOB_ID}", "job_" + "٠" * 32],
)
def test_job_key_refuses_what_is_no_job_id(job_id: str) -> None:
    with pytest.raises(InvalidKey):
        job_key(job_id)


@given(st.from_regex(r"(job_)?[0-9a-fA-F]{31,33}\n?", fullmatch=True) | st.text())
def test_job_key_is_a_legal_key_or_refused(job_id: str) -> None:
    if re.fullmatch(r"job_[0-9a-f]{32}", job_id):
        assert check_key(job_key(job_id)) == f"jobs/{job_id}.json"
    else:
        with pytest.raises(InvalidKey):
            job_key(job_id)


@given(st.from_regex(r"(clips/)?clip_[0-9a-f]{31,33}/[A-Za-z0-9._/-]{0,66}(\.mp4)?\n?", fullmatch=True))
def test_parse_clip_key_takes_only_what_clip_key_makes(key: str) -> None:
    try:
        parts = parse_clip_key(key)
    except InvalidKey:
        return
    assert clip_key(*parts) == key
    assert check_key(key) == key


def test_job_key_names_the_record() -> None:
    assert job_key(JOB_ID) == f"jobs/{JOB_ID}.json"


def test_thumbnail_lies_beside_its_clip_where_a_delete_finds_it() -> None:
    clip = clip_key(CLIP_ID, "token-1_B")
    key = thumbnail_key(clip)
    assert key == f"clips/{CLIP_ID}/token-1_B.jpg"
    assert check_key(key).startswith(clip_prefix(CLIP_ID, "token-1_B"))
    with pytest.raises(InvalidKey):
        thumbnail_key(key)


@pytest.mark.parametrize("name", ["token.mp4", "token.jpg"])
def test_output_key_round_trips(name: str) -> None:
    key = output_key(CLIP_ID, name)
    assert parse_output_key(key) == (CLIP_ID, name)


@pytest.mark.parametrize(
    "name", ["token", "token.png", "token.jpg.mp4", "a/b.jpg", "../b.jpg", ".jpg", "token.JPG", ""]
)
def test_output_key_refuses_everything_else(name: str) -> None:
    with pytest.raises(InvalidKey):
        output_key(CLIP_ID, name)
