"""One job from its claim to its clip: attempt after attempt, until one ends by itself. Knows no queue and no HTTP."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from schemas.errors import InternalError, ModelNotReady, RunTimeExceeded, ShuttingDown, WanError, WorkerLost
from schemas.handoff import RenderTask, Started
from schemas.jobs import JobState, Progress, RenderedClip
from serve_graph.jobs.limits import Patiences
from serve_graph.jobs.live import LiveJob
from serve_graph.jobs.recording import Recorder
from serve_graph.jobs.worker import Worker
from serve_graph.logs import log_event, log_failure
from serve_graph.patience import Patience
from storage.keys import clip_key

WATCH_INTERVAL_S = 10.0
"""Between two looks at the worker while a job runs."""

MAX_CRASHES = 3
"""Attempts at one job that may end with their worker's process while the job was alone: it may be what ends it."""


class Attempts:
    """Runs jobs on one worker.

    on_start: told when a job holds a slot of the engine, and when it no longer does. on_retry: told of each
    attempt that was lost.
    """

    def __init__(
        self,
        worker: Worker,
        recorder: Recorder,
        patiences: Patiences,
        *,
        on_start: Callable[[LiveJob], None],
        on_retry: Callable[[LiveJob, WanError], None],
    ) -> None:
        self._worker = worker
        self._recorder = recorder
        self._patiences = patiences
        self._on_start = on_start
        self._on_retry = on_retry
        self._turns = _Turns()
        self.last_advance = time.monotonic()

    async def clip(self, live: LiveJob) -> RenderedClip:
        """Render one job's clip. Raises what ended it; WorkerLost when the worker stays away.

        A call to a worker that is away may wait for ever, so it is watched from outside.
        """
        working = asyncio.create_task(self._clip(live))
        watching = asyncio.create_task(self._worker_stays_away())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            watching.result()
            raise WorkerLost("the model has been away for too long; send the request again later", 60)
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _worker_stays_away(self) -> None:
        """Returns once the worker has been away for as long as a job waits for it."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            patience = Patience(self._patiences.worker_s)
            if not await self._worker_answers() and not await self._worker_is_back(patience):
                return

    async def _clip(self, live: LiveJob) -> RenderedClip:
        """One attempt after another: a worker that is lost is not the job's fault, unless it was alone with it."""
        patience = None
        while True:
            try:
                async with self._turns.taken(alone=live.record.suspect) as neighbours:
                    if not neighbours.most:
                        self.last_advance = time.monotonic()  # an idle worker says nothing, and is not stalled
                    return await self._attempt(live)
            except (WorkerLost, ModelNotReady, ShuttingDown) as failure:
                if patience is None or live.started:
                    patience = Patience(self._patiences.worker_s)
                blame = {} if not isinstance(failure, WorkerLost) else _blame(live, neighbours.most)
                if blame.get("crashes") == MAX_CRASHES or not await self._worker_is_back(patience):
                    raise
                await self._forget(live, failure, blame)

    async def _attempt(self, live: LiveJob) -> RenderedClip:
        taken = time.monotonic()
        if live.etag is None:  # of a batch: other processes may be at it, and encoding a text is work
            await self._recorder.claim(live)
            prompt = await self._worker.prepare(live.record.parameters)
        else:
            _, prompt = await asyncio.gather(self._recorder.claim(live), self._worker.prepare(live.record.parameters))
        prepared = started = time.monotonic()
        record = live.record
        task = RenderTask(
            job_id=record.job_id,
            request_id=record.request_id,
            clip_key=clip_key(record.clip_id, record.attempt_token),
            parameters=record.parameters,
            standing=live.turn.standing(time.monotonic()),
        )
        async with (
            _at_most(self._patiences.run_s) as run_time,
            aclosing(self._worker.render(task, prompt)) as events,
        ):
            async for event in events:
                self.last_advance = time.monotonic()
                if isinstance(event, Started):
                    started = time.monotonic()
                    run_time.reschedule(asyncio.get_running_loop().time() + self._patiences.run_s)
                    live.started = True
                    self._on_start(live)
                    await self._recorder.move(live, JobState.RUNNING)
                elif isinstance(event, Progress):
                    live.progress = event
                    live.tell()
                else:
                    queued_s = taken - live.began + started - prepared
                    return _with_service_timings(event, queued_s, prepared - taken, time.monotonic() - live.began)
        raise InternalError("the generator ended without a clip")

    async def _worker_is_back(self, patience: Patience) -> bool:
        while await patience.pause():
            if await self._worker_answers():
                return True
        return False

    async def _worker_answers(self) -> bool:
        try:
            await self._worker.health()
        except WanError:
            return False
        return True

    async def _forget(self, live: LiveJob, failure: WanError, blame: dict[str, Any]) -> None:
        """Make way for the next attempt: nothing of the lost one shows, or is left where it can be found."""
        record = live.record
        log_event(
            "job_retried",
            level=logging.WARNING,
            job_id=record.job_id,
            request_id=record.request_id,
            error=failure.name,
        )
        self._on_retry(live, failure)
        if live.started:
            await self.discard_clip(live)
        live.started, live.progress = False, None
        live.record = record.model_copy(update=blame)  # goes into the store with the next attempt's claim
        self._on_start(live)

    async def discard_clip(self, live: LiveJob) -> None:
        """An upload may have ended just before its attempt did; its clip belongs to no one."""
        try:
            await self._recorder.io(self._recorder.records.discard_clip, live.record)
        except WanError as failure:  # the store is away; what is left behind is garbage, not a clip
            log_failure("discard_failed", failure, job_id=live.job_id)


