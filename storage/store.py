"""What an object store is: the protocols, their values and errors. Knows no file system, S3 or server.

    Exception
    └── StoreError                  for the callers inside this service; no client ever sees one
        ├── InvalidKey              no object can have this name: an id with path tricks (answer 404)
        ├── ObjectNotFound
        ├── PreconditionFailed      another writer was first: read again
        ├── InvalidRange            the range starts behind the last byte
        ├── UnfitStore              (storage.s3_probe) the S3 server can't be used; for who starts the service
        └── IllegalTransition       (storage.job_records) `schemas.jobs.TRANSITIONS` does not lead there

    schemas.errors.WanError         what a client may see
        ├── StoreUnavailable        the store does not answer; after a write the outcome is unknown
        ├── StoreFull               nothing was written
        ├── UrlInvalid, UrlExpired  a presigned URL was refused
        └── InternalError
            └── RecordUnreadable    (storage.job_records) a stored record is not what we wrote

All calls block: run them in a bounded thread pool. No message names a path or a key.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Final, Literal, Protocol

from schemas.requests import MAX_URL_TTL_S, MIN_URL_TTL_S

MAX_LIST_LIMIT: Final = 1000
"""Keys per page. Source: S3's ListObjectsV2."""

_CONTENT_TYPES: Final = {".mp4": "video/mp4", ".json": "application/json", ".png": "image/png", ".jpg": "image/jpeg"}


class StoreError(Exception):
    """The root of what a store tells its callers; `args[0]` is a fixed sentence."""


class InvalidKey(StoreError):
    """No object can have this name."""

    def __init__(self, detail: str = "not a legal object key") -> None:
        super().__init__(detail)


class ObjectNotFound(StoreError):
    """There is no object under the key."""

    def __init__(self, detail: str = "there is no object under this key") -> None:
        super().__init__(detail)


class PreconditionFailed(StoreError):
    """The object exists already, or is not the version that `if_match` names. Nothing was written."""

    def __init__(self, detail: str = "another writer was first") -> None:
        super().__init__(detail)


class InvalidRange(StoreError):
    """The range starts behind the object's last byte."""

    def __init__(self, detail: str = "the range starts behind the last byte") -> None:
        super().__init__(detail)


@dataclass(frozen=True)
class ObjectStat:
    """What a store knows of an object without reading it.

    etag: opaque, unquoted, another one whenever the bytes change. Where it is a hash (S3), bytes that come back
    bring it back: a record that is swapped needs something that never recurs, such as a time.
    last_modified: in whole seconds on S3, where `put` says when it was answered.
    """

    key: str
    size_bytes: int
    etag: str
    last_modified: datetime  # aware, UTC


@dataclass(frozen=True)
class Object:
    """An object's bytes and the stat of exactly these bytes."""

    body: bytes
    stat: ObjectStat


@dataclass(frozen=True)
class Page:
    """One page of a list. next_after: the `start_after` of the next page; None on the last one."""

    stats: tuple[ObjectStat, ...]
    next_after: str | None


@dataclass(frozen=True)
class PresignedUrl:
    """A URL that works without credentials until `expires_at` (aware, UTC, whole seconds)."""

    url: str
    expires_at: datetime


class ObjectStore(Protocol):
    """Bytes under keys. A write is seen whole or not at all, and it is durable when `put` returns.

    Every method raises InvalidKey for a key that `storage.keys.check_key` refuses, and StoreUnavailable.
    """

    kind: str

    def put(
        self, key: str, body: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        """Write an object; its content type is `content_type(key)`.

        Args:
            key: the object's name.
            body: the bytes, or a file that is copied and may be deleted afterwards.
            if_none_match: create only.
            if_match: replace only the version with this ETag.

        Raises:
            PreconditionFailed: the object exists already, is gone, or has another ETag.
            StoreFull: no space is left.
            ValueError: both conditions were given.
            OSError: the file named by `body` can't be opened.
        """

    def get(self, key: str) -> Object:
        """Read a whole object into memory. Raises ObjectNotFound."""

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Read bytes `start` to `end`, both inclusive as in HTTP; `end` may lie behind the last byte.

        Raises ObjectNotFound, InvalidRange; ValueError unless 0 <= start <= end.
        """

    def stat(self, key: str) -> ObjectStat:
        """Raises ObjectNotFound."""

    def list(self, prefix: str, *, start_after: str | None = None, limit: int = MAX_LIST_LIMIT) -> Page:
        """List up to `limit` (1 to 1000) objects whose keys begin with `prefix`, in the keys' ASCII order."""

    def delete(self, key: str) -> None:
        """Delete an object; nothing happens when there is none."""

    def check(self) -> None:
        """Raises StoreUnavailable unless the store can be reached and written to."""


class Presigner(Protocol):
    """Makes URLs that let anyone who has them fetch one object, for a while."""

    def presign(
        self,
        key: str,
        *,
        method: Literal["GET", "HEAD"] = "GET",
        expires_in: timedelta,
        response_content_disposition: str | None = None,
    ) -> PresignedUrl:
        """Sign a URL; whether the object exists is not looked up.

        Expiry counts from the start of the current second, as S3 counts it, so a URL lives up to a second
        less than `expires_in`. Raises InvalidKey, and ValueError for an `expires_in` that `check_expires_in`
        refuses or a disposition that can't be a header.
        """


def content_type(key: str) -> str:
    """The media type of an object, by its key's suffix."""
    return _CONTENT_TYPES.get(PurePosixPath(key).suffix, "application/octet-stream")


def check_expires_in(expires_in: timedelta) -> timedelta:
    """Return `expires_in`. Raises ValueError unless it is S3's 1 s to 7 days."""
    if not timedelta(seconds=MIN_URL_TTL_S) <= expires_in <= timedelta(seconds=MAX_URL_TTL_S):
        raise ValueError(f"a presigned URL lives {MIN_URL_TTL_S} to {MAX_URL_TTL_S} seconds")
    return expires_in


def check_limit(limit: int) -> int:
    """Return `limit`. Raises ValueError unless it is 1 to 1000."""
    if not 1 <= limit <= MAX_LIST_LIMIT:
        raise ValueError(f"a page holds 1 to {MAX_LIST_LIMIT} keys")
    return limit


def check_conditions(if_none_match: bool, if_match: str | None) -> None:
    """Raises ValueError when both conditions are given: no state of a store can meet them."""
    if if_none_match and if_match is not None:
        raise ValueError("if_none_match and if_match exclude each other")


def check_range(start: int, end: int) -> None:
    """Raises ValueError unless 0 <= start <= end."""
    if not 0 <= start <= end:
        raise ValueError("a range needs 0 <= start <= end")
