"""Job records as JSON objects in a store. Owns their life by compare-and-swap and their place in the indexes.

Two indexes tell what there is without reading records (`storage.keys` has their names). `active` holds what
somebody has to see to: its entry is written before the record and deleted after the job's end is on record and
in `done`. So a crash leaves an entry too many and never one too few; who finds one too many mends it. Knows no
runner of jobs.
"""

import hashlib
import heapq
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, NamedTuple, TypedDict, Unpack

from pydantic import BaseModel, ValidationError

from schemas.errors import InternalError, JobCancelled, JobNotFound, Problem
from schemas.jobs import TRANSITIONS, JobRecord, JobState, Lease, RenderedClip, Tombstone, item_of
from schemas.requests import GenerateRequest
from schemas.webhooks import WebhookDelivery
from storage.keys import (
    active_key,
    active_prefix,
    batch_cancel_key,
    batch_done_key,
    clip_key,
    clip_prefix,
    done_key,
    done_prefix,
    entry_id,
    entry_of_key,
    index_entry,
    job_key,
    principal_of_key,
    start_after_entry,
)
from storage.store import (
    MAX_LIST_LIMIT,
    InvalidKey,
    ObjectNotFound,
    ObjectStat,
    ObjectStore,
    PreconditionFailed,
    StoreError,
)

RECORD_VERSIONS: Final = frozenset({1, 2})
"""Those that this version of the service reads. It writes the newest."""

SLOW_CREATION_S: Final = 5.0
"""A record that took longer to create gets its entry a second time: somebody may have taken it for an orphan."""

ENDS: Final = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class IllegalTransition(StoreError):
    """A job can't go from the one state to the other."""

    def __init__(self, from_state: JobState, to_state: JobState) -> None:
        super().__init__(from_state, to_state)

    def __str__(self) -> str:
        from_state, to_state = self.args
        return f"a job can't go from {from_state} to {to_state}"


class Deleted(StoreError):
    """The job was deleted; `tombstone` is what is left of it."""

    def __init__(self, tombstone: Tombstone) -> None:
        super().__init__(tombstone)

    @property
    def tombstone(self) -> Tombstone:
        return self.args[0]  # type: ignore[no-any-return]  # set by __init__ above


class RecordUnreadable(InternalError):
    """A stored record is not what this version of the service writes. Names none of the record's content."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)

    @property
    def detail(self) -> str:
        """What is wrong, without the content: it holds the prompt."""
        return f"the job's record can't be read: {self.args[0]}"


class JobChanges(TypedDict, total=False):
    """What may change along with a job's state, or without it."""

    attempt_token: str
    attempts: int
    crashes: int
    suspect: bool
    lease: Lease | None
    cancel_requested: bool
    call_id: str
    result: RenderedClip | None
    error: Problem | None
    webhook: WebhookDelivery | None


class ActiveEntry(NamedTuple):
    """One entry of the active index. id: a job's or a batch's."""

    principal: str
    entry: str

    @property
    def id(self) -> str:
        return entry_id(self.entry)


