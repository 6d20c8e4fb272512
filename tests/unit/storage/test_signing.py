"""Signed URLs: their form, and that nothing but what was signed is accepted."""

from datetime import UTC, datetime, timedelta
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from schemas.errors import UrlExpired, UrlInvalid
from storage.keys import clip_key
from storage.signing import LocalPresigner

SECRET = b"0123456789abcdef"
NOW = datetime(2026, 11, 22, 12, 0, 0, 900_000, tzinfo=UTC)
CLIP_ID = "clip_" + "a" * 32
KEY = clip_key(CLIP_ID, "token")
MINUTE = timedelta(minutes=1)
DISPOSITION = 'inline; filename="a b&c=d.mp4"'

Query = list[tuple[str, str]]


def presigner(at: datetime = NOW, secret: bytes = SECRET) -> LocalPresigner:
    return LocalPresigner("https://video.example/api/", secret, now=lambda: at)


def signed_query(
    method: Literal["GET", "HEAD"] = "GET",
    expires_in: timedelta = MINUTE,
    disposition: str | None = DISPOSITION,
    at: datetime = NOW,
) -> Query:
    signed = presigner(at).presign(KEY, method=method, expires_in=expires_in, response_content_disposition=disposition)
    return parse_qsl(urlsplit(signed.url).query, strict_parsing=True)


def test_presign_makes_the_documented_form() -> None:
    signed = presigner().presign(KEY, expires_in=MINUTE, response_content_disposition=DISPOSITION)
    parts = urlsplit(signed.url)
    assert f"{parts.scheme}://{parts.netloc}{parts.path}" == (f"https://video.example/api/outputs/{CLIP_ID}/token.mp4")
    query = dict(parse_qsl(parts.query, strict_parsing=True))
    assert list(query) == ["expires", "response-content-disposition", "signature"]
    assert query["expires"] == str(int(signed.expires_at.timestamp()))
    assert query["response-content-disposition"] == DISPOSITION
    assert signed.url.isascii()
    assert "+" not in signed.url  # a space is %20, which means the same to every parser


def test_presign_ends_within_the_time_asked_for() -> None:
    assert presigner().presign(KEY, expires_in=MINUTE).expires_at == datetime(2026, 11, 22, 12, 1, tzinfo=UTC)


@pytest.mark.parametrize("disposition", ["", "a\r\nSet-Cookie: b", "a\x00", "ä", "\x7f", "x" * 513])
def test_presign_refuses_what_is_no_header(disposition: str) -> None:
    with pytest.raises(ValueError, match="content disposition"):
        presigner().presign(KEY, expires_in=MINUTE, response_content_disposition=disposition)


def test_presign_refuses_other_methods() -> None:
    with pytest.raises(ValueError, match="only GET and HEAD"):
        presigner().presign(KEY, method="PUT", expires_in=MINUTE)  # type: ignore[arg-type]  # what is refused


def test_presigner_refuses_a_short_secret() -> None:
    with pytest.raises(ValueError, match="at least 16 bytes"):
        presigner(secret=b"")


@pytest.mark.parametrize("disposition", [None, DISPOSITION])
def test_verify_returns_the_signed_disposition(disposition: str | None) -> None:
    assert presigner().verify("GET", KEY, signed_query(disposition=disposition)) == disposition


@pytest.mark.parametrize(("signed", "used"), [("GET", "GET"), ("GET", "HEAD"), ("HEAD", "HEAD")])
def test_verify_serves_head_wherever_it_serves_get(signed: Literal["GET", "HEAD"], used: str) -> None:
    assert presigner().verify(used, KEY, signed_query(signed)) == DISPOSITION


@pytest.mark.parametrize(
    ("signed", "used"), [("HEAD", "GET"), ("GET", "PUT"), ("GET", "get"), ("GET", ""), ("GET", "GET\x00")]
)
def test_verify_refuses_other_methods(signed: Literal["GET", "HEAD"], used: str) -> None:
    with pytest.raises(UrlInvalid):
        presigner().verify(used, KEY, signed_query(signed))


