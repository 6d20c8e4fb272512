"""Fixtures that several suites share: the tiny Wan, made of diffusers' and transformers' real classes, on the CPU,
and the S3 servers. What uses Ceph carries the marker `ceph` and runs with `-m ceph` only.

torch and diffusers are imported inside the fixtures: a test that asks for none of them runs without either.
The parts are loaded once per session and shared, so a test that hooks into a module takes its hook off again.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hypothesis
import pytest
from random_wan import RANDOM_WAN
from s3_servers.ceph import CephRgw
from s3_servers.ministack import Ministack
from s3_servers.process import S3Server
from xdist.scheduler import LoadScopeScheduling

from schemas.handoff import PreparedPrompt, Standing, TextItem
from schemas.requests import GenerationParameters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from diffusers import WanPipeline
    from prometheus_client import CollectorRegistry

    from serve_graph.engine.checkpoint import GeneratorParts
    from serve_graph.engine.job import EngineEvent
    from serve_graph.engine.loop import Engine
    from serve_graph.engine.text_checkpoint import TextParts
    from serve_graph.metrics import GeneratorMetrics
    from serve_graph.text_encoding import TextEncoder

JOB_TIMEOUT_S = 30.0
"""How long a test waits for a tiny job, which takes a fraction of a second on an idle core."""

TELL = "tell: "
ONE_SERVICE = "tests/integration/one_service/"

hypothesis.settings.load_profile("ci")  # the same cases in each run; others with --hypothesis-profile=default


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, for all its children, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "ceph: needs Ceph's daemons (`make test-ceph`)")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what uses Ceph, by a fixture or as a parameter."""
    if isinstance(item, pytest.Function):
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "ceph" in item.fixturenames or any(isinstance(value, str) and value == "ceph" for value in parameters):
            item.add_marker("ceph")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave Ceph's cases out, unless `-m` speaks of them."""
    if "ceph" in config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("ceph")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("ceph")]


