"""`wan-serve doctor` on a bucket: on each server."""

from pathlib import Path

import pytest
import yaml
from s3_bucket import Bucket, new_bucket
from s3_servers.process import S3Server

from serve_graph.doctor import examine
from serve_graph.findings import Check, Mark


def examined(folder: Path, bucket: Bucket, **storage: object) -> list[Check]:
    s3 = {"endpoint": bucket.options.endpoint, "bucket": bucket.options.bucket, "region": bucket.options.region}
    args = {"data_dir": str(folder), "storage": {"kind": "s3", "s3": s3, **storage}}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"import_path": "serve_graph.app:build_app", "args": args}]}))
    return [check for check in examine(path) if check.name in {"store", "clock"}]


def test_doctor_tries_a_bucket_and_leaves_nothing_in_it(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = new_bucket(s3_server)
    monkeypatch.setenv("WAN_S3_ACCESS_KEY", s3_server.access_key)
    monkeypatch.setenv("WAN_S3_SECRET_KEY", s3_server.secret_key)

    assert [check.mark for check in examined(tmp_path, bucket)] == [Mark.FAIL]
    assert [check.mark for check in examined(tmp_path, bucket, create_bucket=True)] == [Mark.WARN]
    assert not bucket.sdk.bucket_exists(bucket.options.bucket)
    bucket.sdk.make_bucket(bucket.options.bucket)
    store, clock = examined(tmp_path, bucket)
    assert (store.mark, "conditional writes" in store.found) == (Mark.OK, True)
    assert clock.mark is Mark.OK
    assert bucket.names() == []