class JobRecords:
    """Creates, reads, moves and lists job records.

    Args:
        store: where they are; its StoreUnavailable and StoreFull pass through every method.
        now: the clock; aware UTC datetimes.
    """

    def __init__(self, store: ObjectStore, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._now = now

    @property
    def store(self) -> ObjectStore:
        return self._store

    def create(self, record: JobRecord) -> str:
        """Write a new record. Returns its ETag. Raises PreconditionFailed when the id has one already."""
        if record.batch_id is not None and record.request.webhook_url is None:  # the batch's entry stands for it
            return self._store.put(job_key(record.job_id), _encode(record), if_none_match=True).etag
        key, began = active_key(record.principal, entry_of(record)), time.monotonic()
        self._store.put(key, b"")
        try:
            etag = self._store.put(job_key(record.job_id), _encode(record), if_none_match=True).etag
        except PreconditionFailed:
            self._forget_second_entry(record)
            raise
        if time.monotonic() - began > SLOW_CREATION_S:
            self._store.put(key, b"")
        return etag

    def get(self, job_id: str) -> tuple[JobRecord, str]:
        """Read a record and its ETag.

        Raises RecordUnreadable, Deleted, JobNotFound (also for what is no job id).
        """
        try:
            found = self._store.get(job_key(job_id))
        except (InvalidKey, ObjectNotFound) as error:
            raise JobNotFound from error
        return _decode(found.body, job_id), found.stat.etag

    def etag(self, job_id: str) -> str:
        """The ETag of a record, without reading it. Raises JobNotFound."""
        try:
            return self._store.stat(job_key(job_id)).etag
        except ObjectNotFound as error:
            raise JobNotFound from error

    def moved(self, record: JobRecord, to_state: JobState, **changes: Unpack[JobChanges]) -> JobRecord:
        """The record in its next state, with the time stamped. Writes nothing.

        Raises IllegalTransition: `schemas.jobs.TRANSITIONS` does not lead there, or only `delete` does.
        """
        if to_state not in TRANSITIONS[record.state] or to_state is JobState.DELETED:
            raise IllegalTransition(record.state, to_state)
        return record.model_copy(update={**changes, "state": to_state, "at": {**record.at, to_state: self._now()}})

    def cancelled(self, record: JobRecord) -> JobRecord:
        """The record of a job that is cancelled where nobody works on it. Writes nothing. Raises IllegalTransition."""
        url = record.request.webhook_url
        webhook = None if url is None else WebhookDelivery(url=url)
        error = JobCancelled().problem(job_id=record.job_id)
        return self.moved(record, JobState.CANCELLED, lease=None, error=error, webhook=webhook)

    @staticmethod
    def amended(record: JobRecord, **changes: Unpack[JobChanges]) -> JobRecord:
        """The record with something else changed than its state. Writes nothing."""
        return record.model_copy(update={**changes})

    def write(self, changed: JobRecord | Tombstone, etag: str | None, *, again: bool = False) -> str:
        """Put what `moved` or `amended` made in the place of the version with this ETag. Returns the new ETag.

        etag: None for a job of a batch that has no record yet; the record is created then.
        again: an earlier try at the same write had no answer, so it may be there already.

        Raises PreconditionFailed: another process changed or deleted the record meanwhile. Nothing was written.
        """
        try:
            if etag is None and isinstance(changed, JobRecord):
                return self.create(changed)
            key, body = job_key(changed.job_id), _encode(changed)
            return self._store.put(key, body, if_match=etag, if_none_match=etag is None).etag
        except PreconditionFailed:
            if again:
                with suppress(JobNotFound, Deleted):
                    found, found_etag = self.get(changed.job_id)
                    if found == changed:
                        return found_etag
            raise

    def transition(
        self, record: JobRecord, etag: str, to_state: JobState, **changes: Unpack[JobChanges]
    ) -> tuple[JobRecord, str]:
        """Move a job to its next state: `moved` and `write`. Returns the new record and its ETag."""
        moved = self.moved(record, to_state, **changes)
        return moved, self.write(moved, etag)

    def file_as_done(self, record: JobRecord) -> None:
        """Give an ended job its place among the ended ones; it stays active until its webhook is done.

        Doing it twice changes nothing.
        """
        item, entry = item_of(record.job_id), entry_of(record)
        if item is None:
            self._store.put(done_key(record.principal, record.state, entry), b"")
        else:
            self.file_item(record.job_id, record.state)
        if not record.awaits_webhook and (item is None or record.webhook is not None):
            self._store.delete(active_key(record.principal, entry))

    def file_item(self, job_id: str, state: JobState) -> None:
        """Give an ended job of a batch its place among the batch's ended ones. Doing it twice changes nothing."""
        item = item_of(job_id)
        if item is not None:
            self._store.put(batch_done_key(*item, state), b"")

    def forget_entry(self, found: ActiveEntry) -> None:
        """Delete an active entry that leads nowhere."""
        self._store.delete(active_key(*found))

    def batch_is_cancelled(self, batch_id: str) -> bool:
        """Whether a cancel of the batch is on record."""
        try:
            self._store.stat(batch_cancel_key(batch_id))
        except ObjectNotFound:
            return False
        return True

    def delete(self, record: JobRecord, etag: str | None) -> None:
        """Delete an ended job: first a tombstone in the record's place, then its clips, then its place in the index.

        Raises PreconditionFailed, IllegalTransition; nothing was deleted.
        """
        if JobState.DELETED not in TRANSITIONS[record.state]:
            raise IllegalTransition(record.state, JobState.DELETED)
        tombstone = Tombstone(
            job_id=record.job_id,
            principal=record.principal,
            batch_id=record.batch_id,
            created_at=record.created_at,
            at={**record.at, JobState.DELETED: self._now()},
            request_digest=request_digest(record.job_id, record.request),
        )
        if item_of(record.job_id) is None:  # what is left of a batch's job goes with its batch
            deleted_at = index_entry(tombstone.at[JobState.DELETED], record.job_id)
            self._store.put(done_key(record.principal, JobState.DELETED, deleted_at), b"")
        self.write(tombstone, etag)
        self.bury(tombstone)

    def bury(self, tombstone: Tombstone) -> None:
        """Delete what a deleted job may have left. Doing it twice changes nothing."""
        for key in self._clips(tombstone.job_id):
            self._store.delete(key)
        if item_of(tombstone.job_id) is None:
            entry = entry_of(tombstone)
            for state in ENDS:
                self._store.delete(done_key(tombstone.principal, state, entry))
            self._store.delete(active_key(tombstone.principal, entry))

    def discard_clip(self, record: JobRecord) -> None:
        """Delete what this record's attempt may have left in the store; the key's token is no other attempt's."""
        self._store.delete(clip_key(record.clip_id, record.attempt_token))

    def discard_lost_clips(self, record: JobRecord) -> None:
        """Delete what earlier attempts at an ended job left in the store."""
        kept = clip_prefix(record.clip_id, record.attempt_token) if record.result is not None else None
        for key in self._clips(record.job_id):
            if kept is None or not key.startswith(kept):
                self._store.delete(key)

    def active(self) -> Iterator[ActiveEntry]:
        """Everything that somebody has to see to, by principal, newest first."""
        for stat in self._listed("active/"):
            with suppress(InvalidKey):
                yield ActiveEntry(principal_of_key(stat.key), entry_of_key(stat.key))

    def entries(
        self, principal: str, states: Sequence[JobState], *, after: str | None, limit: int
    ) -> tuple[list[str], bool]:
        """The newest entries of a principal's jobs that may be in one of `states`, behind the entry `after`.

        Returns at most `limit` entries and whether there are more. The cost does not depend on how many jobs
        there are. An entry of the active index says no state: whoever reads its record has to look.
        """
        prefixes = [done_prefix(principal, state) for state in states if state in ENDS]
        if any(not state.is_terminal for state in states):
            prefixes.append(active_prefix(principal))
        merged = heapq.merge(*(self._entries_of(prefix, after, limit + 1) for prefix in prefixes))
        found = [entry for entry, _ in itertools.groupby(merged)][: limit + 1]
        return found[:limit], len(found) > limit

    def _entries_of(self, prefix: str, after: str | None, limit: int) -> Iterator[str]:
        start = None if after is None else start_after_entry(prefix, after)
        for stat in itertools.islice(self._listed(prefix, start, page_size=min(limit, MAX_LIST_LIMIT)), limit):
            with suppress(InvalidKey):
                yield entry_of_key(stat.key)

    def _listed(
        self, prefix: str, start_after: str | None = None, page_size: int = MAX_LIST_LIMIT
    ) -> Iterator[ObjectStat]:
        while True:
            page = self._store.list(prefix, start_after=start_after, limit=page_size)
            yield from page.stats
            if page.next_after is None:
                return
            start_after = page.next_after

    def _clips(self, job_id: str) -> list[str]:
        return [stat.key for stat in self._listed(clip_prefix("clip_" + job_id.removeprefix("job_")))]

    def _forget_second_entry(self, refused: JobRecord) -> None:
        """The record was there already; the entry just written is one too many, unless it is the record's own."""
        found: JobRecord | Tombstone
        with suppress(JobNotFound):
            try:
                found, _ = self.get(refused.job_id)
            except Deleted as deleted:
                found = deleted.tombstone
            if entry_of(found) != entry_of(refused):
                self._store.delete(active_key(refused.principal, entry_of(refused)))


def request_digest(job_id: str, request: GenerateRequest) -> str:
    """What a deleted job's request is recognised by; keyed by an id that nobody can guess, as prompts are short."""
    return hashlib.sha256(f"{job_id}\n{request.model_dump_json()}".encode()).hexdigest()


def entry_of(record: JobRecord | Tombstone) -> str:
    """What an index lists this job as. Another entry with its id is left of a submission that was cut short."""
    return index_entry(record.created_at, record.job_id)


def _encode(record: BaseModel) -> bytes:
    return record.model_dump_json().encode()


def _decode(body: bytes, job_id: str) -> JobRecord:
    deleted = b'"state":"deleted"' in body
    try:
        record = (Tombstone if deleted else JobRecord).model_validate_json(body)
    except ValidationError as error:
        kinds = ", ".join(sorted({problem["type"] for problem in error.errors(include_input=False)}))
        # Not chained: the validation error quotes the record, and the prompt is private.
        raise RecordUnreadable(kinds) from None
    if record.version not in RECORD_VERSIONS:
        raise RecordUnreadable(f"version {record.version}, this service knows {max(RECORD_VERSIONS)}")
    if record.job_id != job_id:
        raise RecordUnreadable("it belongs to another job")
    if isinstance(record, Tombstone):
        raise Deleted(record)
    return record
