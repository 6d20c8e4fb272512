"""S3 at the service's start: the bucket, the probe, the lifecycle rule, the warnings. On each server."""

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from polling import until
from s3_bucket import Bucket, new_bucket, prepared_bucket_of
from s3_servers.ceph import LIFECYCLE_DAY_S
from s3_servers.http import Request, Response, editing_proxy, forward, http_server
from s3_servers.ministack import Ministack
from s3_servers.process import S3Server

from storage.keys import clip_key, job_key
from storage.s3_client import S3Client
from storage.s3_lifecycle import ensure_rule, rule_id
from storage.s3_probe import UnfitStore
from storage.store import ObjectNotFound

CLIP = clip_key("clip_" + "a" * 32, "first")
JOB = job_key("job_" + "a" * 32)
DAY = timedelta(days=1)
FOREIGN_RULES = (
    "<Rule><ID>logs</ID><Prefix>logs/</Prefix><Status>Enabled</Status><Expiration><Days>7</Days></Expiration></Rule>"
    "<Rule><ID>tmp</ID><Filter><Prefix>tmp/</Prefix></Filter><Status>Disabled</Status>"
    "<NoncurrentVersionExpiration><NoncurrentDays>3</NoncurrentDays></NoncurrentVersionExpiration></Rule>"
)


@pytest.fixture
def bucket(s3_server: S3Server) -> Bucket:
    return prepared_bucket_of(s3_server)


@pytest.fixture(scope="module")
def open_ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """It checks no signature, so that a proxy may take signed headers away."""
    with Ministack(tmp_path_factory.mktemp("open_ministack"), auth=False) as server:
        yield server.info


def client(bucket: Bucket) -> S3Client:
    return S3Client(bucket.options, bucket.credentials)


def test_prepare_makes_the_bucket_when_it_may(s3_server: S3Server) -> None:
    bucket = new_bucket(s3_server)
    assert not bucket.sdk.bucket_exists(bucket.options.bucket)
    assert bucket.prepare(create=True).warnings == ()
    assert bucket.sdk.bucket_exists(bucket.options.bucket)


def test_prepare_refuses_a_missing_bucket_when_it_may_not(s3_server: S3Server) -> None:
    bucket = new_bucket(s3_server)
    with pytest.raises(UnfitStore, match="does not exist: make it"):
        bucket.prepare()
    assert not bucket.sdk.bucket_exists(bucket.options.bucket)


def test_prepare_may_be_repeated_and_leaves_nothing(bucket: Bucket) -> None:
    for _ in range(2):
        assert bucket.prepare(create=True, clip_retention=DAY).warnings == ()
    assert bucket.names() == []


def test_prepare_finds_the_form_of_if_match_that_works(bucket: Bucket) -> None:
    wrong = bucket.changed(quoted_etags=not bucket.options.quoted_etags)
    found = Bucket(wrong.prepare().options, bucket.credentials, bucket.sdk)
    first = found.store.put(JOB, b"1")
    assert found.store.put(JOB, b"2", if_match=first.etag).etag == found.store.stat(JOB).etag


def test_prepare_prefers_quotes(ministack: S3Server) -> None:
    assert prepared_bucket_of(ministack).options.quoted_etags is True


def test_prepare_does_without_quotes_on_ceph_16(ceph: S3Server) -> None:
    assert prepared_bucket_of(ceph).options.quoted_etags is False


def without(header: str) -> Callable[[Request], None]:
    return lambda request: request.headers.pop(header, None) and None


def spoiled_if_match(request: Request) -> None:
    if "if-match" in request.headers:
        request.headers["if-match"] = '"' + "f" * 32 + '"'


@pytest.mark.parametrize(
    ("edit", "finding"),
    [
        (without("if-none-match"), "created the same object twice"),
        (without("if-match"), "replaced a version that it was not told to"),
        (without("x-amz-meta-wan-probe"), "does not keep an object's metadata"),
        (spoiled_if_match, "refuses to replace the very version"),
    ],
    ids=["ignores-if-none-match", "ignores-if-match", "drops-metadata", "refuses-if-match"],
)
def test_prepare_refuses_a_server_without_conditional_writes(
    open_ministack: S3Server, edit: Callable[[Request], None], finding: str
) -> None:
    bucket = prepared_bucket_of(open_ministack)
    with (
        editing_proxy(bucket.options.endpoint, edit) as proxy,
        pytest.raises(UnfitStore, match=finding) as refusal,
    ):
        bucket.changed(endpoint=proxy).prepare()
    assert "use a server with working conditional writes" in str(refusal.value)
    assert bucket.names() == []