def test_verify_refuses_another_secret() -> None:
    with pytest.raises(UrlInvalid):
        presigner(secret=b"another secret..").verify("GET", KEY, signed_query())


def test_verify_accepts_until_the_last_moment_and_not_after() -> None:
    expires_at = presigner().presign(KEY, expires_in=MINUTE).expires_at
    query = signed_query()
    assert presigner(expires_at - timedelta(microseconds=1)).verify("GET", KEY, query) == DISPOSITION
    with pytest.raises(UrlExpired):
        presigner(expires_at).verify("GET", KEY, query)


def test_verify_tells_nothing_of_time_when_the_signature_is_wrong() -> None:
    query = [(name, "0" * 64 if name == "signature" else value) for name, value in signed_query()]
    with pytest.raises(UrlInvalid):
        presigner(NOW + timedelta(days=1)).verify("GET", KEY, query)


def test_verify_refuses_an_expiry_further_away_than_seven_days() -> None:
    query = signed_query(expires_in=timedelta(days=7), at=NOW + timedelta(seconds=2))
    with pytest.raises(UrlInvalid):
        presigner(NOW).verify("GET", KEY, query)
    assert presigner(NOW + timedelta(seconds=2)).verify("GET", KEY, query) == DISPOSITION


@pytest.mark.parametrize("name", ["expires", "signature", "response-content-disposition"])
def test_verify_refuses_a_missing_and_a_repeated_parameter(name: str) -> None:
    query = signed_query()
    without = [pair for pair in query if pair[0] != name]
    for refused in (without, query + [pair for pair in query if pair[0] == name]):
        with pytest.raises(UrlInvalid):
            presigner().verify("GET", KEY, refused)


def test_verify_refuses_an_unknown_parameter() -> None:
    with pytest.raises(UrlInvalid):
        presigner().verify("GET", KEY, [*signed_query(), ("response-content-type", "text/html")])


@pytest.mark.parametrize("spelling", ["+{}", "0{}", " {}", "{}.0", "{}\n", "{}e0", "0x{}", "-{}", "{}" + "0" * 5000])
def test_verify_refuses_other_spellings_of_the_expiry(spelling: str) -> None:
    query = [(name, spelling.format(value) if name == "expires" else value) for name, value in signed_query()]
    with pytest.raises(UrlInvalid):
        presigner().verify("GET", KEY, query)


def test_verify_refuses_digits_of_other_scripts() -> None:
    arabic = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
    query = [(name, value.translate(arabic) if name != "signature" else value) for name, value in signed_query()]
    with pytest.raises(UrlInvalid):
        presigner().verify("GET", KEY, query)


def test_verify_refuses_an_upper_case_signature() -> None:
    query = [(name, value.upper() if name == "signature" else value) for name, value in signed_query()]
    assert query != signed_query()
    with pytest.raises(UrlInvalid):
        presigner().verify("GET", KEY, query)


def test_verify_does_not_confuse_an_absent_disposition_with_text() -> None:
    query = signed_query(disposition=None)
    for disposition in ("", "null", "None"):
        with pytest.raises(UrlInvalid):
            presigner().verify("GET", KEY, [*query, ("response-content-disposition", disposition)])


@given(
    part=st.integers(0, 5),
    position=st.integers(0, 200),
    character=st.characters() | st.sampled_from("01af&=/"),
)
def test_verify_refuses_any_changed_character(part: int, position: int, character: str) -> None:
    query = signed_query()
    texts = [text for pair in query for text in pair]
    old = texts[part]
    at = position % len(old)
    texts[part] = old[:at] + character + old[at + 1 :]
    assume(texts[part] != old)
    with pytest.raises(UrlInvalid):
        presigner().verify("GET", KEY, list(zip(texts[::2], texts[1::2], strict=True)))


