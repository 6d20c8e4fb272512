"""The engine: one thread that owns the device and takes its work one step or one decode chunk at a time.

Jobs join and leave between two units of work, and whose turn it is is decided anew for each. Whatever goes wrong
inside a unit ends the jobs that caused it and no other: a shared forward that fails is tried again with each of its
jobs alone. A unit that never returns, or a thread that died, makes `check` raise, so that whoever supervises the engine
can replace the process.
"""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from schemas.errors import JobCancelled, OutOfMemory, RenderFailed, ShuttingDown, WanError, WorkerLost
from schemas.handoff import Started
from schemas.jobs import Progress
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.denoise import denoise_step
from serve_graph.engine.job import EngineJob, Failed
from serve_graph.engine.policy import Decode, Step, next_work
from serve_graph.metrics import GeneratorMetrics
from serve_graph.scheduling import Policy, Turn, WorkModel, next_to_start


@dataclass(frozen=True)
class EngineLimits:
    """max_jobs_in_flight: slots. max_batch_tokens: latent tokens in one forward. text_length: padded text tokens.

    policy: whose turn it is, see `serve_graph.scheduling`; under `srpt` one more job than the slots may overtake.
    """

    max_jobs_in_flight: int
    max_batch_tokens: int
    text_length: int
    hang_timeout_s: float = 600.0
    policy: Policy = "srpt"