class FilesAndFolders(LoadScopeScheduling):
    """One worker's at a time: a file, and the folder whose tests share a service."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return ONE_SERVICE if file.startswith(ONE_SERVICE) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesAndFolders:
    """xdist's own groups (`loadgroup`) do nothing with pytest 9.2: it keeps a node's id elsewhere."""
    return FilesAndFolders(config, log)


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """Show a line at the end of the run, below a title."""
    return lambda title, line: record_property(f"{TELL}{title}", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    told: dict[str, list[str]] = {}
    for report in [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]:
        for name, line in report.user_properties if report.when == "call" else ():
            if name.startswith(TELL):
                told.setdefault(name.removeprefix(TELL), []).append(str(line))
    for title, lines in told.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with Ministack(tmp_path_factory.mktemp("ministack")) as server:
        yield server.info


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with CephRgw(tmp_path_factory.mktemp("ceph")) as server:
        yield server.info


@pytest.fixture(scope="session")
def one_torch_thread() -> None:
    """Forwards of this size are faster on one thread, and tests share the machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, one_torch_thread: None) -> Path:
    """The random checkpoint in diffusers' layout, built for this session."""
    from random_checkpoint import build_random_checkpoint

    return build_random_checkpoint(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def generator_parts(tiny_folder: Path) -> "GeneratorParts":
    """The tiny transformer, VAE and scheduler template, float32 on the CPU; the VAE in bfloat16, too."""
    import torch

    from serve_graph.engine.checkpoint import load_generator_parts

    presets = RANDOM_WAN.presets.values()
    return load_generator_parts(tiny_folder, torch.device("cpu"), "float32", "float32", presets=presets)


@pytest.fixture(scope="session")
def text_parts(tiny_folder: Path) -> "TextParts":
    """The tiny tokeniser and text encoder, float32 on the CPU."""
    import torch

    from serve_graph.engine.text_checkpoint import load_text_parts

    return load_text_parts(tiny_folder, torch.device("cpu"), "float32")


@pytest.fixture(scope="session")
def stock_pipeline(tiny_folder: Path, generator_parts: "GeneratorParts", text_parts: "TextParts") -> "WanPipeline":
    """diffusers' own pipeline: a VAE that is as diffusers loads it, and else the very same modules.

    Its scheduler is the caller's to set before each call.
    """
    from diffusers import AutoencoderKLWan, WanPipeline

    pipeline = WanPipeline(
        tokenizer=text_parts.tokenizer,
        text_encoder=text_parts.text_encoder,
        vae=AutoencoderKLWan.from_pretrained(tiny_folder / "vae", disable_mmap=True).eval(),
        scheduler=generator_parts.scheduler,
        transformer=generator_parts.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def make_parameters() -> Callable[..., GenerationParameters]:
    """Make parameters of a small clip (64x64, 9 frames, 4 steps, with guidance); keywords change any of them."""

    def make(**changes: Any) -> GenerationParameters:
        small = {
            "prompt": "a red circle moving left",
            "negative_prompt": "dark night",
            "width": 64,
            "height": 64,
            "num_frames": 9,
            "fps": 16,
            "seed": 1,
            "num_inference_steps": 4,
            "guidance_scale": 3.0,
            "flow_shift": 3.0,
            "reproducible": False,
        }
        return GenerationParameters(**{**small, **changes})

    return make


@pytest.fixture(scope="session")
def text_encoder(text_parts: "TextParts") -> "TextEncoder":
    """The service's text encoder on the tiny parts, with a cache that serves the whole session."""
    from serve_graph.metrics import PreprocessorMetrics, new_registry
    from serve_graph.text_encoding import TextEncoder

    metrics = PreprocessorMetrics(new_registry())
    return TextEncoder(text_parts, RANDOM_WAN.max_sequence_length, max_cache_bytes=2**20, metrics=metrics)


@pytest.fixture(scope="session")
def prepare(text_encoder: "TextEncoder") -> Callable[[GenerationParameters], PreparedPrompt]:
    """Encode a request's texts, each alone, as the preprocessor does for a reproducible request."""

    def encode(parameters: GenerationParameters) -> PreparedPrompt:
        texts = [parameters.prompt, *([parameters.negative_prompt] if parameters.does_guidance else [])]
        positive, *rest = text_encoder.encode([TextItem(text, solo=True) for text in texts])
        return PreparedPrompt(positive, rest[0] if rest else None)

    return encode


@pytest.fixture
def registry() -> "CollectorRegistry":
    """An empty registry for this test's metrics."""
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()


@pytest.fixture
def generator_metrics(registry: "CollectorRegistry") -> "GeneratorMetrics":
    """The generator's metrics, to be read from `registry`."""
    from serve_graph.metrics import GeneratorMetrics

    return GeneratorMetrics(registry)


class MakeEngine(Protocol):
    """Start an engine over `generator_parts` unless other parts are given; keywords change its limits."""

    def __call__(
        self,
        parts: "GeneratorParts | None" = None,
        *,
        on_error: Callable[[str, BaseException], None] = ...,
        **limits: Any,
    ) -> "Engine": ...


@pytest.fixture
def make_engine(generator_parts: "GeneratorParts", generator_metrics: "GeneratorMetrics") -> Iterator[MakeEngine]:
    """A factory of engines that are closed when the test ends."""
    from serve_graph.engine.loop import Engine, EngineLimits

    engines: list[Engine] = []

    def make(
        parts: "GeneratorParts | None" = None,
        *,
        on_error: Callable[[str, BaseException], None] = lambda job_id, error: None,
        **limits: Any,
    ) -> Engine:
        roomy: dict[str, Any] = {"max_jobs_in_flight": 8, "max_batch_tokens": 4_096}
        chosen = EngineLimits(text_length=RANDOM_WAN.max_sequence_length, **{**roomy, **limits})
        engines.append(Engine(parts or generator_parts, chosen, generator_metrics, on_error))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make_engine: MakeEngine) -> "Engine":
    """An engine with room for eight small jobs in one forward, closed when the test ends."""
    return make_engine()


class JobProbe:
    """One engine job under observation; it is the job's frame sink and keeps what comes out.

    on_event: called on the device thread after an event was recorded. From there a test can submit or cancel
    other jobs at an exact step, with no race. on_frames: likewise for each chunk, before it is kept.
    """

    def __init__(
        self,
        job_id: str,
        parameters: GenerationParameters,
        prompt: PreparedPrompt,
        on_event: "Callable[[EngineEvent], None]" = lambda event: None,
        on_frames: "Callable[[npt.NDArray[np.uint8]], None]" = lambda frames: None,
        standing: Standing = Standing(),  # noqa: B008  # frozen
    ) -> None:
        from serve_graph.engine.job import EngineJob

        self.events: list[EngineEvent] = []
        self.chunks: list[npt.NDArray[np.uint8]] = []
        self.job: EngineJob = EngineJob(job_id, parameters, prompt, sink=self, notify=self._notify, standing=standing)
        self._on_event = on_event
        self._on_frames = on_frames
        self._ended = threading.Event()

    def write(self, frames: "npt.NDArray[np.uint8]") -> None:
        self._on_frames(frames)
        self.chunks.append(frames)

    def end(self) -> "EngineEvent":
        """Wait for the job's last event. Fails the test when it does not come."""
        assert self._ended.wait(JOB_TIMEOUT_S), f"{self.job.job_id} did not end; events: {self.events}"
        return self.events[-1]

    @property
    def latents(self) -> "torch.Tensor":
        """The final latents. (1, C, T, H, W) float32."""
        from serve_graph.engine.job import Denoised

        return next(event.latents for event in self.events if isinstance(event, Denoised))

    @property
    def frames(self) -> "npt.NDArray[np.uint8]":
        """All frames. (num_frames, H, W, 3) uint8."""
        import numpy as np

        return np.concatenate(self.chunks)

    def _notify(self, event: "EngineEvent") -> None:
        from serve_graph.engine.job import Failed, Finished

        self.events.append(event)
        self._on_event(event)
        if isinstance(event, Finished | Failed):
            self._ended.set()


class MakeProbe(Protocol):
    """Make a probe; `on_event` and `on_frames` as in `JobProbe`, other keywords as in `make_parameters`."""

    def __call__(
        self,
        job_id: str = ...,
        *,
        prompt_embeddings: PreparedPrompt | None = None,
        on_event: "Callable[[EngineEvent], None]" = ...,
        on_frames: "Callable[[npt.NDArray[np.uint8]], None]" = ...,
        standing: Standing = ...,
        **parameters: Any,
    ) -> JobProbe: ...


@pytest.fixture
def make_probe(
    make_parameters: Callable[..., GenerationParameters],
    prepare: Callable[[GenerationParameters], PreparedPrompt],
) -> MakeProbe:
    """A factory of probes; its texts are encoded unless `prompt_embeddings` are given."""

    def make(
        job_id: str = "job",
        *,
        prompt_embeddings: PreparedPrompt | None = None,
        on_event: "Callable[[EngineEvent], None]" = lambda event: None,
        on_frames: "Callable[[npt.NDArray[np.uint8]], None]" = lambda frames: None,
        standing: Standing = Standing(),  # noqa: B008  # frozen
        **changes: Any,
    ) -> JobProbe:
        parameters = make_parameters(**changes)
        prompt = prompt_embeddings or prepare(parameters)
        return JobProbe(job_id, parameters, prompt, on_event, on_frames, standing)

    return make


@pytest.fixture
def forward_batches(generator_parts: "GeneratorParts") -> "Iterator[list[int]]":
    """The batch size of each call of the shared transformer during this test, in order, as the calls end."""
    sizes: list[int] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        sizes.append(kwargs["hidden_states"].shape[0])

    with generator_parts.transformer.register_forward_hook(record, with_kwargs=True):
        yield sizes
