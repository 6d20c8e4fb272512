"""What `modal deploy` of the real client makes of the app, on a Modal on loopback; and what stops it."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_on_loopback import COMMIT, LARGE, PROFILE, Hub
from modal.mount import ROOT_DIR
from modal_loopback import Finished, Loopback
from modal_loopback.records import FunctionLayout, VolumeMount

from serve_graph.engine.checkpoint_folder import SHIPPED
from serve_graph.on_modal.weights import check_whole

ROOT = Path(__file__).parents[2]
APP = ("-m", "serve_graph.modal_app")
SECRETS = {
    "wan-s3": {
        "WAN_STORAGE__S3__ENDPOINT": "http://127.0.0.1:9",
        "WAN_STORAGE__S3__BUCKET": "clips",
        "WAN_S3_ACCESS_KEY": "key",
        "WAN_S3_SECRET_KEY": "secret",
    },
    "wan-signing": {"WAN_SIGNING_SECRET": "s" * 64},
    "wan-api-keys": {"WAN_API_KEYS": "alice:0"},
}


def deploy(loopback: Loopback, **env: str) -> Finished:
    return loopback.cli("deploy", *APP, env=env, cwd=ROOT)


@pytest.fixture(scope="module")
def loopback() -> Iterator[Loopback]:
    with Loopback(secrets=SECRETS) as opened:
        yield opened


@pytest.fixture(scope="module")
def layout(loopback: Loopback) -> dict[str, FunctionLayout]:
    done = deploy(loopback)
    assert done.exit_code == 0, done.output
    return loopback.layout("wan-serve")


def test_the_generator_is_a_class_with_a_gpu_in_a_snapshot(layout: dict[str, FunctionLayout]) -> None:
    generator = layout["Generator"]

    assert (generator.gpu, generator.snapshot) == ("L4", True)
    assert generator.experimental_options == {"enable_gpu_snapshot": "True"}
    assert set(generator.methods) == {"generate", "started", "graph"}
    assert (generator.max_inputs, generator.target_inputs) == (4, 3)
    assert (generator.min_containers, generator.max_containers, generator.buffer_containers) == (0, 1, 0)
    assert (generator.timeout_s, generator.startup_timeout_s, generator.scaledown_window_s) == (14_400, 1_800, 120)
    assert generator.web == {"graph": "asgi_app"}
    assert generator.volumes == {
        "/weights": VolumeMount("wan-weights", read_only=True),
        "/outputs": VolumeMount("wan-outputs", read_only=False),
    }
    assert {name: set(keys) for name, keys in generator.secrets.items() if name} == {
        "wan-s3": set(SECRETS["wan-s3"]),
        "wan-signing": {"WAN_SIGNING_SECRET"},
        "wan-api-keys": {"WAN_API_KEYS"},
    }


def test_the_front_is_a_web_function_without_a_gpu(layout: dict[str, FunctionLayout]) -> None:
    web = layout["web"]

    assert (web.gpu, web.snapshot, web.max_inputs, web.web) == (None, False, 100, {"": "asgi_app"})
    assert web.volumes == {"/weights": VolumeMount("wan-weights", read_only=True)}
    assert web.secrets.keys() == layout["Generator"].secrets.keys() - {""}


def test_the_sweeper_has_a_schedule_and_the_weights_a_way_in(layout: dict[str, FunctionLayout]) -> None:
    assert layout["sweep"].schedule == "period: minutes=1"
    assert layout["sweep"].max_containers == 1
    assert layout["fetch_weights"].volumes == {"/weights": VolumeMount("wan-weights", read_only=False)}
    assert (layout["fetch_weights"].gpu, layout["fetch_weights"].secrets) == (None, {})
    assert layout.keys() == {"Generator", "web", "sweep", "fetch_weights"}


def test_the_image_is_made_of_the_project_s_own_pins(layout: dict[str, FunctionLayout]) -> None:
    image = layout["Generator"].image

    commands = "\n".join(image.all_commands)
    assert "FROM python:3.11" in commands
    assert "ffmpeg" in commands
    assert "torch==2.13.0" in commands
    assert "--constraint /constraints.txt" in commands
    assert "pytest" not in commands
    assert image.builder_version == "2025.06"


def test_the_packages_and_the_configuration_are_mounted(layout: dict[str, FunctionLayout]) -> None:
    files = layout["Generator"].files

    shipped = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert shipped
    for path in shipped:  # no Python, so it comes by a mount of its own
        assert files[f"{ROOT_DIR}/{path.relative_to(ROOT)}"] == path.read_bytes()
    assert files[f"{ROOT_DIR}/configs/modal.yaml"] == (ROOT / "configs" / "modal.yaml").read_bytes()
    for path in ("serve_graph/modal_app.py", "serve_graph/engine/loop.py", "storage/s3.py", "schemas/jobs.py"):
        assert f"{ROOT_DIR}/{path}" in files
    assert not [path for path in files if "/tests/" in path or path.endswith(".env")]


@pytest.mark.parametrize(
    ("env", "gpu", "snapshot", "experimental"),
    [
        ({"WAN_GPU": "A100", "WAN_SNAPSHOT": "cpu"}, "A100", True, {}),
        ({"WAN_GPU": "A100-80GB", "WAN_SNAPSHOT": "off"}, "A100-80GB", False, {}),
        ({"WAN_GPU": "H100", "WAN_SNAPSHOT": "gpu"}, "H100", True, {"enable_gpu_snapshot": "True"}),
    ],
)
def test_gpus_and_snapshot_modes(
    loopback: Loopback, env: dict[str, str], gpu: str, snapshot: bool, experimental: dict[str, str]
) -> None:
    done = deploy(loopback, WAN_MODAL_APP="other", WAN_MAX_CONTAINERS="3", WAN_MIN_CONTAINERS="1", **env)

    assert done.exit_code == 0, done.output
    generator = loopback.layout("other")["Generator"]
    assert (generator.gpu, generator.snapshot, generator.experimental_options) == (gpu, snapshot, experimental)
    assert (generator.min_containers, generator.max_containers) == (1, 3)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"WAN_GPU": "L5"}, "error: WAN_GPU=L5 must be 'L4', 'A100', 'A100-80GB' or 'H100'"),
        ({"WAN_SNAPSHOT": "on"}, "error: WAN_SNAPSHOT=on must be 'gpu', 'cpu' or 'off'"),
        ({"WAN_STORAGE__KIND": "local"}, "error: storage.kind is local"),
        ({"WAN_MODEL__PROFILE": "wan9"}, "error: profile: there is no profile 'wan9'"),
    ],
)
def test_a_mistake_in_the_environment_is_one_line_and_stops_the_deployment(
    loopback: Loopback, env: dict[str, str], told: str
) -> None:
    done = deploy(loopback, WAN_MODAL_APP="refused", **env)

    assert done.exit_code != 0
    assert [line for line in done.output.splitlines() if line.startswith("error: ")] == [done.output.strip()]
    assert done.output.startswith(told)
    with pytest.raises(KeyError):
        loopback.app("refused")


@pytest.mark.parametrize("missing", ["WAN_S3_SECRET_KEY", "WAN_STORAGE__S3__BUCKET"])
def test_a_secret_that_lacks_a_key_stops_the_deployment(missing: str) -> None:
    incomplete = {name: value for name, value in SECRETS["wan-s3"].items() if name != missing}
    with Loopback(secrets={**SECRETS, "wan-s3": incomplete}) as loopback:
        done = deploy(loopback)
        preflight = run_preflight(loopback, WAN_MODEL__PROFILE="wan-tiny")

    assert done.exit_code != 0
    assert missing in done.output
    assert (preflight.exit_code, preflight.output.count("\n")) == (1, 1)
    assert preflight.output.startswith("error: the Secret wan-s3 needs ")


def test_weights_come_from_the_hub_into_the_volume_once(tmp_path: Path) -> None:
    with (
        contextlib.closing(Hub()) as hub,
        Loopback(secrets=SECRETS, container_env={"HF_ENDPOINT": hub.url}) as loopback,
    ):
        env = {"WAN_WEIGHTS_DIR": str(tmp_path)}
        done = loopback.cli("run", "-m", "serve_graph.modal_app::download_weights", env=env, cwd=ROOT)
        asked = len(hub.asked)
        again = loopback.cli("run", "-m", "serve_graph.modal_app::download_weights", env=env, cwd=ROOT)

    told = f"weights at commit {COMMIT} are in the Volume wan-weights"
    assert (done.exit_code, again.exit_code) == (0, 0), done.output + again.output
    assert told in done.output
    assert told in again.output
    check_whole(tmp_path / PROFILE.name)
    assert LARGE in "".join(hub.asked[:asked])
    assert f"GET /{PROFILE.hub_id}/resolve/{COMMIT}/{LARGE}" not in hub.asked[asked:]


class TestPreflight:
    """What `make deploy` looks at first."""

    def test_a_model_that_does_not_fit_on_the_gpu_is_one_line(self, loopback: Loopback) -> None:
        done = run_preflight(loopback, WAN_GPU="L4", WAN_MODEL__PROFILE="wan2.1-t2v-14b")

        assert done.exit_code == 1
        assert done.output.strip() == (
            "error: wan2.1-t2v-14b does not fit on WAN_GPU=L4: it needs 35.9 GiB for its smallest clip, "
            "and there are 22.0; it would with an A100-40GB"
        )

    def test_a_text_encoder_that_does_not_fit_beside_the_model_is_one_line(self, loopback: Loopback) -> None:
        done = run_preflight(loopback, WAN_MODEL__TEXT_DEVICE="cuda")

        assert (done.exit_code, done.output.count("\n")) == (1, 1)
        assert "it would with the text encoder on the CPU (model.text_device: cpu), or an A100-40GB" in done.output

    def test_missing_weights_are_one_line(self, loopback: Loopback) -> None:
        done = run_preflight(loopback)

        assert done.exit_code == 1
        assert done.output.strip() == (
            "error: the Volume wan-weights holds no whole wan2.1-t2v-1.3b: "
            "run `modal run -m serve_graph.modal_app::download_weights`"
        )

    def test_partial_weights_are_one_line(self, loopback: Loopback) -> None:
        folder = loopback.volume("wan-weights").folder / "wan2.1-t2v-1.3b"
        folder.mkdir(parents=True)
        (folder / "wan-serve.json").write_text(
            '{"hub_id": "x", "commit": "c", "files": [{"path": "model_index.json", "size_bytes": 5, "sha256": null}]}'
        )
        (folder / "model_index.json").write_text("{}")
        partial = run_preflight(loopback)
        (folder / "model_index.json").write_text("{   }")
        whole = run_preflight(loopback)

        assert (partial.exit_code, partial.output.count("\n")) == (1, 1)
        assert "model_index.json of wan2.1-t2v-1.3b in the Volume wan-weights is not whole" in partial.output
        assert (whole.exit_code, whole.output) == (0, "")


def run_preflight(loopback: Loopback, **env: str) -> Finished:
    done = subprocess.run(
        [sys.executable, "-m", "serve_graph.on_modal.preflight"],
        env=loopback.environment(env),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return Finished(done.returncode, done.stdout)
