"""What the deployer's environment says about the Modal app, checked before anything is deployed.

The same variables are set in the containers, so that the module comes out the same there.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.model_profile import ModelProfile
from serve_graph.plan import GPUS
from serve_graph.plan import Gpu as Card
from serve_graph.settings import (
    CLIENT_NAMES,
    ENV_PREFIX,
    SECRET_NAMES,
    ConfigError,
    ModelSettings,
    Settings,
    config_error,
    read_settings,
)

CONFIG: Final = Path(__file__).parents[2] / "configs" / "modal.yaml"

Gpu = Literal["L4", "A100", "A100-80GB", "H100"]
Snapshot = Literal["gpu", "cpu", "off"]

MAX_INPUTS: Final = 4
"""Inputs of one GPU container at once; each is a turn for one job."""

TARGET_INPUTS: Final = 3
"""Beyond it Modal starts another container, where it may; below `MAX_INPUTS`, so that a call need not wait for it."""

SWEEP_S: Final = 50
"""How long the scheduled sweeper looks, of each minute: a lost owner is seen after the time of a lease."""

WEB_INPUTS: Final = 100
"""Requests of one front container at once: they wait for jobs and hold no model."""


class ModalOptions(BaseSettings):
    """Field `gpu` is the variable `WAN_GPU`, and so on. Times in seconds."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    gpu: Gpu = Field(default="L4", description="The GPU of a generator's container.")
    snapshot: Snapshot = Field(
        default="gpu", description="Memory snapshots: with the GPU's memory (alpha), without it, or none."
    )
    modal_app: str = Field(
        default="wan-serve", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="The app's name in Modal."
    )
    min_containers: int = Field(default=0, ge=0, description="Generators that are kept up when idle.")
    max_containers: int = Field(default=1, ge=1, description="Generators that may run at once: the cap on the bill.")
    buffer_containers: int = Field(default=0, ge=0, description="Spare generators while there is work.")
    scaledown_window: int = Field(default=120, ge=2, le=1200, description="How long an idle generator stays up.")
    timeout: int = Field(default=4 * 3600, ge=60, le=24 * 3600, description="Of one call; longer work is called again.")
    startup_timeout: int = Field(default=1_800, ge=10, le=24 * 3600, description="For a generator's start.")
    web_min_containers: int = Field(default=0, ge=0, description="Fronts that are kept up when idle.")
    weights_dir: str = Field(default="/weights", description="Where the Volume `wan-weights` is mounted.")
    outputs_dir: str = Field(default="/outputs", description="Where the Volume `wan-outputs` is mounted.")
    model_profile: str | None = Field(default=None, alias="WAN_MODEL__PROFILE")
    model_loras: str | None = Field(default=None, alias="WAN_MODEL__LORAS")
    with_webhooks: bool = Field(default=False, description="`1`: the Secret `wan-webhooks` is there, too.")
    auth: Literal["keys", "none"] = Field(default="keys", description="`none`: no API keys; anyone may use it.")

    @model_validator(mode="after")
    def _bounds_fit(self) -> "ModalOptions":
        if self.min_containers > self.max_containers:
            raise ValueError("WAN_MIN_CONTAINERS is larger than WAN_MAX_CONTAINERS")
        return self

    @property
    def memory_snapshot(self) -> bool:
        return self.snapshot != "off"

    @property
    def experimental(self) -> dict[str, Any]:
        """Modal's switch for GPU memory in snapshots. Source: its guide on memory snapshots."""
        return {"enable_gpu_snapshot": True} if self.snapshot == "gpu" else {}

    @property
    def secrets(self) -> dict[str, list[str]]:
        """The Modal Secrets that the containers get, and what each has to hold."""
        wanted = {
            "wan-s3": [
                "WAN_STORAGE__S3__ENDPOINT",
                "WAN_STORAGE__S3__BUCKET",
                "WAN_S3_ACCESS_KEY",
                "WAN_S3_SECRET_KEY",
            ],
            "wan-signing": ["WAN_SIGNING_SECRET"],
        }
        if self.auth == "keys":
            wanted["wan-api-keys"] = ["WAN_API_KEYS"]
        if self.with_webhooks:
            wanted["wan-webhooks"] = ["WAN_WEBHOOK_SECRET"]
        return wanted

    @property
    def card(self) -> Card:
        """The GPU as `serve_graph.plan` knows it. Modal's `A100` has 40 GB at least."""
        return GPUS["A100-40GB" if self.gpu == "A100" else self.gpu]

    @property
    def max_turns(self) -> int:
        return MAX_INPUTS * self.max_containers