@given(position=st.integers(0, len(KEY) - 1), character=st.characters())
def test_verify_refuses_any_other_key(position: int, character: str) -> None:
    other = KEY[:position] + character + KEY[position + 1 :]
    assume(other != KEY)
    with pytest.raises(UrlInvalid):
        presigner().verify("GET", other, signed_query())


GARBAGE = st.text(st.characters(exclude_categories=()), max_size=80)
NAMES = st.sampled_from(["expires", "signature", "response-content-disposition"]) | GARBAGE
VALUES = st.from_regex(r"[0-9]{1,30}", fullmatch=True) | st.from_regex(r"[0-9a-f]{64}", fullmatch=True) | GARBAGE


@given(st.sampled_from(["GET", "HEAD"]) | GARBAGE, GARBAGE, st.lists(st.tuples(NAMES, VALUES), max_size=5))
@example("GET", KEY, [("expires", "9" * 12), ("signature", "0" * 64)])
@example(
    "GET",
    "\ud800",
    [("expires", "1"), ("signature", "0" * 64), ("response-content-disposition", "\ud800\x00")],
)
@example("GET", KEY, [("expires", "1" * 100_000), ("signature", "0" * 64)])
def test_verify_raises_nothing_but_refusals(method: str, key: str, query: Query) -> None:
    with pytest.raises((UrlInvalid, UrlExpired)):
        presigner().verify(method, key, query)


@given(
    st.integers(1, 7 * 24 * 3600 * 1000),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=512) | st.none(),
)
def test_verify_accepts_what_was_signed(extra_ms: int, disposition: str | None) -> None:
    expires_in = max(timedelta(seconds=1), timedelta(milliseconds=extra_ms))
    query = signed_query(expires_in=expires_in, disposition=disposition)
    assert presigner().verify("GET", KEY, query) == disposition


TOKENS = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
DISPOSITIONS = st.none() | st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=20)
SIGNED = st.tuples(st.sampled_from(["GET", "HEAD"]), TOKENS, st.integers(1, 7 * 24 * 3600), DISPOSITIONS)


@given(SIGNED, SIGNED)
def test_no_two_urls_share_a_signature(
    one: tuple[Literal["GET", "HEAD"], str, int, str | None], other: tuple[Literal["GET", "HEAD"], str, int, str | None]
) -> None:
    def signature(method: Literal["GET", "HEAD"], token: str, seconds: int, disposition: str | None) -> str:
        key, lifetime = clip_key(CLIP_ID, token), timedelta(seconds=seconds)
        signed = presigner().presign(key, method=method, expires_in=lifetime, response_content_disposition=disposition)
        return dict(parse_qsl(urlsplit(signed.url).query))["signature"]

    assert (signature(*one) == signature(*other)) is (one == other)


@given(st.binary(min_size=16, max_size=40), st.binary(min_size=16, max_size=40))
def test_verify_accepts_the_same_secret_only(signing: bytes, verifying: bytes) -> None:
    assume(signing != verifying)
    signed = presigner(secret=signing).presign(KEY, expires_in=MINUTE)
    query = parse_qsl(urlsplit(signed.url).query)
    assert presigner(secret=signing).verify("GET", KEY, query) is None
    with pytest.raises(UrlInvalid):
        presigner(secret=verifying).verify("GET", KEY, query)


@given(st.integers(1, 7 * 24 * 3600), st.integers(-(10**6), 10**6))
def test_verify_accepts_before_the_end_and_at_no_other_time(lifetime_s: int, offset_s: int) -> None:
    query = signed_query(expires_in=timedelta(seconds=lifetime_s))
    expires = int(dict(query)["expires"])
    at = datetime.fromtimestamp(expires + offset_s, UTC)
    if offset_s >= 0:
        with pytest.raises(UrlExpired):
            presigner(at).verify("GET", KEY, query)
    elif offset_s < -7 * 24 * 3600:
        with pytest.raises(UrlInvalid):
            presigner(at).verify("GET", KEY, query)
    else:
        assert presigner(at).verify("GET", KEY, query) == DISPOSITION
