"""Batches as objects in a store: the manifest, how its jobs ended, its cancel and its end. Owns their order of writes.

A batch's manifest is one object, and creating it is the commit of all of its jobs. As for a job, its entries in the
indexes are written before it and deleted after its end is on record, so a crash leaves an entry too many and never
one too few. A manifest is written whole, not in parts: some S3 servers ignore create-only there. Knows no runner of
jobs. All methods block.
"""

import itertools
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from schemas.batches import BatchCancel, BatchManifest, BatchSummary, BatchTombstone
from schemas.errors import BatchGone, BatchNotFound
from schemas.jobs import JobState
from storage.job_records import ActiveEntry, RecordUnreadable
from storage.keys import (
    active_key,
    batch_cancel_key,
    batch_done_prefix,
    batch_index_key,
    batch_index_prefix,
    batch_manifest_key,
    batch_summary_key,
    entry_of_key,
    index_entry,
    index_of_record_key,
    item_clips_prefix,
    item_records_prefix,
    parse_batch_done_key,
    start_after_entry,
)
from storage.store import (
    MAX_LIST_LIMIT,
    InvalidKey,
    InvalidRange,
    ObjectNotFound,
    ObjectStat,
    ObjectStore,
    PreconditionFailed,
)

MANIFEST_VERSION: Final = 1
HEAD_BYTES: Final = 8 * 1024
"""The manifest's first line fits into it: a webhook's URL is the longest thing there."""

SCAN_BYTES: Final = 1 << 20
SLOW_CREATION_S: Final = 5.0
"""As for a job's record: somebody may have taken the entries of a slow creation for orphans."""

M = TypeVar("M", bound=BaseModel)


class BatchDeleted(BatchGone):
    """The batch was deleted; `tombstone` is what is left of it."""

    def __init__(self, tombstone: BatchTombstone) -> None:
        Exception.__init__(self, tombstone)

    @property
    def tombstone(self) -> BatchTombstone:
        return self.args[0]  # type: ignore[no-any-return]  # set by __init__ above

    @property
    def detail(self) -> str:
        return BatchGone().detail