def _blame(live: LiveJob, neighbours: int) -> dict[str, Any]:
    """What a lost worker says about a job: that it ran beside others makes it suspect, alone it is to blame."""
    return {"suspect": True} if neighbours else {"suspect": True, "crashes": live.record.crashes + 1}


class _Turn:
    """most: the other jobs that had a turn at the same time, at most."""

    def __init__(self, others: int) -> None:
        self.most = others


class _Turns:
    """Lets jobs run side by side, and a suspect alone, as soon as those before it are done."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._turns: set[_Turn] = set()
        self._alone = False
        self._waiting_alone = 0

    @asynccontextmanager
    async def taken(self, *, alone: bool) -> AsyncIterator[_Turn]:
        """Hold a turn."""
        async with self._changed:
            await self._wait(alone)
            turn = _Turn(len(self._turns))
            self._turns.add(turn)
            self._alone = alone
            for other in self._turns:
                other.most = max(other.most, len(self._turns) - 1)
        try:
            yield turn
        finally:
            self._turns.discard(turn)
            if not self._turns:
                self._alone = False
            await asyncio.shield(self._tell())  # also when the job is cancelled just here

    async def _wait(self, alone: bool) -> None:
        if not alone:
            await self._changed.wait_for(lambda: not self._alone and not self._waiting_alone)
            return
        self._waiting_alone += 1
        try:
            await self._changed.wait_for(lambda: not self._turns)
        finally:
            self._waiting_alone -= 1
            self._changed.notify_all()  # one that was cancelled keeps the others no longer

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@asynccontextmanager
async def _at_most(run_s: float) -> AsyncIterator[asyncio.Timeout]:
    """Raises RunTimeExceeded. The timeout has no end until it is rescheduled."""
    timeout = asyncio.timeout(None)
    try:
        async with timeout:
            yield timeout
    except TimeoutError as error:
        if not timeout.expired():
            raise
        raise RunTimeExceeded(run_s) from error


def _with_service_timings(clip: RenderedClip, queued_s: float, preprocess_s: float, total_s: float) -> RenderedClip:
    timings = clip.timings.model_copy(update={"queued": queued_s, "preprocess": preprocess_s, "total": total_s})
    return clip.model_copy(update={"timings": timings})