class Engine:
    """Runs jobs on one device. Every public method may be called from any thread and returns at once.

    on_error: told, on the device thread, each exception that a unit of work raised and for which job.
    """

    def __init__(
        self,
        parts: GeneratorParts,
        limits: EngineLimits,
        metrics: GeneratorMetrics,
        on_error: Callable[[str, BaseException], None] = lambda job_id, error: None,
    ) -> None:
        self._parts = parts
        self._limits = limits
        self._max_batch_tokens = limits.max_batch_tokens
        self._metrics = metrics
        self._on_error = on_error
        self._model = WorkModel()
        self._changed = threading.Condition()
        self._waiting: list[EngineJob] = []
        self._in_flight: list[EngineJob] = []
        self._closing = False
        self._ended = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="wan-device", daemon=True)
        self._thread.start()

    def submit(self, job: EngineJob) -> None:
        """Queue a job; its events tell the rest. Raises ShuttingDown once closed, WorkerLost once dead."""
        with self._changed:
            if self._closing:
                raise ShuttingDown("the engine is closing")
            if self._ended:
                raise WorkerLost("the device thread has died")
            job.turn = Turn.of(job.standing, time.monotonic())
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job_id: str) -> None:
        """Stop a job before its next unit of work. Unknown and ended jobs are left alone."""
        with self._changed:
            for job in (*self._waiting, *self._in_flight):
                if job.job_id == job_id:
                    job.cancelled = True
            self._changed.notify()

    def check(self) -> None:
        """Raise WorkerLost when the device thread is dead or hangs in a unit of work."""
        if self._ended:
            raise WorkerLost("the device thread has died")
        busy_since = self._busy_since
        if busy_since is not None and time.monotonic() - busy_since > self._limits.hang_timeout_s:
            raise WorkerLost(f"the device has not answered for {self._limits.hang_timeout_s:g} s")

    def close(self, timeout_s: float = 10.0) -> None:
        """Fail what is left with ShuttingDown and stop the thread after its current unit of work."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        ending: WanError = WorkerLost("the device thread has died")
        try:
            while self._wait_for_work():
                work = next_work(self._in_flight, self._max_batch_tokens, self._limits.policy, time.monotonic())
                if isinstance(work, Decode):
                    self._decode(self._in_flight[work.index])
                elif isinstance(work, Step):
                    self._step([self._in_flight[i] for i in work.indices])
            ending = ShuttingDown("the engine is closing")
        finally:
            with self._changed:
                self._ended = True  # from here on nobody would tell a job that it ended
                left = [*self._in_flight, *self._waiting]
                self._waiting.clear()
            for job in left:
                self._end(job, ending)

    def _wait_for_work(self) -> bool:
        """Block until there is work. Returns False when the engine closes."""
        with self._changed:
            while True:
                if self._closing:
                    return False
                cancelled = [job for job in (*self._in_flight, *self._waiting) if job.cancelled]
                self._waiting = [job for job in self._waiting if not job.cancelled]
                admitted = self._take_from_waiting()
                if cancelled or admitted or self._in_flight:
                    break
                self._changed.wait()
        for job in cancelled:
            self._end(job, JobCancelled())
        for job in admitted:
            self._admit(job)
        return True

    def _take_from_waiting(self) -> list[EngineJob]:
        """Those of `_waiting` that begin now; in flight at once, so that `cancel` finds them at any moment."""
        taken: list[EngineJob] = []
        for job in (*self._in_flight, *self._waiting):
            job.remaining_s = self._model.seconds(job.work_left)
        policy, slots, now = self._limits.policy, self._limits.max_jobs_in_flight, time.monotonic()
        while (index := next_to_start(self._waiting, self._in_flight, slots, policy, now)) is not None:
            taken.append(self._waiting.pop(index))
            self._in_flight.append(taken[-1])
        return taken

    def _admit(self, job: EngineJob) -> None:
        self._metrics.set_jobs_in_flight(len(self._in_flight))
        job.notify(Started())
        self._guarded([job], lambda: job.begin(self._parts, self._limits.text_length))

    def _step(self, batch: Sequence[EngineJob]) -> None:
        began = time.monotonic()
        num_forwards = 0
        predictions: list[int] = []

        def step() -> None:
            nonlocal num_forwards
            predictions.extend(1 + job.denoising.is_guided for job in batch)
            num_forwards = denoise_step(self._parts.transformer, [job.denoising for job in batch])
            if self._parts.device.type == "cuda":  # else the host runs ahead, and what it decides comes late
                torch.cuda.synchronize(self._parts.device)

        if not self._guarded(batch, step):
            return
        seconds = time.monotonic() - began
        self._metrics.step_done(seconds, len(batch))
        self._metrics.forward_done("cond")
        if num_forwards == 2:
            self._metrics.forward_done("uncond")
        self._model.saw_forwards(batch[0].work, sum(predictions), seconds)
        for job, own in zip(batch, predictions, strict=True):
            job.denoise_device_s += seconds * own / sum(predictions)
            self._tell_progress(job)
            if job.denoising.is_done:
                self._guarded([job], lambda job=job: job.begin_decoding(self._parts))  # type: ignore[misc]  # binds

    def _decode(self, job: EngineJob) -> None:
        began = time.monotonic()
        decoded: list[npt.NDArray[np.uint8]] = []
        if not self._guarded([job], lambda: decoded.append(job.decoding.next_frames()), job.decoding.start_smaller):
            return
        if len(decoded[0]) and not self._guarded(
            [job], lambda: job.sink.write(decoded[0]), count=self._metrics.device_waited
        ):
            return
        seconds = time.monotonic() - began
        self._model.saw_chunk(job.work, seconds)
        job.decode_device_s += seconds
        self._tell_progress(job)
        if job.decoding.is_done:
            self._remove(job)
            job.finish()

    def _guarded(
        self,
        jobs: Sequence[EngineJob],
        unit: Callable[[], None],
        start_smaller: Callable[[], bool] = lambda: False,
        count: Callable[[float], None] | None = None,
    ) -> bool:
        """Run one unit of work for `jobs`. Returns whether it succeeded; a failure ends only who caused it.

        start_smaller: asked after running out of memory; where it returns True, nobody ends. count: told the unit's
        seconds; None: they are the device's work.
        """
        self._busy_since = began = time.monotonic()
        try:
            unit()
        except Exception as error:  # the boundary where a job's failure becomes the job's and nobody else's
            if not isinstance(error, JobCancelled):  # a sink stops that way when its reader went away
                for job in jobs:
                    self._on_error(job.job_id, error)
            problem = as_problem(error)
        else:
            return True
        finally:
            self._busy_since = None
            (count or self._metrics.device_worked)(time.monotonic() - began)
        again = isinstance(problem, OutOfMemory) and start_smaller()
        if len(jobs) == 1 and not again:
            self._end(jobs[0], problem)
        for job in jobs:
            job.suspect = True
        if isinstance(problem, OutOfMemory):  # now that neither the job nor the traceback holds on to tensors
            self._shrink(jobs)
        return False

    def _shrink(self, jobs: Sequence[EngineJob]) -> None:
        """After running out of memory: free what can be freed, and share less from now on."""
        if len(jobs) > 1:
            self._max_batch_tokens = sum(job.num_tokens for job in jobs) - 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _end(self, job: EngineJob, error: WanError) -> None:
        self._remove(job)
        self._metrics.steps_wasted(job.steps_done)
        job.let_go()
        job.notify(Failed(error))

    def _remove(self, job: EngineJob) -> None:
        with self._changed:
            if job in self._in_flight:
                self._in_flight.remove(job)
        self._metrics.set_jobs_in_flight(len(self._in_flight))

    def _tell_progress(self, job: EngineJob) -> None:
        left = job.work_left
        if job.is_decoding:
            stage, done, total = "decode", job.work.chunks - left.chunks, job.work.chunks
        else:
            stage, done, total = "denoise", job.denoising.step, job.denoising.num_steps
        job.notify(Progress(stage=stage, step=done, steps=total, seconds_left=self._model.seconds(left)))


def as_problem(error: Exception) -> WanError:
    """What a job's failure is called. torch has no type of its own for running out of memory on the CPU."""
    if isinstance(error, WanError):
        return error
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if out_of_memory or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return OutOfMemory()
    return RenderFailed("the model failed on this job; the log has the reason under the job's id")
