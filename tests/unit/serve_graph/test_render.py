"""One attempt at one clip: real engine, real encoder, real local store."""

import asyncio
import gc
import hashlib
import logging
import os
import subprocess
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from prometheus_client import CollectorRegistry

from schemas.errors import (
    InternalError,
    JobCancelled,
    RenderFailed,
    ShuttingDown,
    StoreFull,
    StoreUnavailable,
    WanError,
)
from schemas.handoff import PreparedPrompt, RenderEvent, RenderTask, Standing, Started, TextEmbedding
from schemas.jobs import Progress, RenderedClip
from schemas.presets import Effort, Levers
from schemas.requests import GenerationParameters
from serve_graph import render
from serve_graph.encode import Mp4Writer
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.job import EngineJob, Finished
from serve_graph.engine.loop import Engine
from serve_graph.metrics import GeneratorMetrics
from serve_graph.render import ClipEncoder, Mp4Factory, Renderer
from serve_graph.settings import EncodeSettings
from storage.local import LocalStore
from storage.store import ObjectStat

if TYPE_CHECKING:
    from conftest import MakeProbe

KEY = "clips/clip_0123/attempt.mp4"
PROMPT = "a very secret red circle"
PATIENCE_S = 30.0

MakeTask = Callable[..., RenderTask]
MakeRenderer = Callable[..., Renderer]


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def make_renderer(
    engine: Engine, store: LocalStore, spool: Path, executor: ThreadPoolExecutor, generator_metrics: GeneratorMetrics
) -> MakeRenderer:
    def make(**changes: Any) -> Renderer:
        usual: dict[str, Any] = {
            "store": store,
            "model": "wan-random",
            "spool": spool,
            "encode": EncodeSettings(),
            "executor": executor,
            "metrics": generator_metrics,
            "patience_s": 0.0,
        }
        return Renderer(engine, **{**usual, **changes})

    return make


@pytest.fixture
def renderer(make_renderer: MakeRenderer) -> Renderer:
    return make_renderer()


@pytest.fixture
def make_task(make_parameters: Callable[..., GenerationParameters]) -> MakeTask:
    def make(job_id: str = "job_1", clip_key: str = KEY, **changes: Any) -> RenderTask:
        parameters = make_parameters(**{"prompt": PROMPT, **changes})
        return RenderTask(job_id=job_id, request_id="req_1", clip_key=clip_key, parameters=parameters)

    return make


@pytest.fixture
def task(make_task: MakeTask) -> RenderTask:
    return make_task()


@pytest.fixture
def prompt(task: RenderTask, prepare: Callable[[GenerationParameters], PreparedPrompt]) -> PreparedPrompt:
    return prepare(task.parameters)


