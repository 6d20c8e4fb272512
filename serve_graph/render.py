"""One attempt at one clip, beside the model: frames from the engine into an MP4, the MP4 into the store.

Only the object's key leaves. The MP4 grows in the spool folder while the engine decodes; encoding, hashing and
uploading run on worker threads, off the device's and the event loop's. Knows nothing of Ray.
"""

import asyncio
import hashlib
import logging
import tempfile
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from schemas.clips import Timings
from schemas.errors import InternalError, JobCancelled, RenderFailed, StoreUnavailable, WanError
from schemas.handoff import PreparedPrompt, RenderEvent, RenderTask, Started
from schemas.jobs import Progress, RenderedClip
from serve_graph.encode import Mp4Writer
from serve_graph.engine.job import Denoised, EngineEvent, EngineJob, Failed, Finished
from serve_graph.engine.loop import Engine
from serve_graph.logs import log_failure
from serve_graph.metrics import GeneratorMetrics
from serve_graph.patience import Patience
from serve_graph.settings import EncodeSettings
from storage.os_errors import store_errors
from storage.store import ObjectStat, ObjectStore, PreconditionFailed, StoreError

PROGRESS_INTERVAL_S = 0.25
"""Between two progress events of one job: no person sees more, and each costs a message between processes."""

ENCODE_BATCH_BYTES = 4 * 2**20
"""Frames that are handed to the encoder together: some at 480p, a whole clip at 64p. Two busy threads take the
interpreter's lock from each other at every call, which costs a small clip more than encoding beside decoding saves."""

MAX_QUEUED_BYTES = 4 * ENCODE_BATCH_BYTES
"""Decoded frames that may wait for the encoder before the decoder waits for it."""


@dataclass(frozen=True)
class Encoded:
    """A finished file and the seconds that the encoder worked on it."""

    size_bytes: int
    sha256: str
    encode_s: float


class ClipEncoder:
    """The engine's frame sink: a queue of frames and, once there are enough, a worker thread that encodes them."""

    def __init__(self, writer: "Mp4Factory", executor: Executor) -> None:
        self._writer = writer
        self._executor = executor
        self._changed = threading.Condition()
        self._queued: list[npt.NDArray[np.uint8]] = []
        self._queued_bytes = 0
        self._complete = False
        self._failure: WanError | None = None
        self._encoding: Future[Encoded] | None = None

    def write(self, frames: npt.NDArray[np.uint8]) -> None:
        """Queue (t, H, W, 3) uint8 RGB; waits while the encoder lags. Raises what made the encoder stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._queued_bytes < MAX_QUEUED_BYTES or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            self._queued.append(frames)
            self._queued_bytes += frames.nbytes
            if self._queued_bytes >= ENCODE_BATCH_BYTES:
                self._start()
                self._changed.notify_all()

    async def complete(self) -> Encoded:
        """Say that every frame was written, and wait for the file. Raises WanError."""
        with self._changed:
            if not self._queued and self._encoding is None:
                raise RenderFailed("the decoder gave no frames")
            self._complete = True
            encoding = self._start()
            self._changed.notify_all()
        return await asyncio.wrap_future(encoding)

    async def stop(self) -> None:
        """Let go of the file, finished or not. Nothing happens when the encoder has ended."""
        with self._changed:
            self._failure = self._failure or JobCancelled()
            self._changed.notify_all()
        if self._encoding is not None and not self._encoding.cancel():
            await asyncio.gather(asyncio.wrap_future(self._encoding), return_exceptions=True)

    def _start(self) -> Future[Encoded]:
        if self._encoding is None:
            self._encoding = self._executor.submit(self._encode)
        return self._encoding

    def _encode(self) -> Encoded:
        busy_s = 0.0
        try:
            with store_errors(), self._writer.open() as mp4:
                while batch := self._next_batch():
                    began = time.monotonic()
                    for frames in batch:
                        mp4.write(frames)
                    busy_s += time.monotonic() - began
                began = time.monotonic()  # the flush and the move of the index count, too
            with store_errors():
                size_bytes, sha256 = _digest(self._writer.path)
            return Encoded(size_bytes, sha256, busy_s + time.monotonic() - began)
        except WanError as error:
            self._fail(error)
            raise
        except Exception as error:  # whatever it is, the device thread must not wait for this encoder any more
            failure = RenderFailed("the encoder failed on this job")
            failure.__cause__ = error  # set at once: the device thread may raise it first
            self._fail(failure)
            raise failure from error

    def _fail(self, failure: WanError) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _next_batch(self) -> list[npt.NDArray[np.uint8]]:
        """The frames that are queued, once there are enough or no more will come; none at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._queued_bytes >= ENCODE_BATCH_BYTES or self._complete or self._failure is not None
            )
            if self._failure is not None:
                raise self._failure
            batch, self._queued, self._queued_bytes = self._queued, [], 0
            self._changed.notify_all()
            return batch


