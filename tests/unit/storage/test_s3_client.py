"""Requests to S3 against servers that misbehave: what is repeated, how long it takes, what callers are told."""

import json
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from minio.credentials.providers import StaticProvider
from s3_servers.http import Request, Response, black_hole, http_server

from schemas.errors import StoreFull, StoreUnavailable
from storage.s3 import S3Store
from storage.s3_client import RefusedRepetition, S3Client
from storage.s3_credentials import found_credentials
from storage.s3_errors import BucketMissing, NotSupported
from storage.s3_options import S3Options
from storage.store import InvalidRange, ObjectNotFound, PreconditionFailed

SECRET = "the-secret-key"
CREDENTIALS = StaticProvider("the-access-key", SECRET)
KEY = "jobs/secret-name.json"


def options(endpoint: str, **changes: object) -> S3Options:
    return S3Options(endpoint=endpoint, bucket="the-bucket", prefix="the-prefix/").model_copy(update=changes)


def s3_error(status: int, code: str) -> Response:
    body = f"<Error><Code>{code}</Code><Message>m</Message><Resource>/the-bucket/{KEY}</Resource></Error>".encode()
    return Response(status, {"content-type": "application/xml"}, body)


class Script:
    """Answers one response after another, the last one for ever; keeps what it was asked."""

    def __init__(self, *responses: Response | None) -> None:
        self._responses = list(responses)
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> Response | None:
        self.requests.append(request)
        return self._responses.pop(0) if len(self._responses) > 1 else self._responses[0]


@pytest.mark.parametrize(
    ("response", "error", "requests"),
    [
        (s3_error(404, "NoSuchKey"), ObjectNotFound, 1),
        (s3_error(404, "NoSuchBucket"), BucketMissing, 1),
        (s3_error(412, "PreconditionFailed"), PreconditionFailed, 1),
        (s3_error(416, "InvalidRange"), InvalidRange, 1),
        (s3_error(403, "QuotaExceeded"), StoreFull, 1),
        (s3_error(400, "EntityTooLarge"), StoreFull, 1),
        (s3_error(507, "XMinioStorageFull"), StoreFull, 1),
        (Response(507), StoreFull, 1),
        (Response(413, {}, b"too large"), StoreFull, 1),
        (s3_error(403, "AccessDenied"), StoreUnavailable, 1),
        (s3_error(403, "SignatureDoesNotMatch"), StoreUnavailable, 1),
        (s3_error(403, "RequestTimeTooSkewed"), StoreUnavailable, 1),
        (s3_error(400, "ExpiredToken"), StoreUnavailable, 1),
        (s3_error(301, "PermanentRedirect"), StoreUnavailable, 1),
        (Response(307, {"location": "http://127.0.0.1:1/"}), StoreUnavailable, 1),
        (s3_error(501, "NotImplemented"), NotSupported, 1),
        (Response(501), NotSupported, 1),
        (s3_error(400, "SomethingNew"), StoreUnavailable, 1),
        (s3_error(503, "SlowDown"), StoreUnavailable, 3),
        (s3_error(500, "InternalError"), StoreUnavailable, 3),
        (s3_error(409, "ConditionalRequestConflict"), StoreUnavailable, 3),
        (Response(502, {"content-type": "text/html"}, b"<html>bad gateway"), StoreUnavailable, 3),
        (Response(503, {"retry-after": "3600"}), StoreUnavailable, 3),
        (Response(200, {"content-length": "10", "connection": "close"}, b"short"), StoreUnavailable, 3),
        (Response(404, {"content-type": "application/xml"}, b"<no xml"), StoreUnavailable, 1),
        (Response(404, {"content-type": "application/xml"}, b"\xff\xfe"), StoreUnavailable, 1),
        (None, StoreUnavailable, 3),
    ],
    ids=lambda value: str(getattr(value, "__name__", getattr(value, "status", value))),
)
def test_failures_are_translated_and_repeated_when_they_pass(
    response: Response | None, error: type[Exception], requests: int
) -> None:
    script = Script(response)
    with http_server(script) as endpoint:
        client = S3Client(options(endpoint, read_timeout_s=1), CREDENTIALS)
        with pytest.raises(error) as raised:
            client.send("PUT", KEY, body=b"x")
    assert type(raised.value) is error
    assert len(script.requests) == requests
    for secret in (SECRET, "the-access-key", "the-bucket", "secret-name", "127.0.0.1"):
        assert secret not in str(raised.value)


def test_passing_failures_are_repeated_until_they_pass() -> None:
    script = Script(None, s3_error(503, "SlowDown"), Response(200, {"etag": '"e"'}))
    with http_server(script) as endpoint:
        assert S3Store(options(endpoint), CREDENTIALS).put(KEY, b"x").etag == "e"
    assert [request.body for request in script.requests] == [b"x"] * 3