@pytest.fixture
def quiet_loop(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails a test that leaves asyncio something to complain of, such as an exception that nobody retrieved."""
    with caplog.at_level(logging.ERROR, logger="asyncio"):
        yield
        gc.collect()
    complaints = [record.getMessage() for record in caplog.records if record.name == "asyncio"]
    assert complaints == []


@contextmanager
def full_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of so many bytes; skips where this process may not mount one."""
    folder.mkdir()
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this machine mounts nothing")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


async def collect(events: AsyncGenerator[RenderEvent, None]) -> list[RenderEvent]:
    async with asyncio.timeout(PATIENCE_S), aclosing(events):
        return [event async for event in events]


async def error_of(events: AsyncGenerator[RenderEvent, None]) -> WanError:
    with pytest.raises(WanError) as failure:
        await collect(events)
    return failure.value


def left_in(spool: Path) -> list[Path]:
    return list(spool.rglob("*"))


# Renderer


async def test_render_streams_started_then_progress_then_the_clip(
    renderer: Renderer, task: RenderTask, prompt: PreparedPrompt, quiet_loop: None
) -> None:
    events = await collect(renderer.render(task, prompt))

    assert isinstance(events[0], Started)
    assert isinstance(events[-1], RenderedClip)
    progress = [event for event in events[1:-1] if isinstance(event, Progress)]
    assert len(progress) == len(events) - 2 >= 1
    order = [("denoise", "decode").index(event.stage) * 1000 + event.step for event in progress]
    assert order == sorted(set(order))


async def test_render_stores_the_clip_that_it_describes(
    renderer: Renderer, store: LocalStore, task: RenderTask, prompt: PreparedPrompt, registry: CollectorRegistry
) -> None:
    clip = (await collect(renderer.render(task, prompt)))[-1]

    assert isinstance(clip, RenderedClip)
    stored = store.get(clip.key).body
    assert clip.key == KEY
    assert clip.size_bytes == len(stored)
    assert clip.sha256 == hashlib.sha256(stored).hexdigest()
    assert min(clip.timings.denoise, clip.timings.decode, clip.timings.encode, clip.timings.upload) > 0
    assert 0 < clip.denoise_device_s <= clip.timings.denoise
    assert 0 < clip.decode_device_s <= clip.timings.decode
    assert registry.get_sample_value("wan_upload_bytes_total") == len(stored)


async def test_render_hands_the_jobs_standing_to_the_engine(
    renderer: Renderer,
    engine: Engine,
    task: RenderTask,
    prompt: PreparedPrompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standing = Standing("high", waited_s=5.0, overdue_in_s=7.0, deadline_left_s=9.0)
    submitted: list[EngineJob] = []

    def submit(job: EngineJob) -> None:
        submitted.append(job)
        Engine.submit(engine, job)

    monkeypatch.setattr(engine, "submit", submit)

    await collect(renderer.render(replace(task, standing=standing), prompt))

    assert [job.standing for job in submitted] == [standing]


async def test_render_stores_the_frames_that_the_engine_made(
    renderer: Renderer,
    store: LocalStore,
    task: RenderTask,
    prompt: PreparedPrompt,
    engine: Engine,
    make_probe: "MakeProbe",
) -> None:
    probe = make_probe(prompt=PROMPT)
    engine.submit(probe.job)
    probe.end()

    await collect(renderer.render(task, prompt))

    with av.open(store.path(KEY)) as container:
        decoded = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
    assert decoded.shape == probe.frames.shape[:3]
    luma = probe.frames @ np.array([0.2126, 0.7152, 0.0722])
    assert np.corrcoef(decoded.ravel(), luma.ravel())[0, 1] > 0.95


async def test_render_writes_model_and_seed_and_never_the_prompt(
    renderer: Renderer, store: LocalStore, make_task: MakeTask, prompt: PreparedPrompt
) -> None:
    await collect(renderer.render(make_task(seed=4711), prompt))

    data = store.get(KEY).body
    assert b'{"model": "wan-random", "seed": 4711}' in data
    for word in PROMPT.split():
        assert word == "a" or word.encode() not in data


async def test_render_gives_the_same_bytes_again_when_asked_to_be_reproducible(
    renderer: Renderer, make_task: MakeTask, prepare: Callable[[GenerationParameters], PreparedPrompt]
) -> None:
    first = make_task("job_1", "clips/clip_1/a.mp4", reproducible=True)
    [*_, alone] = await collect(renderer.render(first, prepare(first.parameters)))
    tasks = [make_task("job_2", "clips/clip_2/a.mp4", reproducible=True)]
    tasks += [make_task(f"job_{i}", f"clips/clip_{i}/a.mp4", seed=i) for i in range(3, 10)]

    streams = await asyncio.gather(*(collect(renderer.render(task, prepare(task.parameters))) for task in tasks))

    clips = [events[-1] for events in streams]
    assert isinstance(alone, RenderedClip)
    assert isinstance(clips[0], RenderedClip)
    assert clips[0].sha256 == alone.sha256
    assert len({clip.sha256 for clip in clips if isinstance(clip, RenderedClip)}) == 8


async def test_render_tells_what_a_clip_took(
    renderer: Renderer, make_task: MakeTask, prepare: Callable[[GenerationParameters], PreparedPrompt]
) -> None:
    levers = Levers(guidance_interval=(0.0, 0.5), batched_guidance=True)
    tasks = [make_task(), make_task("job_2", "clips/clip_2/a.mp4", preset="fast", levers=levers)]

    ends = [(await collect(renderer.render(task, prepare(task.parameters))))[-1] for task in tasks]

    assert [end.effort for end in ends if isinstance(end, RenderedClip)] == [
        Effort(steps=4, guided_steps=4, forwards=8, cached_forwards=0),
        Effort(steps=4, guided_steps=2, forwards=6, cached_forwards=0),
    ]


async def test_render_leaves_the_spool_empty_when_it_succeeds(
    renderer: Renderer, task: RenderTask, prompt: PreparedPrompt, spool: Path
) -> None:
    await collect(renderer.render(task, prompt))

    assert left_in(spool) == []


def test_renderer_makes_a_spool_that_nobody_else_can_read(renderer: Renderer, spool: Path) -> None:
    assert spool.stat().st_mode & 0o777 == 0o700


async def test_render_raises_what_failed_and_leaves_no_trace_when_the_engine_fails(
    renderer: Renderer, store: LocalStore, task: RenderTask, spool: Path, quiet_loop: None
) -> None:
    misfit = PreparedPrompt(TextEmbedding(np.ones((500, 32), np.float32), "float32", solo=True), None)

    assert isinstance(await error_of(renderer.render(task, misfit)), RenderFailed)

    assert left_in(spool) == []
    assert store.list("clips/").stats == ()


@pytest.mark.parametrize("stage", ["started", "denoise", "decode"])
async def test_render_cancels_the_job_when_its_reader_goes_away(
    stage: str,
    renderer: Renderer,
    engine: Engine,
    store: LocalStore,
    make_task: MakeTask,
    prompt: PreparedPrompt,
    spool: Path,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    quiet_loop: None,
) -> None:
    monkeypatch.setattr("serve_graph.render.PROGRESS_INTERVAL_S", 0.0)
    num_steps = 100 if stage != "decode" else 2
    task = make_task(num_inference_steps=num_steps, num_frames=81)
    events = renderer.render(task, prompt)
    async with asyncio.timeout(PATIENCE_S):
        async for event in events:
            if (event.stage if isinstance(event, Progress) else "started") == stage:
                break
        await events.aclose()

    assert left_in(spool) == []
    engine.close()
    wasted = registry.get_sample_value("wan_wasted_steps_total")
    assert wasted is not None
    assert wasted < 100
    assert wasted == 2 or stage != "decode"
    assert registry.get_sample_value("wan_jobs_in_flight") == 0
    assert store.list("clips/").stats == ()


async def test_render_cancels_the_job_when_its_task_is_cancelled(
    renderer: Renderer, make_task: MakeTask, prompt: PreparedPrompt, spool: Path, quiet_loop: None
) -> None:
    started = asyncio.Event()

    async def read() -> None:
        async with aclosing(renderer.render(make_task(num_inference_steps=100, num_frames=81), prompt)) as events:
            async for _ in events:
                started.set()

    reading = asyncio.create_task(read())
    async with asyncio.timeout(PATIENCE_S):
        await started.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    assert left_in(spool) == []


def test_render_leaves_the_engine_alive_when_the_readers_event_loop_is_gone(
    renderer: Renderer,
    engine: Engine,
    generator_parts: GeneratorParts,
    task: RenderTask,
    prompt: PreparedPrompt,
    make_probe: "MakeProbe",
) -> None:
    """The device thread once died of it, and every other job with it."""
    entered, let_go = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        entered.set()
        let_go.wait(PATIENCE_S)

    async def leave_during_a_step() -> None:
        async with aclosing(renderer.render(task, prompt)) as events:
            await anext(events)
            await asyncio.to_thread(entered.wait, PATIENCE_S)

    with generator_parts.transformer.register_forward_pre_hook(hold):
        asyncio.run(leave_during_a_step())
        let_go.set()
        probe = make_probe()
        engine.submit(probe.job)

        assert isinstance(probe.end(), Finished)
    engine.check()


async def test_render_raises_shutting_down_when_the_engine_is_closed(
    renderer: Renderer, engine: Engine, task: RenderTask, prompt: PreparedPrompt, spool: Path
) -> None:
    engine.close()

    assert isinstance(await error_of(renderer.render(task, prompt)), ShuttingDown)
    assert left_in(spool) == []


async def test_render_raises_and_counts_store_unavailable_when_the_stores_folder_is_gone(
    renderer: Renderer,
    task: RenderTask,
    prompt: PreparedPrompt,
    spool: Path,
    tmp_path: Path,
    registry: CollectorRegistry,
) -> None:
    (tmp_path / "store").rename(tmp_path / "elsewhere")

    error = await error_of(renderer.render(task, prompt))

    assert isinstance(error, StoreUnavailable)
    assert str(tmp_path) not in error.detail
    assert registry.get_sample_value("wan_upload_errors_total", {"error": "store-unavailable"}) == 1
    assert registry.get_sample_value("wan_upload_bytes_total") == 0
    assert left_in(spool) == []


async def test_render_raises_and_counts_store_full_when_the_stores_disk_is_full(
    make_renderer: MakeRenderer,
    make_task: MakeTask,
    prompt: PreparedPrompt,
    spool: Path,
    tmp_path: Path,
    registry: CollectorRegistry,
) -> None:
    with full_disk(tmp_path / "small", 2 * 4096) as folder:
        store = LocalStore(folder)
        renderer = make_renderer(store=store)

        error = await error_of(renderer.render(make_task(num_frames=17), prompt))

        assert isinstance(error, StoreFull)
        assert store.list("").stats == ()
        assert list((folder / ".tmp").iterdir()) == []
    assert registry.get_sample_value("wan_upload_errors_total", {"error": "store-full"}) == 1
    assert left_in(spool) == []


async def test_render_raises_store_full_when_the_spools_disk_is_full(
    make_renderer: MakeRenderer,
    store: LocalStore,
    make_task: MakeTask,
    prompt: PreparedPrompt,
    tmp_path: Path,
    quiet_loop: None,
) -> None:
    with full_disk(tmp_path / "small", 2 * 4096) as folder:
        renderer = make_renderer(spool=folder)

        error = await error_of(renderer.render(make_task(num_frames=81, num_inference_steps=1), prompt))

        assert isinstance(error, StoreFull)
        assert left_in(folder) == []
    assert store.list("clips/").stats == ()


async def test_render_raises_an_internal_error_and_counts_it_when_the_key_is_taken(
    renderer: Renderer, store: LocalStore, task: RenderTask, prompt: PreparedPrompt, registry: CollectorRegistry
) -> None:
    """Each attempt has a key of its own, so this is a fault of ours; the store's own error once came through."""
    store.put(KEY, b"not a clip")

    assert isinstance(await error_of(renderer.render(task, prompt)), InternalError)

    assert store.get(KEY).body == b"not a clip"
    assert registry.get_sample_value("wan_upload_errors_total", {"error": "internal-error"}) == 1


async def test_render_fails_the_job_when_the_encoder_cannot_start(
    make_renderer: MakeRenderer, make_task: MakeTask, prompt: PreparedPrompt, spool: Path, quiet_loop: None
) -> None:
    """The encoder once died in silence, and the device thread waited for it for ever."""
    renderer = make_renderer(encode=EncodeSettings.model_construct(crf=18, preset="no-such-preset", num_threads=1))

    error = await error_of(renderer.render(make_task(num_frames=33), prompt))

    assert isinstance(error, RenderFailed)
    assert left_in(spool) == []


# ClipEncoder


@pytest.fixture
def make_encoder(tmp_path: Path, executor: ThreadPoolExecutor, task: RenderTask) -> Callable[..., ClipEncoder]:
    def make(path: Path = tmp_path / "clip.mp4", **changes: Any) -> ClipEncoder:
        factory = Mp4Factory(path, task, "wan-random", EncodeSettings(**changes))
        return ClipEncoder(factory, executor)

    return make


def chunks(num_frames: int) -> Iterator[npt.NDArray[np.uint8]]:
    noise = np.random.default_rng(1).integers(0, 256, (num_frames, 64, 64, 3), np.uint8)
    return (noise[i : i + 4] for i in range(0, num_frames, 4))


async def write_all(encoder: ClipEncoder, num_frames: int) -> None:
    """Write from another thread, as the engine does."""

    def write() -> None:
        for frames in chunks(num_frames):
            encoder.write(frames)

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.to_thread(write)


async def test_clip_encoder_completes_with_the_files_size_and_digest(
    make_encoder: Callable[..., ClipEncoder], tmp_path: Path
) -> None:
    encoder = make_encoder()
    await write_all(encoder, 40)

    encoded = await encoder.complete()

    data = (tmp_path / "clip.mp4").read_bytes()
    assert (encoded.size_bytes, encoded.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert encoded.encode_s > 0
    with av.open(tmp_path / "clip.mp4") as container:
        assert container.streams.video[0].frames == 40


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
async def test_clip_encoder_raises_store_full_when_the_disk_is_full(
    make_encoder: Callable[..., ClipEncoder], tmp_path: Path, quiet_loop: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "ENCODE_BATCH_BYTES", 1)  # every frame at once, and each waits for the one before,
    monkeypatch.setattr(render, "MAX_QUEUED_BYTES", 1)  # so that `write` sees the failure
    path = tmp_path / "full.mp4"
    path.symlink_to("/dev/full")
    encoder = make_encoder(path)

    with pytest.raises(StoreFull):
        await write_all(encoder, 400)
    with pytest.raises(StoreFull):
        await encoder.complete()

    await encoder.stop()


async def test_clip_encoder_refuses_frames_that_do_not_fit(
    make_encoder: Callable[..., ClipEncoder], quiet_loop: None
) -> None:
    encoder = make_encoder()
    encoder.write(np.zeros((1, 8, 8, 3), np.uint8))

    with pytest.raises(RenderFailed):
        await encoder.complete()

    await encoder.stop()


async def test_clip_encoder_refuses_to_complete_without_frames(make_encoder: Callable[..., ClipEncoder]) -> None:
    with pytest.raises(RenderFailed):
        await make_encoder().complete()


async def test_clip_encoder_lets_a_blocked_writer_go_when_it_is_stopped(
    make_encoder: Callable[..., ClipEncoder], executor: ThreadPoolExecutor, quiet_loop: None
) -> None:
    """All worker threads are busy, so nothing is encoded and the queue fills up."""
    let_go = threading.Event()
    for _ in range(4):
        executor.submit(let_go.wait, PATIENCE_S)
    encoder = make_encoder()
    writing = asyncio.create_task(write_all(encoder, 400))
    try:
        async with asyncio.timeout(PATIENCE_S):
            await encoder.stop()
            with pytest.raises(JobCancelled):
                await writing
    finally:
        let_go.set()


async def test_clip_encoder_opens_no_file_when_it_was_stopped_before_the_first_frames(
    make_encoder: Callable[..., ClipEncoder], tmp_path: Path
) -> None:
    """The folder is being removed by then; a file that appears in it would stay behind."""
    encoder = make_encoder()
    await encoder.stop()

    with pytest.raises(JobCancelled):
        encoder.write(next(chunks(4)))

    await encoder.stop()
    assert not (tmp_path / "clip.mp4").exists()


async def test_clip_encoder_stops_twice_without_harm(make_encoder: Callable[..., ClipEncoder]) -> None:
    encoder = make_encoder()
    await write_all(encoder, 4)

    await encoder.stop()
    await encoder.stop()


class HeldStore(LocalStore):
    """A store whose `put` waits until it is let go."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.putting = threading.Event()
        self.let_go = threading.Event()

    def put(self, key: str, body: bytes | Path, **conditions: Any) -> ObjectStat:
        self.putting.set()
        assert self.let_go.wait(PATIENCE_S)
        return super().put(key, body, **conditions)


async def test_render_cancelled_in_the_middle_of_its_upload_leaves_no_clip(
    make_renderer: MakeRenderer, task: RenderTask, prompt: PreparedPrompt, spool: Path, tmp_path: Path, quiet_loop: None
) -> None:
    """The upload can't be stopped; it once ended in the store, a clip that nobody knew of."""
    store = HeldStore(tmp_path / "held")
    rendering = asyncio.create_task(collect(make_renderer(store=store).render(task, prompt)))
    assert await asyncio.to_thread(store.putting.wait, PATIENCE_S)

    rendering.cancel()
    store.let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await rendering

    assert store.list("").stats == ()
    assert left_in(spool) == []


async def test_render_makes_other_clips_while_the_upload_of_one_is_held_up(
    make_renderer: MakeRenderer,
    make_task: MakeTask,
    prompt: PreparedPrompt,
    store: LocalStore,
    tmp_path: Path,
    quiet_loop: None,
) -> None:
    """Neither the device's thread nor the event loop waits for a store."""
    held = HeldStore(tmp_path / "held")
    rendering = asyncio.create_task(collect(make_renderer(store=held).render(make_task(), prompt)))
    assert await asyncio.to_thread(held.putting.wait, PATIENCE_S)

    [*_, clip] = await collect(make_renderer().render(make_task("job_2", "clips/clip_2/a.mp4"), prompt))

    assert isinstance(clip, RenderedClip)
    assert store.get(clip.key).body
    assert held.list("").stats == ()
    held.let_go.set()
    assert isinstance((await rendering)[-1], RenderedClip)


async def test_render_makes_other_clips_while_the_encoder_of_one_is_held_up(
    make_renderer: MakeRenderer,
    make_task: MakeTask,
    prompt: PreparedPrompt,
    monkeypatch: pytest.MonkeyPatch,
    quiet_loop: None,
) -> None:
    """As long as the held clip's frames have room, which these 9 have; then the device's thread waits."""
    encoding, let_go = threading.Event(), threading.Event()
    write = Mp4Writer.write

    def held_write(writer: Mp4Writer, frames: npt.NDArray[np.uint8]) -> None:
        if not encoding.is_set():
            encoding.set()
            assert let_go.wait(PATIENCE_S)
        write(writer, frames)

    monkeypatch.setattr(Mp4Writer, "write", held_write)
    renderer = make_renderer()
    rendering = asyncio.create_task(collect(renderer.render(make_task(), prompt)))
    assert await asyncio.to_thread(encoding.wait, PATIENCE_S)

    [*_, clip] = await collect(renderer.render(make_task("job_2", "clips/clip_2/a.mp4"), prompt))

    assert isinstance(clip, RenderedClip)
    assert not rendering.done()
    let_go.set()
    assert isinstance((await rendering)[-1], RenderedClip)


class AbsentStore(LocalStore):
    """A store that is away for the first uploads. writes_first: they arrive, and their answers are lost."""

    def __init__(self, folder: Path, *, writes_first: bool) -> None:
        super().__init__(folder)
        self.absences = 2
        self.refused = threading.Event()
        self._writes_first = writes_first

    def put(self, key: str, body: bytes | Path, **conditions: Any) -> ObjectStat:
        if self.absences == 0:
            return super().put(key, body, **conditions)
        self.absences -= 1
        self.refused.set()
        if self._writes_first:
            super().put(key, body, **conditions)
        raise StoreUnavailable("the object store does not answer")


@pytest.mark.parametrize("writes_first", [False, True])
async def test_render_keeps_the_clip_until_the_store_is_back(
    make_renderer: MakeRenderer,
    task: RenderTask,
    prompt: PreparedPrompt,
    spool: Path,
    tmp_path: Path,
    registry: CollectorRegistry,
    writes_first: bool,
) -> None:
    store = AbsentStore(tmp_path / "absent", writes_first=writes_first)

    events = await collect(make_renderer(store=store, patience_s=PATIENCE_S).render(task, prompt))

    clip = events[-1]
    assert isinstance(clip, RenderedClip)
    assert hashlib.sha256(store.get(task.clip_key).body).hexdigest() == clip.sha256
    assert registry.get_sample_value("wan_upload_errors_total", {"error": "store-unavailable"}) == 0
    assert left_in(spool) == []


async def test_render_cancelled_while_the_store_is_away_leaves_nothing_in_the_spool(
    make_renderer: MakeRenderer, task: RenderTask, prompt: PreparedPrompt, spool: Path, tmp_path: Path, quiet_loop: None
) -> None:
    store = AbsentStore(tmp_path / "absent", writes_first=False)
    store.absences = 99
    rendering = asyncio.create_task(collect(make_renderer(store=store, patience_s=PATIENCE_S).render(task, prompt)))
    assert await asyncio.to_thread(store.refused.wait, PATIENCE_S)

    rendering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rendering

    assert store.list("").stats == ()
    assert left_in(spool) == []
