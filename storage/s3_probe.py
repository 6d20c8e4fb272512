"""Finds out, by trying, whether a server's conditional writes work. Leaves nothing in the bucket.

Everything that must happen once (a job's creation, its take-over, the clip of an attempt) is a conditional write, and
a server that ignores the condition answers as if it had been met. So the service does not start on one.
"""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, NoReturn

from minio.credentials.providers import Provider

from schemas.errors import StoreUnavailable
from storage.s3 import etag_of, if_match_header
from storage.s3_client import S3Client
from storage.s3_errors import NotSupported
from storage.s3_options import S3Options
from storage.store import ObjectNotFound, PreconditionFailed, StoreError

PROBE_FOLDER: Final = ".probe/"
"""Below the prefix; no key begins with a dot."""

_MARK: Final = "x-amz-meta-wan-probe"
_ADVICE: Final = "use a server with working conditional writes; the README has a table of servers"


class UnfitStore(StoreError):
    """The S3 server lacks something that the service can't do without; the message says what, and what to do."""


def probe(options: S3Options, credentials: Provider) -> tuple[S3Options, tuple[str, ...]]:
    """Try conditional writes on an object of our own.

    Returns: the options with the form of If-Match that this server understands, and warnings.

    Raises:
        UnfitStore: the server creates what exists, replaces another version, or drops metadata.
        StoreUnavailable, StoreFull: no answer, or a passing error: probe again.
    """
    once = options.model_copy(update={"retries": 0})  # a repetition could be refused for its own first try
    client = S3Client(once, credentials)
    name = f"{options.prefix}{PROBE_FOLDER}{secrets.token_hex(16)}"
    with _created(client, name) as first_etag:
        quoted = _understands_quotes(client, name, first_etag)
        warnings = _anonymous_access(once, name)
    return options.model_copy(update={"quoted_etags": quoted}), warnings


@contextmanager
def _created(client: S3Client, name: str) -> Iterator[str]:
    """The probe's object and its ETag, once it is sure that nobody can create it again."""
    etag = _write(client, name, b"1", {"If-None-Match": "*"})
    if etag is None:
        _refuse("it refuses to create a new object with `If-None-Match: *`")
    try:
        if _write(client, name, b"2", {"If-None-Match": "*"}) is not None:
            _refuse("it ignores `If-None-Match: *` and created the same object twice")
        if client.send("HEAD", name).headers.get(_MARK) != "1":
            _refuse("it does not keep an object's metadata")
        yield etag
    finally:
        client.send("DELETE", name)


def _understands_quotes(client: S3Client, name: str, etag: str) -> bool:
    """Whether If-Match works with quotes; False if it works without them only."""
    stale = "0" * 32
    overwritten = False
    for quoted in (True, False):
        replaced = _write(client, name, b"3", if_match_header(stale, quoted=quoted))
        if replaced is not None:
            overwritten, etag = True, replaced
            continue
        if _write(client, name, b"4", if_match_header(etag, quoted=quoted)) is not None:
            return quoted
    if overwritten:
        _refuse("it ignores `If-Match` and replaced a version that it was not told to")
    _refuse("it refuses to replace the very version that `If-Match` names, with and without quotes")


def _write(client: S3Client, name: str, body: bytes, condition: Mapping[str, str]) -> str | None:
    """The new ETag, or None when the server refused."""
    try:
        answer = client.send("PUT", name, headers={_MARK: body.decode(), **condition}, body=body)
    except (PreconditionFailed, ObjectNotFound, NotSupported):
        return None
    return etag_of(answer.headers)


def _anonymous_access(options: S3Options, name: str) -> tuple[str, ...]:
    """What a stranger without credentials may do, as sentences."""
    stranger = S3Client(options, None)
    warnings = []
    if _may(stranger, name, {}):
        warnings.append(
            "the bucket can be read anonymously: whoever learns a key gets the clip or the job record without a "
            "presigned URL, for ever; take the public read access out of its policy"
        )
    if _may(stranger, None, {"list-type": "2", "max-keys": "1", "prefix": options.prefix}):
        warnings.append(
            "the bucket can be listed anonymously: anyone can find out every key; take the public list access out "
            "of its policy"
        )
    return tuple(warnings)


def _may(stranger: S3Client, name: str | None, query: Mapping[str, str]) -> bool:
    try:
        stranger.send("GET", name, query=query)
    except (StoreUnavailable, ObjectNotFound):
        return False
    return True


def _refuse(finding: str) -> NoReturn:
    raise UnfitStore(f"this S3 server can't hold the service's jobs: {finding}; {_ADVICE}")
