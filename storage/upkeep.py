"""Retention and garbage: what is deleted because its time is over, and what no record names. Knows no schedule.

Nothing here reads the history: the indexes count time down in their keys, so what is older than a moment is what
sorts behind it. Any number of processes may do this at the same time: a deletion is a compare-and-swap first, and
what is deleted without one (tombstones, clips) is of an age at which nobody writes it any more.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from schemas.errors import BatchNotFound, JobNotFound, WanError
from schemas.jobs import JobState, job_id_of
from storage.batch_records import BatchDeleted, BatchRecords
from storage.job_records import ENDS, Deleted, JobRecords
from storage.keys import (
    batch_index_prefix,
    clip_prefix,
    done_prefix,
    entry_id,
    entry_of_key,
    job_key,
    parse_output_key,
    principal_of_key,
    start_after_entry,
    time_before,
)
from storage.store import MAX_LIST_LIMIT, InvalidKey, ObjectStat, ObjectStore, PreconditionFailed

TOMBSTONES_KEPT: Final = timedelta(days=30)
"""How long a deleted job's id answers 410 and is not rendered again under its idempotency key."""

GARBAGE_AGE: Final = timedelta(hours=1)
"""A clip that no record names may still be named until it is so old: its attempt is about to commit."""


class Swept(NamedTuple):
    """One slice of the search for garbage. cursor: where the next begins; None at the end of all clips."""

    deleted: int
    cursor: str | None


class Upkeep:
    """now: the clock; aware UTC datetimes."""

    def __init__(
        self,
        store: ObjectStore,
        jobs: JobRecords,
        batches: BatchRecords,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._batches = batches
        self._now = now

    def delete_expired_jobs(self, kept: timedelta, limit: int = MAX_LIST_LIMIT) -> int:
        """Delete jobs that ended longer ago than `kept`, with their clips. Returns how many."""
        deleted = 0
        for principal in self._principals("done/"):
            for state in ENDS:
                for key in self._older(done_prefix(principal, state), self._now() - kept, limit - deleted):
                    deleted += self._delete_job(key, kept)
        return deleted

    def delete_expired_batches(self, kept: timedelta, limit: int = 10) -> int:
        """Delete batches that ended longer ago than `kept`, with all of their jobs."""
        deleted = 0
        for principal in self._principals("batch-index/"):
            for key in self._older(batch_index_prefix(principal), self._now() - kept, limit - deleted):
                deleted += self._delete_batch(entry_id(entry_of_key(key)), kept)
        return deleted

    def forget_tombstones(self, limit: int = MAX_LIST_LIMIT) -> int:
        """Delete what is left of jobs that were deleted long ago. Returns how many."""
        forgotten = 0
        for principal in self._principals("done/"):
            prefix = done_prefix(principal, JobState.DELETED)
            for key in self._older(prefix, self._now() - TOMBSTONES_KEPT, limit - forgotten):
                job_id = entry_id(entry_of_key(key))
                try:
                    self._jobs.get(job_id)
                except Deleted as deleted:
                    if deleted.tombstone.at[JobState.DELETED] > self._now() - TOMBSTONES_KEPT:
                        continue  # made and deleted again since; this one has an entry of its own
                    self._store.delete(job_key(job_id))
                    forgotten += 1
                except JobNotFound:
                    pass
                self._store.delete(key)
        return forgotten

    def collect_garbage(self, cursor: str | None, limit: int = MAX_LIST_LIMIT) -> Swept:
        """Delete clips that no record names, among the next `limit` objects behind `cursor`."""
        page = self._store.list("clips/", start_after=cursor, limit=limit)
        by_clip: dict[str, list[ObjectStat]] = {}
        for stat in page.stats:
            with suppress(InvalidKey):  # somebody else's, in a bucket that is shared
                by_clip.setdefault(parse_output_key(stat.key).clip_id, []).append(stat)
        deleted = 0
        for clip_id, stats in by_clip.items():
            old = [stat for stat in stats if stat.last_modified < self._now() - GARBAGE_AGE]
            wanted = self._wanted(clip_id) if old else None
            for stat in old:
                if wanted is None or not stat.key.startswith(wanted):
                    self._store.delete(stat.key)
                    deleted += 1
        return Swept(deleted, page.next_after)

    def _wanted(self, clip_id: str) -> str | None:
        """What the keys of this clip's objects begin with, where there is a record that names or may name them."""
        try:
            record, _ = self._jobs.get(job_id_of(clip_id))
        except (JobNotFound, Deleted):
            return None
        except WanError:  # unreadable: not ours to judge
            return clip_prefix(clip_id)
        if record.state.is_terminal and record.result is None:
            return None
        return clip_prefix(clip_id, record.attempt_token)

    def _delete_job(self, key: str, kept: timedelta) -> int:
        job_id = entry_id(entry_of_key(key))
        try:
            record, etag = self._jobs.get(job_id)
            if record.awaits_webhook or record.at[record.state] > self._now() - kept:
                return 0
            self._jobs.delete(record, etag)
        except JobNotFound:
            self._store.delete(key)
        except Deleted as deleted:
            self._jobs.bury(deleted.tombstone)
        except PreconditionFailed:
            return 0
        else:
            return 1
        return 0

    def _delete_batch(self, batch_id: str, kept: timedelta) -> int:
        try:
            summary = self._batches.summary(batch_id)
            if summary is None or summary.awaits_webhook or summary.ended_at > self._now() - kept:
                self._batches.head(batch_id)  # a deletion that was cut short shows here
                return 0
            self._batches.delete(batch_id)
        except BatchDeleted as deleted:
            self._batches.bury(deleted.tombstone)
        except (BatchNotFound, PreconditionFailed):
            return 0
        return 1

    def _older(self, prefix: str, moment: datetime, limit: int) -> Iterator[str]:
        """The keys of an index of what was made before `moment`, the newest of them first; at most `limit`."""
        if limit <= 0:
            return
        start = start_after_entry(prefix, time_before(moment))
        for stat in self._store.list(prefix, start_after=start, limit=min(limit, MAX_LIST_LIMIT)).stats:
            with suppress(InvalidKey):
                entry_of_key(stat.key)
                yield stat.key

    def _principals(self, index: str) -> list[str]:
        """Who has entries in an index: one list for each."""
        found: list[str] = []
        after = None
        while True:
            stats = self._store.list(index, start_after=after, limit=1).stats
            if not stats:
                return found
            found.append(principal_of_key(stats[0].key))
            after = f"{index}{stats[0].key.split('/')[1]}0"  # the character behind the slash