@dataclass(frozen=True)
class Mp4Factory:
    """How to open the file of one clip."""

    path: Path
    task: RenderTask
    model: str
    encode: EncodeSettings

    def open(self) -> Mp4Writer:
        parameters = self.task.parameters
        return Mp4Writer(
            self.path,
            width=parameters.width,
            height=parameters.height,
            fps=parameters.fps,
            settings=self.encode,
            metadata={"model": self.model, "seed": parameters.seed},
        )


class Renderer:
    """Renders clips with one engine. Any number of `render` calls may run at once on one event loop."""

    def __init__(
        self,
        engine: Engine,
        store: ObjectStore,
        *,
        model: str,
        spool: Path,
        encode: EncodeSettings,
        executor: Executor,
        metrics: GeneratorMetrics,
        patience_s: float,
    ) -> None:
        self._engine = engine
        self._store = store
        self._model = model
        self._spool = spool
        self._settings = encode
        self._executor = executor
        self._metrics = metrics
        self._patience_s = patience_s
        spool.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def render(self, task: RenderTask, prompt: PreparedPrompt) -> AsyncGenerator[RenderEvent, None]:
        """Render one clip. Yields `Started`, some `Progress` and at last the `RenderedClip`.

        Closing or cancelling the iterator stops the job within one unit of the engine's work and leaves nothing
        in the spool. Raises WanError: what went wrong with this clip.
        """
        with store_errors():
            folder = tempfile.TemporaryDirectory(prefix=f"{task.job_id}-", dir=self._spool)
        with folder:
            factory = Mp4Factory(Path(folder.name) / "clip.mp4", task, self._model, self._settings)
            encoder = ClipEncoder(factory, self._executor)
            try:
                async for event in self._run(task, prompt, encoder):
                    if isinstance(event, Finished):
                        encoded = await encoder.complete()
                        yield await self._upload(task, factory.path, encoded, event)
                    else:
                        yield event
            finally:
                self._engine.cancel(task.job_id)
                await asyncio.shield(encoder.stop())

    async def _run(
        self, task: RenderTask, prompt: PreparedPrompt, encoder: ClipEncoder
    ) -> AsyncGenerator[Started | Progress | Finished, None]:
        """The engine's events up to `Finished`, progress thinned out. Raises what `Failed` says."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Started | Progress | Finished | Failed] = asyncio.Queue()
        next_progress = 0.0

        def tell(event: EngineEvent) -> None:
            """On the device thread: wake the event loop for what it passes on, and for nothing else."""
            nonlocal next_progress
            if isinstance(event, Denoised):
                return
            if isinstance(event, Progress):
                if time.monotonic() < next_progress:
                    return
                next_progress = time.monotonic() + PROGRESS_INTERVAL_S
            with suppress(RuntimeError):  # the loop is closed, so nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        self._engine.submit(EngineJob(task.job_id, task.parameters, prompt, encoder, tell, task.standing))
        while True:
            event = await events.get()
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, Finished):
                return

    async def _upload(self, task: RenderTask, path: Path, encoded: Encoded, finished: Finished) -> RenderedClip:
        began = time.monotonic()
        try:
            await self._put(task, path)
        except WanError as error:
            self._metrics.upload_failed(error.name)
            raise
        except (StoreError, OSError) as error:  # the key is taken, or the spooled file is gone
            self._metrics.upload_failed(InternalError.name)
            raise InternalError from error
        self._metrics.clip_uploaded(encoded.size_bytes)
        return RenderedClip(
            key=task.clip_key,
            size_bytes=encoded.size_bytes,
            sha256=encoded.sha256,
            timings=Timings(
                denoise=finished.denoise_s,
                decode=finished.decode_s,
                encode=encoded.encode_s,
                upload=time.monotonic() - began,
            ),
            denoise_device_s=finished.denoise_device_s,
            decode_device_s=finished.decode_device_s,
            effort=finished.effort,
        )

    async def _put(self, task: RenderTask, path: Path) -> None:
        """Put the clip into the store, again and again while the store is away; it stays in the spool meanwhile."""
        patience, away = Patience(self._patience_s), False
        while True:
            putting = asyncio.get_running_loop().run_in_executor(
                self._executor, lambda: self._store.put(task.clip_key, path, if_none_match=True)
            )
            try:
                await asyncio.shield(putting)
                return
            except asyncio.CancelledError:
                await self._take_back(putting, task.clip_key)
                raise
            except StoreUnavailable as failure:
                if not away:
                    log_failure(
                        "upload_waits",
                        failure,
                        level=logging.WARNING,
                        job_id=task.job_id,
                        request_id=task.request_id,
                    )
                away = True
                if not await patience.pause():
                    raise
            except PreconditionFailed:
                if away:  # an earlier try was written after all: no other attempt has this key
                    return
                raise

    async def _take_back(self, putting: asyncio.Future[ObjectStat], clip_key: str) -> None:
        """After a cancel in the middle of an upload, which can't be stopped: nobody will ever ask for the clip."""
        with suppress(WanError, StoreError, OSError):
            await putting
            await asyncio.get_running_loop().run_in_executor(self._executor, self._store.delete, clip_key)


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
