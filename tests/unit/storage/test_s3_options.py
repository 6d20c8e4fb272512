"""How an S3 bucket is named, and what its presigned URLs look like; nothing here has a server."""

import pickle
import socket
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl, urlsplit

import pytest
from minio.credentials import Credentials
from minio.credentials.providers import Provider, StaticProvider
from pydantic import ValidationError

from storage.keys import clip_key, job_key
from storage.s3_options import S3Options
from storage.s3_presigner import S3Presigner
from storage.store import InvalidKey

NOW = datetime(2026, 11, 22, 12, 0, 0, 900_000, tzinfo=UTC)
KEY = clip_key("clip_" + "a" * 32, "token")
MINUTE = timedelta(minutes=1)
OPTIONS = S3Options(
    endpoint="http://minio.internal:9000", public_endpoint="https://videos.example", bucket="clips", prefix="wan/"
)
CREDENTIALS = StaticProvider("key", "secret")


def test_options_take_a_url_with_a_slash() -> None:
    assert S3Options(endpoint="https://s3.example.com/", bucket="clips").endpoint == "https://s3.example.com"


@pytest.mark.parametrize(
    "endpoint",
    ["", "s3.example.com", "127.0.0.1:9000", "ftp://a", "http://", "http://a/b", "http://a?b", "http://k:s@a"],
)
def test_options_refuse_what_is_no_endpoint(endpoint: str) -> None:
    for field in ("endpoint", "public_endpoint"):
        with pytest.raises(ValidationError):
            S3Options.model_validate({"endpoint": "http://a", "bucket": "clips", field: endpoint})


@pytest.mark.parametrize("prefix", ["wan", "/", "/wan/", "wan//", "../", ".wan/", "a b/", "ä/", "x" * 200 + "/"])
def test_options_refuse_what_is_no_prefix(prefix: str) -> None:
    with pytest.raises(ValidationError):
        S3Options(endpoint="http://a", bucket="clips", prefix=prefix)


@pytest.mark.parametrize("bucket", ["", "ab", "Clips", "clips/", "a_b", "-clips", "x" * 64])
def test_options_refuse_what_is_no_bucket(bucket: str) -> None:
    with pytest.raises(ValidationError):
        S3Options(endpoint="http://a", bucket=bucket)


def test_options_travel_between_processes() -> None:
    assert pickle.loads(pickle.dumps(OPTIONS)) == OPTIONS  # noqa: S301  # made one line before


def presigner(credentials: Provider = CREDENTIALS, options: S3Options = OPTIONS) -> S3Presigner:
    return S3Presigner(options, credentials, now=lambda: NOW)


def test_presign_makes_the_documented_form() -> None:
    signed = presigner().presign(KEY, expires_in=MINUTE, response_content_disposition='inline; filename="a b.mp4"')
    parts = urlsplit(signed.url)
    assert f"{parts.scheme}://{parts.netloc}{parts.path}" == f"https://videos.example/clips/wan/{KEY}"
    query = dict(parse_qsl(parts.query, strict_parsing=True))
    assert query["X-Amz-Date"] == "20261122T120000Z"
    assert query["X-Amz-Expires"] == "60"
    assert query["X-Amz-Credential"] == "key/20261122/us-east-1/s3/aws4_request"
    assert query["response-content-disposition"] == 'inline; filename="a b.mp4"'
    assert "secret" not in signed.url


def test_presign_ends_within_the_time_asked_for() -> None:
    signed = presigner().presign(KEY, expires_in=timedelta(seconds=60, milliseconds=999))
    assert signed.expires_at == datetime(2026, 11, 22, 12, 1, tzinfo=UTC)


def test_presign_signs_the_endpoint_without_a_public_one() -> None:
    options = OPTIONS.model_copy(update={"public_endpoint": None})
    assert presigner(options=options).presign(KEY, expires_in=MINUTE).url.startswith("http://minio.internal:9000/")


def test_presign_opens_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    presigner().presign(KEY, expires_in=MINUTE)


def test_presign_says_when_temporary_credentials_end_the_url() -> None:
    class Temporary(Provider):
        def retrieve(self) -> Credentials:
            return Credentials("key", "secret", "token", NOW + timedelta(minutes=10))

    for expires_in, expected in ((MINUTE, MINUTE), (timedelta(hours=1), timedelta(minutes=10))):
        signed = presigner(Temporary()).presign(KEY, expires_in=expires_in)
        assert signed.expires_at == NOW.replace(microsecond=0) + expected
        assert "X-Amz-Security-Token=token" in signed.url


def test_presign_signs_clips_only() -> None:
    for key in (job_key("job_" + "a" * 32), ".check", "clips"):
        with pytest.raises(InvalidKey):
            presigner().presign(key, expires_in=MINUTE)


@pytest.mark.parametrize("disposition", ["", "a\r\nSet-Cookie: b", "a\x00", "ä", "\x7f", "x" * 513])
def test_presign_refuses_what_is_no_header(disposition: str) -> None:
    with pytest.raises(ValueError, match="content disposition"):
        presigner().presign(KEY, expires_in=MINUTE, response_content_disposition=disposition)
