"""The object store in an S3 bucket. Knows no URL for clients, no bucket policy or rule, and no make of server.

A write carries two lines of metadata: a token of its own, and the state that it was written over. When the answer
to a write is lost and its repetition refused, they tell whose object is there:

    our token                       we wrote it
    another's, over the same state  they were first: two writes over one state exclude each other
    anything else                   ours may have been there in between: the outcome is unknown, unless every
                                    earlier try was refused too
"""

import os
import re
import secrets
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import unquote_plus
from xml.etree.ElementTree import Element

from minio.credentials.providers import Provider

from schemas.errors import StoreFull, StoreUnavailable
from storage.keys import check_key
from storage.s3_client import RefusedRepetition, S3Client
from storage.s3_multipart import upload_parts
from storage.s3_options import S3Options
from storage.s3_xml import child_text, parse_xml, required_text
from storage.store import (
    MAX_LIST_LIMIT,
    InvalidKey,
    InvalidRange,
    Object,
    ObjectNotFound,
    ObjectStat,
    Page,
    PreconditionFailed,
    check_conditions,
    check_limit,
    check_range,
    content_type,
)

CHECK_NAME: Final = ".check"
"""The object that `check` overwrites; no key begins with a dot."""

_TOKEN: Final = "x-amz-meta-wan-write"  # noqa: S105  # a header's name
_OVER: Final = "x-amz-meta-wan-over"
_NOTHING: Final = "nothing"
_ANYTHING: Final = "anything"
_ETAG: Final = re.compile(r"[A-Za-z0-9+/=_.:-]{1,256}")
_PARTIAL_CONTENT: Final = 206
_UNKNOWN: Final = "the object store's answer was lost, and another writer has been there since"


@dataclass(frozen=True)
class _Write:
    """One `put`: its token, the state it is written over, and the header that makes the server check that."""

    token: str
    over: str
    condition: Mapping[str, str]

    def headers(self, key: str) -> dict[str, str]:
        return {"Content-Type": content_type(key), _TOKEN: self.token, _OVER: self.over}


