"""S3: wrong keys, missing buckets, servers that stop and start, and URLs at another address. On each server."""

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr
from s3_bucket import Bucket, prepared_bucket_of
from s3_servers.http import editing_proxy
from s3_servers.ministack import Ministack
from s3_servers.process import S3Server
from store_cases import fetch

from schemas.errors import StoreUnavailable
from storage.keys import clip_key
from storage.s3_credentials import static_credentials
from storage.s3_presigner import S3Presigner
from storage.store import ObjectStore

CLIP = clip_key("clip_" + "a" * 32, "first")
OTHER_CLIP = clip_key("clip_" + "b" * 32, "first")
MINUTE = timedelta(minutes=1)
WRONG_SECRET = "a-secret-that-nobody-has"


@pytest.fixture
def bucket(s3_server: S3Server) -> Bucket:
    return prepared_bucket_of(s3_server)


def assert_unavailable(store: ObjectStore, sentence: str, within_s: float) -> None:
    """Every call ends with StoreUnavailable in time, and says nothing about where and who.

    On a key of its own: a server that did not answer in time may do what it was asked later.
    """
    calls = [
        lambda: store.put(OTHER_CLIP, b"", if_none_match=True),
        lambda: store.put(OTHER_CLIP, b"", if_match="a"),
        lambda: store.get(OTHER_CLIP),
        lambda: store.get_range(OTHER_CLIP, 0, 1),
        lambda: store.list(""),
        lambda: store.delete(OTHER_CLIP),
        store.check,
    ]
    for call in calls:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as refusal:
            call()
        assert time.monotonic() - began < within_s
        assert refusal.value.detail == sentence


def test_wrong_secret_is_refused(s3_server: S3Server, bucket: Bucket) -> None:
    wrong = static_credentials(SecretStr(s3_server.access_key), SecretStr(WRONG_SECRET))
    assert_unavailable(
        replace(bucket, credentials=wrong).store, "the object store refuses the service's credentials", within_s=2
    )


def test_unknown_key_is_refused(bucket: Bucket) -> None:
    wrong = static_credentials(SecretStr("AKIAUNKNOWNUNKNOWN00"), SecretStr(WRONG_SECRET))
    assert_unavailable(
        replace(bucket, credentials=wrong).store, "the object store refuses the service's credentials", within_s=2
    )


def test_missing_bucket_is_unavailable(bucket: Bucket) -> None:
    gone = bucket.changed(bucket="wan-there-is-no-such-bucket")
    assert_unavailable(gone.store, "the bucket does not exist", within_s=2)


def test_check_of_many_leaves_one_hidden_object(bucket: Bucket) -> None:
    for _ in range(3):
        bucket.store.check()
    assert bucket.names() == ["videos/.check"]
    assert bucket.store.list("").stats == ()


def test_presigned_url_begins_with_the_public_endpoint(bucket: Bucket) -> None:
    """The host is part of the signature, so the address that clients use must be the one that was signed."""
    bucket.store.put(CLIP, b"clip")
    with editing_proxy(bucket.options.endpoint, lambda request: None) as public:
        elsewhere = bucket.changed(public_endpoint=public)
        signed = elsewhere.presigner.presign(CLIP, expires_in=MINUTE)
        assert signed.url.startswith(f"{public}/{bucket.options.bucket}/videos/{CLIP}?")
        answer = fetch(signed.url)
        assert (answer.status, answer.body) == (200, b"clip")
        moved = signed.url.replace(public, bucket.options.endpoint)
        assert fetch(moved).status == 403


def test_presigned_url_of_wrong_credentials_is_refused(s3_server: S3Server, bucket: Bucket) -> None:
    bucket.store.put(CLIP, b"clip")
    wrong = static_credentials(SecretStr(s3_server.access_key), SecretStr(WRONG_SECRET))
    assert fetch(replace(bucket, credentials=wrong).presigner.presign(CLIP, expires_in=MINUTE).url).status == 403


def test_presigned_url_that_was_signed_too_long_ago_is_refused(bucket: Bucket) -> None:
    bucket.store.put(CLIP, b"clip")
    an_hour_ago = S3Presigner(bucket.options, bucket.credentials, now=lambda: datetime.now(UTC) - timedelta(hours=1))
    assert fetch(an_hour_ago.presign(CLIP, expires_in=MINUTE).url).status == 403
    assert fetch(an_hour_ago.presign(CLIP, expires_in=timedelta(hours=2)).url).status == 200


def test_store_works_again_when_its_server_does(tmp_path: Path) -> None:
    with Ministack(tmp_path / "ministack") as server:
        bucket = prepared_bucket_of(server.info).changed(read_timeout_s=1, check_timeout_s=0.5)
        store = bucket.store
        written = store.put(CLIP, b"clip", if_none_match=True)

        server.freeze()
        assert_unavailable(store, "the object store does not answer", within_s=1.5)
        server.thaw()
        assert store.get(CLIP).body == b"clip"

        server.stop()
        assert_unavailable(store, "the object store can't be reached", within_s=1.5)
        server.start()
        assert store.stat(CLIP).etag == written.etag
        store.check()
