"""How long a page of `GET /jobs` takes in the job service, with few records in the store and with many.

The stores are filled by writing their files without waiting for the disk; what is measured reads them as ever.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from support import Jobs, open_jobs

from schemas.clips import Timings
from schemas.jobs import ANONYMOUS, JobRecord, JobState, RenderedClip, clip_id_of, new_job_id
from schemas.official_profiles import WAN_TINY
from schemas.requests import GenerateRequest
from storage.job_records import entry_of
from storage.keys import clip_key, done_key, job_key

FEW, MANY = 100, 100_000
PAGE = 20
ROUNDS = 200
SPACING = timedelta(seconds=7)
"""Between two jobs of the history: 100,000 jobs in eight days."""

_TOKEN = "0" * 16


def page_times(scratch: Path, advance: Callable[[int], None]) -> tuple[list[float], list[float]]:
    """Seconds per page with FEW and with MANY records, in turns: newest page and one behind a cursor alternately.

    advance: told how many records were written, and rounds done.
    """
    with open_jobs(scratch / "few") as few, open_jobs(scratch / "many") as many:
        for jobs, count in ((few, FEW), (many, MANY)):
            _fill(jobs.store.folder, count, advance)
        return asyncio.run(_race(few, many, advance))


async def _race(few: Jobs, many: Jobs, advance: Callable[[int], None]) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    cursors = [(await jobs.service.jobs(limit=PAGE)).next_cursor for jobs in (few, many)]
    for number in range(ROUNDS):
        for jobs, cursor, taken in zip((few, many), cursors, times, strict=True):
            began = time.perf_counter()
            page = await jobs.service.jobs(limit=PAGE, after=cursor if number % 2 else None)
            taken.append(time.perf_counter() - began)
            if len(page.jobs) != PAGE:
                raise RuntimeError(f"a page of {len(page.jobs)} jobs")
        advance(1)
    return times


def _fill(folder: Path, count: int, advance: Callable[[int], None]) -> None:
    """Jobs that have succeeded, the newest a moment ago."""
    request = GenerateRequest(prompt="a red circle moving left", seed=7)
    parameters, now = WAN_TINY.resolve(request), datetime.now(UTC)
    for number in range(count):
        at, job_id = now - number * SPACING, new_job_id()
        key = clip_key(clip_id_of(job_id), _TOKEN)
        record = JobRecord(
            job_id=job_id,
            request_id="bench",
            state=JobState.SUCCEEDED,
            created_at=at,
            at=dict.fromkeys((JobState.QUEUED, JobState.PREPARING, JobState.RUNNING, JobState.SUCCEEDED), at),
            attempt_token=_TOKEN,
            request=request,
            parameters=parameters,
            model=WAN_TINY.name,
            prompt_hash=_TOKEN,
            result=RenderedClip(key=key, size_bytes=1, sha256="0" * 64, timings=Timings(total=1.0)),
        )
        _write(folder / job_key(job_id), record.model_dump_json().encode())
        _write(folder / done_key(ANONYMOUS, JobState.SUCCEEDED, entry_of(record)), b"")
        advance(1)


def _write(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
