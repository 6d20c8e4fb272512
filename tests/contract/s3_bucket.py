"""A bucket of one's own on a real S3 server, for the tests of what only S3 has."""

import json
import secrets
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

from minio import Minio
from minio.credentials.providers import Provider
from minio.helpers import md5sum_hash
from s3_servers.ministack import BUCKETS
from s3_servers.process import S3Server
from store_cases import server_credentials

from storage.s3 import S3Store
from storage.s3_options import MIN_PART_BYTES, S3Options
from storage.s3_presigner import S3Presigner
from storage.s3_setup import PreparedBucket, prepare_bucket


@dataclass(frozen=True)
class Bucket:
    """The options of a store, its credentials, and the SDK for a look from outside."""

    options: S3Options
    credentials: Provider
    sdk: Minio

    @property
    def store(self) -> S3Store:
        return S3Store(self.options, self.credentials)

    @property
    def presigner(self) -> S3Presigner:
        return S3Presigner(self.options, self.credentials)

    def prepare(self, **arguments: Any) -> PreparedBucket:
        return prepare_bucket(self.options, self.credentials, **arguments)

    def changed(self, **options: object) -> "Bucket":
        return replace(self, options=self.options.model_copy(update=options))

    def names(self) -> list[str]:
        """Every object in the bucket, hidden ones too."""
        return [found.object_name for found in self.sdk.list_objects(self.options.bucket, recursive=True)]

    def uploads(self) -> list[str]:
        """Every multipart upload that was begun and neither completed nor aborted."""
        return [upload.object_name for upload in self.sdk._list_multipart_uploads(self.options.bucket).uploads]

    def lifecycle_rules(self) -> dict[str, dict[str, str]]:
        """The leaves of each rule, by its id."""
        body = self.sdk._execute("GET", self.options.bucket, query_params={"lifecycle": ""}).data
        rules = ElementTree.fromstring(body).iterfind("{*}Rule")  # noqa: S314  # our own server's answer
        leaves = [
            {leaf.tag.rpartition("}")[2]: leaf.text or "" for leaf in rule.iter() if not len(leaf)} for rule in rules
        ]
        return {rule["ID"]: rule for rule in leaves}

    def set_lifecycle(self, rules: str) -> None:
        body = f"<LifecycleConfiguration>{rules}</LifecycleConfiguration>".encode()
        headers = {"Content-MD5": md5sum_hash(body)}
        self.sdk._execute("PUT", self.options.bucket, body=body, headers=headers, query_params={"lifecycle": ""})

    def set_policy(self, effect: str, *actions: str) -> None:
        """Let everyone do something with the bucket and all in it, or nobody."""
        arn = f"arn:aws:s3:::{self.options.bucket}"
        statement = {
            "Effect": effect,
            "Principal": {"AWS": ["*"]},
            "Action": list(actions),
            "Resource": [arn, f"{arn}/*"],
        }
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        self.sdk._execute("DELETE", self.options.bucket, query_params={"publicAccessBlock": ""})
        self.sdk.set_bucket_policy(self.options.bucket, json.dumps(policy))


def new_bucket(server: S3Server) -> Bucket:
    """A bucket of a new name that does not exist yet; parts are as small as S3 allows."""
    options = S3Options(
        endpoint=server.endpoint,
        bucket=f"{BUCKETS}{secrets.token_hex(8)}",
        prefix="videos/",
        part_size_bytes=MIN_PART_BYTES,
        read_timeout_s=10,
    )
    credentials = server_credentials(server)
    host = server.endpoint.removeprefix("http://")
    return Bucket(options, credentials, Minio(host, secure=False, region=options.region, credentials=credentials))


def prepared_bucket_of(server: S3Server) -> Bucket:
    """A bucket that is ready for a store."""
    bucket = new_bucket(server)
    return replace(bucket, options=bucket.prepare(create=True).options)
