"""The Modal app: `modal deploy -m serve_graph.modal_app`, or `make deploy`, which looks at the weights first.

`web` is what users call: a front without a GPU. It records jobs and calls `Generator.generate`, whose containers run
the whole Ray Serve graph; `sweep` looks after what fell in between. Options: `on_modal/options.py`.
"""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import modal
from modal.mount import ROOT_DIR

from schemas.health import GpuHealth
from serve_graph.on_modal.options import (
    MAX_INPUTS,
    SWEEP_S,
    TARGET_INPUTS,
    WEB_INPUTS,
    cache_environment,
    check_settings,
    container_environment,
    front_settings,
    profile_of,
    read_options,
)
from serve_graph.settings import ConfigError

UV_VERSION = "0.9.7"
"""Of the installer in the image."""

os.environ.setdefault("MODAL_IMAGE_BUILDER_VERSION", "2025.06")  # else the workspace's, which moves

_ROOT = Path(__file__).parents[1]

try:
    OPTIONS = read_options()
    check_settings(OPTIONS)
except ConfigError as error:
    sys.exit(f"error: {error}")  # one line, and the deployment stops

WEIGHTS = modal.Volume.from_name("wan-weights", create_if_missing=True)
OUTPUTS = modal.Volume.from_name("wan-outputs", create_if_missing=True)


def _image() -> modal.Image:
    """The project's own dependencies at the versions that were tested, its packages, and its configuration."""
    image = modal.Image.debian_slim(python_version="3.11").apt_install("ffmpeg")
    if not modal.is_local():  # there the image is what it is, and the project's files are elsewhere
        return image
    import tomllib

    from serve_graph.engine.checkpoint_folder import SHIPPED

    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    return (
        image.add_local_file(_ROOT / "constraints.txt", "/constraints.txt", copy=True)
        .uv_pip_install(*project["dependencies"], extra_options="--constraint /constraints.txt", uv_version=UV_VERSION)
        .add_local_dir(_ROOT / "configs", f"{ROOT_DIR}/configs")
        .add_local_dir(SHIPPED, f"{ROOT_DIR}/{SHIPPED.relative_to(_ROOT)}")  # not Python, so not in the next
        .add_local_python_source("schemas", "storage", "serve_graph")
    )


app = modal.App(OPTIONS.modal_app, tags={"service": "wan-serve"}, include_source=False)

_Volumes = dict[str | PurePosixPath, modal.Volume | modal.CloudBucketMount]

_SHARED: dict[str, Any] = {
    "image": _image(),
    "env": container_environment(),
    "secrets": [modal.Secret.from_name(name, required_keys=keys) for name, keys in OPTIONS.secrets.items()],
}
_READ_ONLY_WEIGHTS: _Volumes = {OPTIONS.weights_dir: WEIGHTS.with_mount_options(read_only=True)}


@app.cls(
    **{**_SHARED, "env": container_environment() | cache_environment(OPTIONS)},
    gpu=OPTIONS.gpu,
    cpu=4.0,
    memory=32 * 1024,
    volumes={**_READ_ONLY_WEIGHTS, OPTIONS.outputs_dir: OUTPUTS},
    min_containers=OPTIONS.min_containers,
    max_containers=OPTIONS.max_containers,
    buffer_containers=OPTIONS.buffer_containers,
    scaledown_window=OPTIONS.scaledown_window,
    timeout=OPTIONS.timeout,
    startup_timeout=OPTIONS.startup_timeout,
    enable_memory_snapshot=OPTIONS.memory_snapshot,
    experimental_options=OPTIONS.experimental,
)
@modal.concurrent(max_inputs=MAX_INPUTS, target_inputs=TARGET_INPUTS)
class Generator:
    """A container with a GPU: the graph of configs/modal.yaml, in a memory snapshot."""

    @modal.enter(snap=OPTIONS.memory_snapshot)
    def start(self) -> None:
        from serve_graph.on_modal.container import Container

        self.container = Container(OPTIONS)
        self.container.start()

    @modal.enter(snap=False)
    def awaken(self) -> None:
        self.container.awaken()

    @modal.method()
    async def generate(self, work_id: str) -> None:
        """Work until this job or batch has ended; where it can't be ended here, it is called for again."""
        from serve_graph.on_modal.graph_process import GraphGone

        try:
            ended = await self.container.work_on(work_id)
        except GraphGone:  # nothing works here any more: Modal gives what this container has to another
            os._exit(1)
        if not ended:
            await self.generate.spawn.aio(work_id)

    @modal.method()
    async def started(self) -> dict[str, Any]:
        """How this container came up, and which GPU it has."""
        return await self.container.started()

    @modal.asgi_app()
    def graph(self) -> Any:
        """This container's own ingress: for direct calls, and for scraping this container alone."""
        from serve_graph.on_modal.proxy import LoopbackProxy

        return LoopbackProxy(self.container.port)

    @modal.exit()
    def stop(self) -> None:
        self.container.stop()


