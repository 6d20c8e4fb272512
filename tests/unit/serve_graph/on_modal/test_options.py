"""What a deployer's environment may say, and what is told of a mistake."""

import json

import pytest

from schemas.loras import Lora
from serve_graph.on_modal.options import (
    ModalOptions,
    check_settings,
    container_environment,
    profile_of,
    read_options,
    service_args,
)
from serve_graph.settings import DEPLOY_NAMES, ENV_PREFIX, ConfigError, Settings


def refusal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        check_settings(read_options())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    options = read_options()

    assert (options.gpu, options.snapshot, options.max_containers, options.max_turns) == ("L4", "gpu", 1, 4)
    assert options.experimental == {"enable_gpu_snapshot": True}
    assert profile_of(options).name == "wan2.1-t2v-1.3b"
    assert service_args(options)["model"]["path"] == "/weights/wan2.1-t2v-1.3b"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("WAN_GPU", "L5", "WAN_GPU=L5 must be 'L4', 'A100', 'A100-80GB' or 'H100'"),
        ("WAN_SNAPSHOT", "on", "WAN_SNAPSHOT=on must be 'gpu', 'cpu' or 'off'"),
        ("WAN_TIMEOUT", "5", "WAN_TIMEOUT=5"),
        ("WAN_MIN_CONTAINERS", "2", "WAN_MIN_CONTAINERS is larger than WAN_MAX_CONTAINERS"),
        ("WAN_MODEL__PROFILE", "wan9", "profile: there is no profile 'wan9'"),
        ("WAN_STORAGE__KIND", "local", "storage.kind is local: containers share no folder"),
        ("WAN_GPUS", "L4", "unknown environment variable WAN_GPUS"),
        ("WAN_QUEUE__LEASE_S", "soon", "queue.lease_s"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str) -> None:
    assert refusal(monkeypatch, **{name: value}).startswith(told)


@pytest.mark.parametrize(("snapshot", "taken", "experimental"), [("cpu", True, {}), ("off", False, {})])
def test_snapshots(monkeypatch: pytest.MonkeyPatch, snapshot: str, taken: bool, experimental: dict[str, bool]) -> None:
    monkeypatch.setenv("WAN_SNAPSHOT", snapshot)
    options = read_options()

    assert (options.memory_snapshot, options.experimental) == (taken, experimental)


@pytest.mark.parametrize("gpu", ["L4", "A100", "A100-80GB", "H100"])
def test_every_gpu_is_one_that_the_plan_knows(monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    monkeypatch.setenv("WAN_GPU", gpu)

    assert read_options().card.name == {"A100": "A100-40GB"}.get(gpu, gpu)


def test_a_snapshot_without_a_gpu_loads_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "load_on_cpu" not in service_args(read_options())["model"]
    monkeypatch.setenv("WAN_SNAPSHOT", "cpu")

    assert service_args(read_options())["model"].items() >= {"load_on_cpu": True, "text_device": "cpu"}.items()


def test_secrets_are_those_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(read_options().secrets) == ["wan-s3", "wan-signing", "wan-api-keys"]
    monkeypatch.setenv("WAN_AUTH", "none")
    monkeypatch.setenv("WAN_WITH_WEBHOOKS", "1")
    assert list(read_options().secrets) == ["wan-s3", "wan-signing", "wan-webhooks"]


def test_containers_get_settings_and_options_and_no_secret() -> None:
    environment = {
        "WAN_GPU": "L4",
        "WAN_QUEUE__LEASE_S": "9",
        "WAN_S3_SECRET_KEY": "secret",
        "WAN_API_KEYS": "secret",
        "WAN_API_KEY": "secret",
        "WAN_STORAGE__S3__BUCKET": "the Secret's",
        "HOME": "somewhere",
    }
    assert container_environment(environment) == {"WAN_GPU": "L4", "WAN_QUEUE__LEASE_S": "9"}


def test_loras_of_the_deployer_are_the_served_profile_s(monkeypatch: pytest.MonkeyPatch) -> None:
    ink = {"hub_id": "them/adapters", "weight_name": "ink.safetensors"}
    monkeypatch.setenv("WAN_MODEL__LORAS", json.dumps({"ink": ink}))
    monkeypatch.setenv("WAN_STORAGE__KIND", "s3")

    assert profile_of(read_options()).loras == {"ink": Lora.model_validate(ink)}
    assert check_settings(read_options()).profile.loras == profile_of(read_options()).loras


def test_every_option_is_a_variable_that_the_service_lets_be() -> None:
    """The containers have both kinds in one environment."""
    names = {f"{ENV_PREFIX}{name.upper()}" for name in ModalOptions.model_fields if not name.startswith("model_")}

    assert names - {"WAN_AUTH"} == DEPLOY_NAMES
    assert "auth" in Settings.model_fields