def test_prepare_refuses_a_server_that_does_not_know_if_none_match(open_ministack: S3Server) -> None:
    bucket = prepared_bucket_of(open_ministack)

    def not_implemented(request: Request) -> Response:
        return Response(501) if "if-none-match" in request.headers else forward(bucket.options.endpoint, request)

    with http_server(not_implemented) as proxy, pytest.raises(UnfitStore, match="refuses to create a new object"):
        bucket.changed(endpoint=proxy).prepare()


def test_prepare_is_silent_about_a_private_bucket(bucket: Bucket) -> None:
    assert bucket.prepare().warnings == ()


def test_prepare_warns_when_strangers_can_read(bucket: Bucket) -> None:
    bucket.set_policy("Allow", "s3:GetObject")
    (warning,) = bucket.prepare().warnings
    assert warning.startswith("the bucket can be read anonymously")


def test_prepare_warns_when_strangers_can_list(bucket: Bucket) -> None:
    bucket.set_policy("Allow", "s3:ListBucket")
    (warning,) = bucket.prepare().warnings
    assert warning.startswith("the bucket can be listed anonymously")


def test_prepare_sets_our_lifecycle_rule(bucket: Bucket) -> None:
    bucket.prepare(clip_retention=timedelta(days=29, hours=1))
    rule = bucket.lifecycle_rules()[rule_id(bucket.options)]
    assert (rule["Prefix"], rule["Days"], rule["Status"]) == ("videos/clips/", "30", "Enabled")
    assert rule["DaysAfterInitiation"] == "1"


def test_prepare_leaves_the_rules_alone_without_a_retention(bucket: Bucket) -> None:
    bucket.set_lifecycle(FOREIGN_RULES)
    bucket.prepare()
    assert bucket.lifecycle_rules().keys() == {"logs", "tmp"}


def test_lifecycle_rule_is_written_when_it_changed_only(bucket: Bucket) -> None:
    written = [ensure_rule(client(bucket), bucket.options, days * DAY) for days in (3, 3, 4, 4)]
    assert written == [True, False, True, False]
    assert bucket.lifecycle_rules().keys() == {rule_id(bucket.options)}
    assert bucket.lifecycle_rules()[rule_id(bucket.options)]["Days"] == "4"


def test_lifecycle_rule_joins_those_of_others(bucket: Bucket) -> None:
    """A rule that loses its prefix on the way would expire the whole bucket."""
    bucket.set_lifecycle(FOREIGN_RULES)
    before = bucket.lifecycle_rules()
    neighbour = bucket.changed(prefix="neighbour/")
    for ours in (bucket, neighbour):
        ensure_rule(client(ours), ours.options, DAY)
    after = bucket.lifecycle_rules()
    assert after.keys() == before.keys() | {rule_id(bucket.options), rule_id(neighbour.options)}
    assert before == {name: after[name] for name in before}
    assert after["tmp"]["Prefix"] == "tmp/"


def test_prepare_warns_when_it_may_not_set_the_rule(bucket: Bucket) -> None:
    bucket.set_policy("Deny", "s3:PutLifecycleConfiguration")
    (warning,) = bucket.prepare(clip_retention=DAY).warnings
    assert warning.startswith("clips are kept for ever: the bucket's lifecycle rule could not be set")
    assert "s3:PutLifecycleConfiguration" in warning


def test_lifecycle_deletes_clips_and_nothing_else(ceph: S3Server) -> None:
    """Ceph's day lasts five seconds here; the objects really go."""
    bucket = prepared_bucket_of(ceph)
    neighbour = bucket.changed(prefix="neighbour/").store
    for store in (bucket.store, neighbour):
        store.put(CLIP, b"clip")
        store.put(JOB, b"job")
    bucket.prepare(clip_retention=DAY)
    until(lambda: not bucket.store.list("clips/").stats, "the end of the clip", 20 * LIFECYCLE_DAY_S)
    with pytest.raises(ObjectNotFound):
        bucket.store.get(CLIP)
    assert bucket.store.get(JOB).body == b"job"
    assert (neighbour.get(CLIP).body, neighbour.get(JOB).body) == (b"clip", b"job")


def test_services_with_other_prefixes_do_not_see_each_other(bucket: Bucket) -> None:
    bucket.store.put(JOB, b"ours")
    with pytest.raises(ObjectNotFound):
        bucket.changed(prefix="").store.get(JOB)