@pytest.mark.parametrize(
    ("first", "doubtful"),
    [(None, True), (s3_error(500, "InternalError"), True), (s3_error(500, "UnknownError"), False)],
    ids=["lost-answer", "error", "ceph-race"],
)
def test_refusal_of_a_repetition_says_whether_the_first_try_may_have_worked(
    first: Response | None, doubtful: bool
) -> None:
    with http_server(Script(first, s3_error(412, "PreconditionFailed"))) as endpoint:
        client = S3Client(options(endpoint), CREDENTIALS)
        with pytest.raises(RefusedRepetition) as refusal:
            client.send("PUT", KEY, headers={"If-None-Match": "*"}, body=b"x")
    assert refusal.value.doubtful is doubtful


def test_refused_port_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        store = S3Store(options(f"http://127.0.0.1:{taken.getsockname()[1]}"), CREDENTIALS)
        for call in (lambda: store.get(KEY), store.check):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="can't be reached"):
                call()
            assert time.monotonic() - began < 1


def test_black_hole_costs_one_read_timeout() -> None:
    with black_hole() as endpoint:
        store = S3Store(options(endpoint, read_timeout_s=0.5, check_timeout_s=0.2), CREDENTIALS)
        calls: list[tuple[Callable[[], object], float]] = [(lambda: store.get(KEY), 0.5), (store.check, 0.2)]
        for call, timeout_s in calls:
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="does not answer"):
                call()
            assert timeout_s <= time.monotonic() - began < timeout_s + 0.5


def test_check_never_waits_longer_than_reads() -> None:
    with black_hole() as endpoint:
        store = S3Store(options(endpoint, read_timeout_s=0.2, check_timeout_s=60), CREDENTIALS)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.check()
        assert time.monotonic() - began < 1


def test_check_of_a_full_store_is_unavailable() -> None:
    with http_server(Script(s3_error(403, "QuotaExceeded"))) as endpoint:
        store = S3Store(options(endpoint), CREDENTIALS)
        with pytest.raises(StoreUnavailable, match="no space left"):
            store.check()


def test_missing_credentials_are_told_and_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY", "MINIO_ACCESS_KEY", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    script = Script(Response(200))
    with http_server(script) as endpoint, http_server(Script(Response(404))) as metadata:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{metadata}/role")
        store = S3Store(options(endpoint), found_credentials())
        with pytest.raises(StoreUnavailable, match="has no credentials"):
            store.get(KEY)
    assert script.requests == []


def test_role_gives_credentials_with_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    role = {"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "t", "Expiration": "2999-01-01T00:00:00Z"}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY", "MINIO_ACCESS_KEY", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    script = Script(Response(204))
    body = json.dumps(role).encode()
    with http_server(script) as endpoint, http_server(Script(Response(200, {}, body))) as metadata:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{metadata}/role")
        S3Store(options(endpoint), found_credentials()).delete(KEY)
    assert script.requests[0].headers["x-amz-security-token"] == "t"


@pytest.mark.parametrize("etag", ["", "*", '"a"', "a b", "a,b", "a\r\nb"])
def test_replace_sends_nothing_for_what_is_no_etag(etag: str) -> None:
    script = Script(Response(200))
    with http_server(script) as endpoint, pytest.raises(PreconditionFailed):
        S3Store(options(endpoint), CREDENTIALS).put(KEY, b"", if_match=etag)
    assert script.requests == []


@pytest.mark.parametrize(("start", "expected"), [(0, b"01"), (8, b"89"), (9, b"9")])
def test_get_range_works_when_the_server_ignores_it(start: int, expected: bytes) -> None:
    with http_server(Script(Response(200, {}, b"0123456789"))) as endpoint:
        store = S3Store(options(endpoint), CREDENTIALS)
        assert store.get_range(KEY, start, start + 1) == expected
        with pytest.raises(InvalidRange):
            store.get_range(KEY, 10, 11)


def test_list_of_what_is_no_s3_is_unavailable() -> None:
    bodies = (b"<html>", b"<html/>", b"", b"<ListBucketResult><Contents/></ListBucketResult>")
    with http_server(Script(*(Response(200, {}, body) for body in bodies))) as endpoint:
        store = S3Store(options(endpoint), CREDENTIALS)
        for _ in bodies:
            with pytest.raises(StoreUnavailable, match="no S3 server"):
                store.list("")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, crt = folder / "key.pem", folder / "crt.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    subprocess.run([*new, *subject, "-keyout", key, "-out", crt], check=True, capture_output=True)
    return key, crt


def test_tls_is_checked_against_the_ca_file(certificate: tuple[Path, Path]) -> None:
    key, crt = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(crt, key)
    with http_server(Script(Response(200, {"etag": '"e"'})), tls=context) as endpoint:
        assert S3Store(options(endpoint, ca_file=crt), CREDENTIALS).put(KEY, b"x").etag == "e"
        with pytest.raises(StoreUnavailable, match="certificate is not trusted"):
            S3Store(options(endpoint), CREDENTIALS).put(KEY, b"x")