class S3Store:
    """An `ObjectStore` in a bucket; any number of processes and machines may share it.

    Making it sends nothing. ETags are the server's: mostly a hash, so writing the same bytes again may give the
    same one. Files above `part_size_bytes` go up in parts unless `if_match` is given. Some servers ignore
    If-None-Match there (Ceph 16), so two such creations of one key at the same time could both be told that they
    won; only clips are files, and the token in a clip's key belongs to one attempt alone.

    Args:
        options: where the bucket is.
        credentials: asked before each request (see `storage.s3_credentials`).
    """

    kind = "s3"

    def __init__(self, options: S3Options, credentials: Provider) -> None:
        self._options = options
        self._client = S3Client(options, credentials)
        self._unaborted: deque[tuple[str, str]] = deque()
        timeout_s = options.check_timeout_s
        hasty = options.model_copy(
            update={
                "connect_timeout_s": min(options.connect_timeout_s, timeout_s),
                "read_timeout_s": min(options.read_timeout_s, timeout_s),
                "retries": 0,
            }
        )
        self._checker = S3Client(hasty, credentials)

    def put(
        self, key: str, body: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        """See `ObjectStore.put`. `last_modified` is the time of the server's answer."""
        check_key(key)
        check_conditions(if_none_match, if_match)
        write = self._begin_write(if_none_match, if_match)
        if isinstance(body, bytes):
            return self._put_whole(key, body, write)
        with body.open("rb") as file:
            if os.fstat(file.fileno()).st_size > self._options.part_size_bytes and if_match is None:
                return self._put_in_parts(key, file, write)
            return self._put_whole(key, file.read(), write)

    def get(self, key: str) -> Object:
        """See `ObjectStore.get`."""
        answer = self._client.send("GET", self._name(key))
        return Object(answer.body, _stat_of(key, answer.headers, "last-modified", len(answer.body)))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """See `ObjectStore.get_range`."""
        check_range(start, end)
        answer = self._client.send("GET", self._name(key), headers={"Range": f"bytes={start}-{end}"})
        if answer.status == _PARTIAL_CONTENT:
            return answer.body
        if start >= len(answer.body):  # a server may ignore Range
            raise InvalidRange
        return answer.body[start : end + 1]

    def stat(self, key: str) -> ObjectStat:
        """See `ObjectStore.stat`."""
        return self._head(key)[0]

    def list(self, prefix: str, *, start_after: str | None = None, limit: int = MAX_LIST_LIMIT) -> Page:
        """See `ObjectStore.list`. A page may be shorter than `limit`: what has no legal key is left out."""
        query = {
            "list-type": "2",
            "encoding-type": "url",
            "max-keys": str(check_limit(limit)),
            "prefix": self._options.prefix + prefix,
        }
        if start_after:
            query["start-after"] = self._options.prefix + start_after
        root = parse_xml(self._client.send("GET", query=query).body)
        listed = [_listed(entry, root, len(self._options.prefix)) for entry in root.iterfind("Contents")]
        more = required_text(root, "IsTruncated") == "true"
        return Page(tuple(filter(_is_ours, listed)), next_after=listed[-1].key if more and listed else None)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        try:
            self._client.send("DELETE", self._name(key))
        except ObjectNotFound:
            return

    def check(self) -> None:
        """See `ObjectStore.check`. Overwrites one empty object; waits `check_timeout_s` at most."""
        try:
            self._checker.send("PUT", self._options.prefix + CHECK_NAME, body=b"")
        except StoreFull as full:
            raise StoreUnavailable("there is no space left in the object store") from full

    def _name(self, key: str) -> str:
        return self._options.prefix + check_key(key)

    def _begin_write(self, if_none_match: bool, if_match: str | None) -> _Write:
        token = secrets.token_hex(16)
        if if_none_match:
            return _Write(token, _NOTHING, {"If-None-Match": "*"})
        if if_match is None:
            return _Write(token, _ANYTHING, {})
        if not _ETAG.fullmatch(if_match):  # `*` and an empty header would match every object
            raise PreconditionFailed
        return _Write(token, if_match, if_match_header(if_match, quoted=self._options.quoted_etags))

    def _put_whole(self, key: str, body: bytes, write: _Write) -> ObjectStat:
        headers = {**write.headers(key), **write.condition}
        try:
            answer = self._client.send("PUT", self._name(key), headers=headers, body=body)
        except RefusedRepetition as refusal:
            return self._settle(key, write, refusal.doubtful)
        except ObjectNotFound as gone:
            raise PreconditionFailed from gone
        return _stat_of(key, answer.headers, "date", len(body))

    def _put_in_parts(self, key: str, file: BinaryIO, write: _Write) -> ObjectStat:
        if write.over == _NOTHING and self._exists(key):  # before the work, and for servers that don't check
            raise PreconditionFailed
        try:
            upload_parts(
                self._client,
                self._name(key),
                file,
                part_size_bytes=self._options.part_size_bytes,
                headers=write.headers(key),
                condition=write.condition,
                unaborted=self._unaborted,
            )
        except RefusedRepetition as refusal:
            return self._settle(key, write, refusal.doubtful)
        except ObjectNotFound:
            return self._settle(key, write, doubtful=True)
        stat, headers = self._head(key)
        if write.over == _NOTHING and headers.get(_TOKEN) != write.token:
            raise PreconditionFailed
        return stat

    def _settle(self, key: str, write: _Write, doubtful: bool) -> ObjectStat:
        """Find out whose object is there: see this file's docstring."""
        found: Mapping[str, str] = {}
        with suppress(ObjectNotFound):
            stat, found = self._head(key)
            if found.get(_TOKEN) == write.token:
                return stat
        if doubtful and (write.over == _ANYTHING or found.get(_OVER) != write.over):
            raise StoreUnavailable(_UNKNOWN)
        raise PreconditionFailed

    def _exists(self, key: str) -> bool:
        try:
            self._head(key)
        except ObjectNotFound:
            return False
        return True

    def _head(self, key: str) -> tuple[ObjectStat, Mapping[str, str]]:
        headers = self._client.send("HEAD", self._name(key)).headers
        return _stat_of(key, headers, "last-modified", int(headers.get("content-length", "0"))), headers


def if_match_header(etag: str, *, quoted: bool) -> dict[str, str]:
    """The condition "only this version". HTTP wants the quotes; Ceph 16 finds no match with them."""
    return {"If-Match": f'"{etag}"' if quoted else etag}


def etag_of(headers: Mapping[str, str]) -> str:
    """The ETag of an answer, without its quotes."""
    return headers.get("etag", "").replace('"', "")


def _stat_of(key: str, headers: Mapping[str, str], dated_by: str, size_bytes: int) -> ObjectStat:
    date = headers.get(dated_by)
    last_modified = datetime.now(UTC).replace(microsecond=0) if date is None else parsedate_to_datetime(date)
    return ObjectStat(key, size_bytes, etag_of(headers), last_modified)


def _listed(entry: Element, root: Element, prefix_chars: int) -> ObjectStat:
    """An entry of a list; its time in whole seconds, as the other answers tell it."""
    name = required_text(entry, "Key")
    key = (unquote_plus(name) if child_text(root, "EncodingType") == "url" else name)[prefix_chars:]
    last_modified = datetime.fromisoformat(required_text(entry, "LastModified")).replace(microsecond=0)
    etag = required_text(entry, "ETag").replace('"', "")
    return ObjectStat(key, int(required_text(entry, "Size")), etag, last_modified)


def _is_ours(stat: ObjectStat) -> bool:
    try:
        check_key(stat.key)
    except InvalidKey:
        return False
    return True
