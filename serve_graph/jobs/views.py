"""What clients see of a job's record: the job, its clip, a signed URL. Reads nothing and writes nothing."""

from datetime import UTC, datetime, timedelta

from schemas.clips import Clip
from schemas.errors import ClipGone, ClipNotFound, JobNotFound, RecordedFailure, WorkerLost
from schemas.jobs import Job, JobRecord, JobState, Progress, RenderedClip, Tombstone
from schemas.requests import url_ttl
from serve_graph.api_keys import Principal
from storage.store import PresignedUrl, Presigner


class Views:
    """Makes the answers of one service.

    clip_retention: how long a clip is kept at least; None: for ever.
    """

    def __init__(self, presigner: Presigner, default_url_ttl: timedelta, clip_retention: timedelta | None) -> None:
        self._presigner = presigner
        self._default_url_ttl = default_url_ttl
        self._clip_retention = clip_retention

    def job(
        self,
        record: JobRecord,
        *,
        progress: Progress | None = None,
        position: int | None = None,
        seconds_left: float | None = None,
    ) -> Job:
        """The job as its owner sees it."""
        shown = progress or (record.lease.progress if record.lease is not None else None)
        if seconds_left is None and shown is not None:
            seconds_left = shown.seconds_left
        return Job(
            job_id=record.job_id,
            state=record.state,
            created_at=record.created_at,
            at=record.at,
            request_id=record.request_id,
            batch_id=record.batch_id,
            model=record.model,
            parameters=record.parameters,
            priority=record.request.priority,
            attempts=record.attempts,
            cancel_requested=record.cancel_requested,
            position=position,
            seconds_left=None if record.state.is_terminal else seconds_left,
            progress=shown,
            clip=self._clip_if_there(record),
            error=record.error,
            webhook=record.webhook.state if record.webhook is not None else None,
        )

    def clip(self, record: JobRecord) -> Clip:
        """The clip of an ended job. Raises the problem that the job ended with; ClipGone."""
        if record.error is not None:
            raise RecordedFailure(record.error)
        if record.result is None:
            raise WorkerLost("the process that ran this job is gone")
        signed = self.signed(record, record.result)
        parameters = record.parameters
        return Clip(
            clip_id=record.clip_id,
            job_id=record.job_id,
            request_id=record.request_id,
            output_url=signed.url,
            expires_at=signed.expires_at,
            model=record.model,
            duration=parameters.duration,
            size_bytes=record.result.size_bytes,
            sha256=record.result.sha256,
            timings=record.result.timings,
            effort=record.result.effort,
            **parameters.model_dump(exclude={"levers"}),
        )

    def clip_url(self, record: JobRecord, clip_id: str) -> PresignedUrl:
        """A freshly signed URL. Raises ClipNotFound, ClipGone."""
        if record.result is None or record.clip_id != clip_id:
            raise ClipNotFound
        return self.signed(record, record.result)

    def signed(self, record: JobRecord, result: RenderedClip, key: str | None = None) -> PresignedUrl:
        """A signed URL of the clip, or of what lies under another key beside it. Raises ClipGone."""
        expires_in = url_ttl(record.request, self._default_url_ttl)
        if self._clip_retention is not None:
            left = record.at[JobState.SUCCEEDED] + self._clip_retention - datetime.now(UTC)
            if left < timedelta(seconds=1):
                raise ClipGone
            expires_in = min(expires_in, left)
        key = result.key if key is None else key
        return self._presigner.presign(
            key,
            expires_in=expires_in,
            response_content_disposition=f'inline; filename="{record.clip_id}.{key.rpartition(".")[2]}"',
        )

    def _clip_if_there(self, record: JobRecord) -> Clip | None:
        if record.state is not JobState.SUCCEEDED:
            return None
        try:
            return self.clip(record)
        except ClipGone:
            return None


def owned(record: JobRecord, principal: Principal) -> JobRecord:
    """Another's job looks like none."""
    if record.principal != principal.name:
        raise JobNotFound
    return record


def owned_tombstone(tombstone: Tombstone, principal: Principal) -> Tombstone:
    """As `owned`."""
    if tombstone.principal != principal.name:
        raise JobNotFound
    return tombstone