class BatchRecords:
    """Creates, reads, lists and deletes batches. The store's StoreUnavailable and StoreFull pass through."""

    def __init__(self, store: ObjectStore, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._now = now

    def create(self, manifest: BatchManifest, items: bytes) -> None:
        """Commit a batch. items: one `BatchItem` per line. Raises PreconditionFailed when the id has one already."""
        entry, began = entry_of_batch(manifest), time.monotonic()
        self._put_entries(manifest.principal, entry)
        try:
            self._store.put(batch_manifest_key(manifest.batch_id), _line(manifest) + items, if_none_match=True)
        except PreconditionFailed:
            self._forget_second_entries(manifest, entry)
            raise
        if time.monotonic() - began > SLOW_CREATION_S:
            self._put_entries(manifest.principal, entry)

    def head(self, batch_id: str) -> BatchManifest:
        """What a manifest's first line says. Raises BatchNotFound (also for what is no id), BatchDeleted."""
        try:
            first = self._store.get_range(batch_manifest_key(batch_id), 0, HEAD_BYTES - 1)
        except (InvalidKey, ObjectNotFound) as error:
            raise BatchNotFound from error
        line = first.partition(b"\n")[0]
        if b'"deleted_at":' in line:
            raise BatchDeleted(_read(BatchTombstone, line))
        return _read(BatchManifest, line)

    def line_ends(self, batch_id: str) -> "array[int]":
        """Where each line of a manifest ends, the first line's end first: item i lies between ends i and i+1.

        Reads the manifest 1 MiB at a time. Raises BatchNotFound.
        """
        ends, start = array("Q"), 0
        while True:
            try:
                chunk = self._store.get_range(batch_manifest_key(batch_id), start, start + SCAN_BYTES - 1)
            except ObjectNotFound as error:
                raise BatchNotFound from error
            except InvalidRange:
                return ends
            at = chunk.find(b"\n")
            while at >= 0:
                ends.append(start + at + 1)
                at = chunk.find(b"\n", at + 1)
            start += len(chunk)
            if len(chunk) < SCAN_BYTES:
                return ends

    def lines(self, batch_id: str, ends: "array[int]", first: int, count: int) -> list[bytes]:
        """The lines of at most `count` items from `first` on. Raises BatchNotFound."""
        last = min(first + count, len(ends) - 1)
        begin = ends[first]
        try:
            body = self._store.get_range(batch_manifest_key(batch_id), begin, ends[last] - 1)
        except (ObjectNotFound, InvalidRange) as error:  # deleted meanwhile
            raise BatchNotFound from error
        return [body[ends[i] - begin : ends[i + 1] - begin - 1] for i in range(first, last)]

    def done(self, batch_id: str) -> dict[int, JobState]:
        """How the jobs that have ended did so, by their place in the batch: a thousand per request."""
        ended = {}
        for stat in self._listed(batch_done_prefix(batch_id)):
            with suppress(InvalidKey, ValueError):
                index, state = parse_batch_done_key(stat.key)
                ended[index] = state
        return ended

    def begun(self, batch_id: str) -> list[int]:
        """The places of the jobs that have a record, ascending: a thousand per request."""
        found = []
        for stat in self._listed(item_records_prefix(batch_id)):
            with suppress(InvalidKey):
                found.append(index_of_record_key(stat.key))
        return found

    def cancel(self, batch_id: str) -> BatchCancel:
        """Put it on record that a batch is cancelled. Returns what is on record, an earlier cancel as well."""
        cancel = BatchCancel(cancelled_at=self._now())
        try:
            self._store.put(batch_cancel_key(batch_id), _line(cancel), if_none_match=True)
        except PreconditionFailed:
            return self.cancelled(batch_id) or cancel
        return cancel

    def cancelled(self, batch_id: str) -> BatchCancel | None:
        """The cancel of a batch; None where there is none."""
        return self._found(BatchCancel, batch_cancel_key(batch_id))

    def summary(self, batch_id: str) -> BatchSummary | None:
        """How a batch has ended; None while it has not."""
        return self._found(BatchSummary, batch_summary_key(batch_id))

    def versioned_summary(self, batch_id: str) -> tuple[BatchSummary, str] | None:
        """The same with its ETag."""
        try:
            found = self._store.get(batch_summary_key(batch_id))
        except ObjectNotFound:
            return None
        return _read(BatchSummary, found.body), found.stat.etag

    def write_summary(self, batch_id: str, summary: BatchSummary, etag: str) -> str:
        """Put a summary in the place of the version with this ETag. Returns the new one. Raises PreconditionFailed."""
        return self._store.put(batch_summary_key(batch_id), _line(summary), if_match=etag).etag

    def end(self, manifest: BatchManifest, summary: BatchSummary) -> str | None:
        """Record a batch's end, then take it off the active index, unless it has still to be told.

        Returns the summary's ETag; None where the end was on record before.
        """
        try:
            etag = self._store.put(batch_summary_key(manifest.batch_id), _line(summary), if_none_match=True).etag
        except PreconditionFailed:
            return None
        if not summary.awaits_webhook:
            self.deactivate(manifest)
        return etag

    def deactivate(self, manifest: BatchManifest) -> None:
        """Take an ended batch off the active index. Doing it twice changes nothing."""
        self._store.delete(active_key(manifest.principal, entry_of_batch(manifest)))

    def forget_entries(self, found: ActiveEntry) -> None:
        """Delete entries that lead nowhere."""
        self._store.delete(batch_index_key(*found))
        self._store.delete(active_key(*found))

    def entries(self, principal: str, *, after: str | None, limit: int) -> tuple[list[str], bool]:
        """The newest entries of a principal's batches behind the entry `after`, and whether there are more."""
        prefix = batch_index_prefix(principal)
        start = None if after is None else start_after_entry(prefix, after)
        found = []
        for stat in itertools.islice(self._listed(prefix, start), limit + 1):
            with suppress(InvalidKey):
                found.append(entry_of_key(stat.key))
        return found[:limit], len(found) > limit

    def delete(self, batch_id: str) -> None:
        """Delete an ended batch and all of its jobs: first a tombstone in the manifest's place, its entry last.

        Raises BatchNotFound; PreconditionFailed when somebody else deletes it at the same time. What a crash
        leaves is still listed, and `bury` finishes it.
        """
        manifest = self.head(batch_id)
        etag = self._store.stat(batch_manifest_key(batch_id)).etag
        tombstone = BatchTombstone(
            batch_id=batch_id,
            principal=manifest.principal,
            created_at=manifest.created_at,
            deleted_at=self._now(),
            request_digest=manifest.request_digest,
        )
        self._store.put(batch_manifest_key(batch_id), _line(tombstone), if_match=etag)
        self.bury(tombstone)

    def bury(self, tombstone: BatchTombstone) -> None:
        """Delete what a deleted batch may have left. Doing it twice changes nothing."""
        batch_id = tombstone.batch_id
        for prefix in (item_clips_prefix(batch_id), item_records_prefix(batch_id), batch_done_prefix(batch_id)):
            for stat in self._listed(prefix):
                self._store.delete(stat.key)
        for key in (batch_cancel_key(batch_id), batch_summary_key(batch_id)):
            self._store.delete(key)
        entry = index_entry(tombstone.created_at, batch_id)
        self.forget_entries(ActiveEntry(tombstone.principal, entry))

    def _put_entries(self, principal: str, entry: str) -> None:
        self._store.put(active_key(principal, entry), b"")
        self._store.put(batch_index_key(principal, entry), b"")

    def _forget_second_entries(self, refused: BatchManifest, entry: str) -> None:
        """The manifest was there already; the entries just written are too many, unless they are its own."""
        with suppress(BatchNotFound, BatchDeleted):
            if entry_of_batch(self.head(refused.batch_id)) != entry:
                self.forget_entries(ActiveEntry(refused.principal, entry))

    def _found(self, kind: type[M], key: str) -> M | None:
        try:
            return _read(kind, self._store.get(key).body)
        except ObjectNotFound:
            return None

    def _listed(self, prefix: str, start_after: str | None = None) -> Iterator[ObjectStat]:
        while True:
            page = self._store.list(prefix, start_after=start_after, limit=MAX_LIST_LIMIT)
            yield from page.stats
            if page.next_after is None:
                return
            start_after = page.next_after


def entry_of_batch(manifest: BatchManifest) -> str:
    """What the indexes list this batch as."""
    return index_entry(manifest.created_at, manifest.batch_id)


def _line(record: BaseModel) -> bytes:
    return record.model_dump_json().encode() + b"\n"


def _read(kind: type[M], line: bytes) -> M:
    """Not chained: a validation error quotes what it refuses."""
    try:
        record = kind.model_validate_json(line)
    except ValidationError as error:
        kinds = ", ".join(sorted({problem["type"] for problem in error.errors(include_input=False)}))
        raise RecordUnreadable(kinds) from None
    version = getattr(record, "version", None)
    if version != MANIFEST_VERSION:
        raise RecordUnreadable(f"version {version}, this service knows {MANIFEST_VERSION}")
    return record
