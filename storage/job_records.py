"""Job records as JSON objects in a store. Owns their life by compare-and-swap; knows no runner of jobs."""

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, TypedDict, Unpack

from pydantic import ValidationError

from schemas.errors import InternalError, JobNotFound, Problem
from schemas.jobs import TRANSITIONS, JobRecord, JobState, RenderedClip
from storage.keys import clip_key, job_key
from storage.store import InvalidKey, ObjectNotFound, ObjectStore, PreconditionFailed, StoreError

RECORD_VERSION: Final = 1


class IllegalTransition(StoreError):
    """A job can't go from the one state to the other."""

    def __init__(self, from_state: JobState, to_state: JobState) -> None:
        super().__init__(from_state, to_state)

    def __str__(self) -> str:
        from_state, to_state = self.args
        return f"a job can't go from {from_state} to {to_state}"


class RecordUnreadable(InternalError):
    """A stored record is not what this version of the service writes. Names none of the record's content."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)

    @property
    def detail(self) -> str:
        """What is wrong, without the content: it holds the prompt."""
        return f"the job's record can't be read: {self.args[0]}"


class JobChanges(TypedDict, total=False):
    """What may change along with a job's state."""

    attempt_token: str
    result: RenderedClip | None
    error: Problem | None


class JobRecords:
    """Creates, reads and moves job records.

    Args:
        store: where they are; its StoreUnavailable and StoreFull pass through every method.
        now: the clock; aware UTC datetimes.
    """

    def __init__(self, store: ObjectStore, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._now = now

    def create(self, record: JobRecord) -> str:
        """Write a new record. Returns its ETag. Raises PreconditionFailed when the id has one already."""
        return self._store.put(job_key(record.job_id), _encode(record), if_none_match=True).etag

    def get(self, job_id: str) -> tuple[JobRecord, str]:
        """Read a record and its ETag. Raises RecordUnreadable, JobNotFound (also for what is no job id)."""
        try:
            found = self._store.get(job_key(job_id))
        except (InvalidKey, ObjectNotFound) as error:
            raise JobNotFound from error
        return _decode(found.body, job_id), found.stat.etag

    def discard_clip(self, record: JobRecord) -> None:
        """Delete what this record's attempt may have left in the store; the key's token is no other attempt's."""
        self._store.delete(clip_key(record.clip_id, record.attempt_token))

    def moved(self, record: JobRecord, to_state: JobState, **changes: Unpack[JobChanges]) -> JobRecord:
        """The record in its next state, with the time stamped. Writes nothing.

        Raises IllegalTransition: `schemas.jobs.TRANSITIONS` does not lead there.
        """
        if to_state not in TRANSITIONS[record.state]:
            raise IllegalTransition(record.state, to_state)
        return record.model_copy(update={**changes, "state": to_state, "at": {**record.at, to_state: self._now()}})

    def write(self, moved: JobRecord, etag: str, *, again: bool = False) -> str:
        """Put what `moved` made in the place of the version with this ETag. Returns the new ETag.

        again: an earlier try at the same write had no answer, so it may be there already.

        Raises PreconditionFailed: another process changed or deleted the record meanwhile. Nothing was written.
        """
        try:
            return self._store.put(job_key(moved.job_id), _encode(moved), if_match=etag).etag
        except PreconditionFailed:
            if again:
                with suppress(JobNotFound):
                    found, found_etag = self.get(moved.job_id)
                    if found == moved:
                        return found_etag
            raise

    def transition(
        self, record: JobRecord, etag: str, to_state: JobState, **changes: Unpack[JobChanges]
    ) -> tuple[JobRecord, str]:
        """Move a job to its next state: `moved` and `write`. Returns the new record and its ETag."""
        moved = self.moved(record, to_state, **changes)
        return moved, self.write(moved, etag)


def _encode(record: JobRecord) -> bytes:
    return record.model_dump_json().encode()


def _decode(body: bytes, job_id: str) -> JobRecord:
    try:
        record = JobRecord.model_validate_json(body)
    except ValidationError as error:
        kinds = ", ".join(sorted({problem["type"] for problem in error.errors(include_input=False)}))
        # Not chained: the validation error quotes the record, and the prompt is private.
        raise RecordUnreadable(kinds) from None
    if record.version != RECORD_VERSION:
        raise RecordUnreadable(f"version {record.version}, this service knows {RECORD_VERSION}")
    if record.job_id != job_id:
        raise RecordUnreadable("it belongs to another job")
    return record