@app.function(
    **_SHARED,
    cpu=1.0,
    memory=2 * 1024,
    volumes=_READ_ONLY_WEIGHTS,
    min_containers=OPTIONS.web_min_containers,
    scaledown_window=OPTIONS.scaledown_window,
    timeout=OPTIONS.timeout,  # a stream of events lasts as long as its job
)
@modal.concurrent(max_inputs=WEB_INPUTS)
@modal.asgi_app()
def web() -> Any:
    """The service that users call. It wakes no GPU for health, polls, lists and scrapes."""
    from serve_graph.on_modal.calls import ModalPlatform
    from serve_graph.on_modal.front import Front

    card = OPTIONS.card
    gpu = GpuHealth(name=card.name, memory_total_bytes=card.memory_bytes, memory_used_bytes=0)
    return Front(front_settings(OPTIONS), ModalPlatform(OPTIONS, Generator().generate), gpu).app()


@app.function(
    **_SHARED,
    cpu=1.0,
    memory=2 * 1024,
    volumes=_READ_ONLY_WEIGHTS,
    schedule=modal.Period(minutes=1),
    max_containers=1,
    timeout=2 * SWEEP_S,
)
async def sweep() -> None:
    """Look after what nobody works on: calls and owners that were lost, webhooks, retention, garbage."""
    from serve_graph.on_modal.calls import ModalPlatform
    from serve_graph.on_modal.front import Front

    await Front(front_settings(OPTIONS), ModalPlatform(OPTIONS, Generator().generate)).sweep(SWEEP_S)


@app.function(image=_SHARED["image"], env=_SHARED["env"], volumes={OPTIONS.weights_dir: WEIGHTS}, timeout=4 * 3600)
def fetch_weights(revision: str) -> str:
    """Fetch the profile's checkpoint into the Volume. Returns the hub's commit."""
    from serve_graph.on_modal.weights import fetch

    commit = fetch(profile_of(OPTIONS), revision, Path(OPTIONS.weights_dir) / profile_of(OPTIONS).name)
    WEIGHTS.commit()
    return commit


@app.local_entrypoint()
def download_weights(revision: str = os.environ.get("WAN_MODEL__REVISION", "main")) -> None:
    """Fetch the model's weights from the hub into the Volume `wan-weights`; goes on where it was interrupted."""
    print(f"weights at commit {fetch_weights.remote(revision)} are in the Volume wan-weights")


@app.local_entrypoint()
def main(prompt: str, output: str = "clip.mp4", url: str = "") -> None:
    """Make one clip: modal run -m serve_graph.modal_app::main --prompt "…" (WAN_API_KEY holds an API key).

    url: of a deployed service, which does the work then; else the run has a front and a generator of its own.
    """
    from serve_graph.on_modal.commands import wan_serve

    wan_serve("generate", prompt, "--output", output, "--force", url=url or _url())


@app.local_entrypoint()
def batch(prompts: str, output: str = "clips", url: str = "") -> None:
    """Make a clip of every prompt in a file (JSON Lines or text), on as many containers as there may be.

    url: as of `main`.
    """
    from serve_graph.on_modal.commands import wan_serve

    wan_serve("batch", prompts, "--output", output, url=url or _url())


@app.local_entrypoint()
def smoke(url: str = "") -> None:
    """Check a deployed service: health, one clip, its bytes, its expiry."""
    from serve_graph.on_modal.commands import smoke_test

    smoke_test(url or _deployed_url())


@app.local_entrypoint()
def coldstart(count: int = 10) -> None:
    """Measure cold starts of the deployed generator: out/coldstart.json and .md, and in the Volume wan-outputs."""
    from serve_graph.on_modal.coldstart import measure

    deployed = modal.Cls.from_name(OPTIONS.modal_app, "Generator")()
    _keep(measure(deployed, count, OPTIONS))


@app.local_entrypoint()
def record_480p() -> None:
    """Measure one clip of 480p and 5 s on the deployed service: out/record_480p.json and .md, and in wan-outputs."""
    from serve_graph.on_modal.commands import record_480p as record

    _keep(record(_deployed_url()))


def _keep(record: Path) -> None:
    """Put a record into the Volume as well, beside those of the starts, under the moment it was made at."""
    name = f"{record.stem}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}{record.suffix}"
    with OUTPUTS.batch_upload() as upload:
        upload.put_file(record, f"records/{name}")


def _url() -> str:
    """Of the front of this run, or of the deployed app."""
    url = web.get_web_url()
    if url is None:
        sys.exit("error: the front has no URL")
    return url


def _deployed_url() -> str:
    url = modal.Function.from_name(OPTIONS.modal_app, "web").get_web_url()
    if url is None:
        sys.exit("error: the app is not deployed: run `make deploy`")
    return url