def read_options() -> ModalOptions:
    """Raises ConfigError, in one line that names the variable."""
    try:
        return ModalOptions()
    except ValidationError as error:
        mistake = error.errors()[0]
        name = "_".join(str(part) for part in mistake["loc"]).upper()
        legal = mistake.get("ctx", {}).get("expected")
        told = f"must be {legal}" if legal else mistake["msg"].removeprefix("Value error, ")
        given = os.environ.get(f"{ENV_PREFIX}{name}")
        raise ConfigError(f"{ENV_PREFIX}{name}={given} {told}" if name else told) from error


def container_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """The variables that the containers get: every setting and option of the deployer's, and no secret."""
    private = SECRET_NAMES | CLIENT_NAMES
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(ENV_PREFIX) and name not in private and not name.startswith("WAN_STORAGE__S3__")
    }


def cache_environment(options: ModalOptions) -> dict[str, str | None]:
    """Where compiled kernels and the hub's files go: into the Volume, for the next container."""
    folder = f"{options.outputs_dir}/caches"
    return {
        "HF_HOME": f"{folder}/hub",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its pool of processes does not survive a snapshot
        "TRITON_CACHE_DIR": f"{folder}/triton",
    }


def profile_of(options: ModalOptions) -> ModelProfile:
    """The model that is served, with its LoRA adapters. Raises ConfigError."""
    model = _file_args()["model"]
    given = {"profile": options.model_profile or model["profile"]}
    given["loras"] = options.model_loras or model.get("loras", {})
    try:
        return ModelSettings.model_validate(given).served
    except ValidationError as error:
        raise config_error(error) from error


def fetched_weights(options: ModalOptions) -> Path | None:
    """Where `download_weights` has put the checkpoint; None where it ships with the package or lies elsewhere."""
    profile = profile_of(options)
    if profile.hub_id is None or "WAN_MODEL__PATH" in os.environ:
        return None
    return Path(options.weights_dir) / profile.name


def _file_args() -> dict[str, Any]:
    args: dict[str, Any] = yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]
    return args


def service_args(options: ModalOptions) -> dict[str, Any]:
    """The application's `args` of configs/modal.yaml, with the weights' place. Raises ConfigError."""
    args, profile = _file_args(), profile_of(options)
    if options.snapshot == "cpu":  # CUDA stays unasked
        args["model"]["load_on_cpu"] = True
    if profile.hub_id is not None:
        args["model"].setdefault("path", f"{options.weights_dir}/{profile.name}")
    kind = os.environ.get("WAN_STORAGE__KIND", args.get("storage", {}).get("kind"))
    if kind != "s3":
        raise ConfigError(
            f"storage.kind is {kind}: containers share no folder, and a Volume has no compare-and-swap; "
            "clips and job records need a bucket (storage.kind: s3)"
        )
    return args


def check_settings(options: ModalOptions) -> Settings:
    """The deployer's settings, with a bucket of no meaning, as only containers know theirs. Raises ConfigError."""
    args = service_args(options)
    args["storage"]["s3"] = {"endpoint": "https://bucket.invalid", "bucket": "bucket"} | args["storage"].get("s3", {})
    return read_settings(args)


def front_settings(options: ModalOptions) -> Settings:
    """The settings of a front: the graph's own, in a process without one. Raises ConfigError."""
    return read_settings(service_args(options))
