"""The configuration: a Serve config file's `args`, environment variables (`WAN_…`) over it, secrets beside it.

An environment variable names a setting by its path, with two underscores between the parts, in any case:
`WAN_MODEL__PROFILE` is `model.profile`. Whatever is unknown, in the file or the environment, is refused by name.
"""

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from schemas.loras import Lora, LoraName
from schemas.model_profile import ModelProfile
from schemas.official_profiles import PROFILES, WAN_TINY
from schemas.requests import MAX_URL_TTL_S, MIN_URL_TTL_S
from serve_graph.api_keys import ApiKeys, InvalidApiKeys
from serve_graph.scheduling import Policy
from serve_graph.webhooks.policy import WebhookPolicy
from serve_graph.webhooks.signing import InvalidWebhookSecret, WebhookSigner
from storage.s3_options import S3Options

ENV_PREFIX = "WAN_"
URL_VARIABLE = "WAN_URL"
API_KEY_VARIABLE = "WAN_API_KEY"
CLIENT_NAMES = frozenset({URL_VARIABLE, API_KEY_VARIABLE})
"""Read by `wan-serve`'s commands that talk to a service; the service itself lets them be."""

DEPLOY_NAMES = frozenset(
    {
        *("WAN_GPU", "WAN_SNAPSHOT", "WAN_MODAL_APP", "WAN_MIN_CONTAINERS", "WAN_MAX_CONTAINERS"),
        *("WAN_BUFFER_CONTAINERS", "WAN_SCALEDOWN_WINDOW", "WAN_TIMEOUT", "WAN_STARTUP_TIMEOUT"),
        *("WAN_WEB_MIN_CONTAINERS", "WAN_WEIGHTS_DIR", "WAN_OUTPUTS_DIR", "WAN_WITH_WEBHOOKS"),
    }
)
"""Read by `serve_graph.modal_app`, at its deployment and in its containers."""

SECRET_NAMES = frozenset(
    {
        *("WAN_SIGNING_SECRET", "WAN_API_KEYS", "WAN_WEBHOOK_SECRET"),
        *("WAN_S3_ACCESS_KEY", "WAN_S3_SECRET_KEY", "WAN_S3_SESSION_TOKEN"),
    }
)

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]


class ConfigError(Exception):
    """The configuration is wrong; the message is for the person who wrote it."""


def parse_profile(value: Any) -> Any:
    """A profile by its name, or its fields as they are or in JSON, for pydantic to check. Raises ValueError."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return json.loads(value)
    if value not in PROFILES:
        raise ValueError(f"there is no profile {value!r}; there are {', '.join(PROFILES)}")
    return PROFILES[value]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def parse_loras(value: Any) -> Any:
    """As they are, or in JSON, for pydantic to check. Raises ValueError."""
    return json.loads(value) if isinstance(value, str) else value


class LoraSettings(Lora):
    """An adapter of this service's: one more, or where the profile's lies here."""

    path: Path | None = Field(default=None, description="A safetensors file, or a folder with it; else the hub's.")

    def absolute(self) -> "LoraSettings":
        """With an absolute path."""
        return self if self.path is None else self.model_copy(update={"path": self.path.absolute()})


class ModelSettings(_Section):
    """Which checkpoint, and where its parts run."""

    profile: Annotated[ModelProfile, NoDecode, BeforeValidator(parse_profile)] = Field(
        default=WAN_TINY,
        description=f"A profile's name: {', '.join(PROFILES)}; or the fields of your own (JSON in a variable).",
    )
    path: Path | None = Field(default=None, description="A checkpoint in diffusers' layout; else the profile's own.")
    revision: str | None = Field(default=None, description="The hub's revision, where the profile has a hub id.")
    loras: Annotated[dict[LoraName, LoraSettings], NoDecode, BeforeValidator(parse_loras)] = Field(
        default={},
        description="LoRA adapters that requests may name, beside the profile's: by name `path`, or `hub_id`, "
        "`weight_name` and `revision`, and `description` and default `weight` (JSON in a variable).",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="For the generator: `cpu`, `cuda`, or `auto`, a GPU where there is one.",
    )
    dtype: Dtype = Field(default="auto", description="Of the transformer; `auto`: bfloat16 on a GPU.")
    vae_dtype: Dtype = Field(default="float32", description="Of the VAE.")
    load_on_cpu: bool = Field(
        default=False, description="Load there, move to `device` later: for memory snapshots that hold no GPU's memory."
    )
    text_device: str = Field(
        default="cpu", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="For the text encoder: `cpu` or `cuda`."
    )
    text_dtype: Dtype = Field(default="auto", description="Of the text encoder.")

    @property
    def served(self) -> ModelProfile:
        """The profile with the adapters that are configured here, which change one of its own where they differ."""
        added = {
            name: self.profile.loras.get(name, Lora()).model_copy(
                update=lora.model_dump(exclude={"path"}, exclude_defaults=True)
            )
            for name, lora in self.loras.items()
        }
        return self.profile.model_copy(update={"loras": self.profile.loras | added})

    @property
    def lora_paths(self) -> dict[str, Path]:
        """By name, of those that lie on this machine."""
        return {name: lora.path for name, lora in self.loras.items() if lora.path is not None}


class StorageSettings(_Section):
    """Where clips and job records live."""

    kind: Literal["local", "s3"] = Field(default="local", description="`local`: a folder; `s3`: a bucket.")
    folder: Path = Field(
        default=Path("data/store"), description="Of the local store, and of a secret that was made here."
    )
    s3: S3Options | None = Field(default=None, description="The bucket; needed where `kind` is `s3`.")
    create_bucket: bool = Field(default=False, description="Make the bucket when it is missing.")
    clip_retention_days: int | None = Field(
        default=None, ge=1, description="The bucket deletes clips after so many days; `null`: its rules are left alone."
    )
    job_retention_days: float | None = Field(
        default=None,
        gt=0,
        description="Ended jobs and batches, and their clips, are deleted after so many days; `null`: never.",
    )
    patience_s: float = Field(
        default=300.0, ge=0, description="How long a rendered clip, or a job's record, waits for a store that is away."
    )

    @model_validator(mode="after")
    def _bucket_is_named(self) -> "StorageSettings":
        if self.kind == "s3" and self.s3 is None:
            raise ValueError("kind is s3, so storage.s3 needs at least endpoint and bucket")
        return self

    @property
    def job_retention(self) -> timedelta | None:
        """How long an ended job is kept; None: for ever."""
        return None if self.job_retention_days is None else timedelta(days=self.job_retention_days)

    @property
    def clip_retention(self) -> timedelta | None:
        """How long a clip is kept at least, by the bucket and by us; None: for ever."""
        kept = [time for time in (self.bucket_retention, self.job_retention) if time is not None]
        return min(kept) if kept else None

    @property
    def bucket_retention(self) -> timedelta | None:
        """After how long the bucket deletes a clip by a rule of its own; None: never."""
        if self.kind != "s3" or self.clip_retention_days is None:
            return None
        return timedelta(days=self.clip_retention_days)


class QueueSettings(_Section):
    """Admission: who may wait, how many are under way, and whose turn it is."""

    policy: Policy = Field(
        default="srpt", description="Whose turn it is: `srpt`, shortest remaining work first in each class, or `fifo`."
    )
    max_stretch: float = Field(
        default=1.35,
        ge=1,
        description="`srpt`: a job that would take longer than so many times its time under `fifo`, and than 4 times "
        "its own work, goes before others.",
    )
    max_waiting_jobs: int = Field(default=256, ge=1, description="Beyond it, requests get a 429.")
    prefetch: int = Field(
        default=2, ge=0, description="Jobs handed to the generator beyond its slots, so that it never idles."
    )
    drain_timeout_s: float = Field(default=60.0, ge=0, description="How long running jobs may finish at a stop.")
    max_batches: int = Field(
        default=64, ge=1, description="Batches of one API key that have not ended; beyond it, a 429."
    )
    lease_s: float = Field(
        default=20.0,
        gt=0,
        description="A job whose record nobody renewed for so long is taken over from its process.",
    )
    max_run_time_s: float = Field(default=4 * 3600.0, gt=0, description="How long one attempt at a job may run.")
    by_call: bool = Field(
        default=False, description="Jobs run only while a platform's calls are open, as in a Modal container."
    )
    worker_patience_s: float = Field(
        default=600.0, ge=0, description="How long a job waits for a lost generator or preprocessor to be replaced."
    )


class EngineSettings(_Section):
    """The step loop."""

    max_jobs_in_flight: int = Field(default=8, ge=1, description="Slots of one generator.")
    max_batch_tokens: int = Field(default=1_024, ge=1, description="Latent tokens that share one forward.")
    max_clip_pixels: int | None = Field(
        default=None,
        ge=1,
        description="width x height x num_frames that fit into the device's memory; larger requests get a 422. "
        "`null`: what `wan-serve plan` finds for the GPU.",
    )
    num_threads: int = Field(default=1, ge=1, description="CPU threads of one forward.")
    compile: Literal["off", "regional"] = Field(
        default="off", description="`regional`: the transformer's block is compiled, at the first forward of a shape."
    )
    attention_backend: str | None = Field(
        default=None, description="One of diffusers' attention backends, for the process; `null`: torch's own."
    )
    fuse_qkv: bool = Field(default=False, description="A block's query, key and value projections as one.")
    vae_channels_last: bool = Field(
        default=False, description="The VAE's weights with the channels last in memory; on a CPU they are so anyway."
    )
    int8_weights: bool = Field(
        default=False, description="The transformer's weights in int8: fewer bytes, and other clips; needs `[int8]`."
    )
    hang_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="A step or chunk that takes longer counts as hung; the replica is replaced.",
    )


class EncodeSettings(_Section):
    """The MP4 encoder (x264)."""

    crf: int = Field(default=18, ge=0, le=51, description="Constant rate factor; lower is better and larger.")
    preset: Preset = Field(default="veryfast", description="x264's preset.")
    num_threads: int = Field(default=1, ge=1, description="x264's threads; 1 gives the same bytes everywhere.")


class TextSettings(_Section):
    """Prompt preprocessing."""

    cache_bytes: int = Field(default=64 * 2**20, ge=0, description="Embeddings kept, least recently used out first.")
    max_batch_size: int = Field(default=8, ge=1, description="Prompts encoded in one forward.")
    num_threads: int = Field(default=1, ge=1, description="CPU threads of the text encoder.")
    int8_weights: bool = Field(
        default=False, description="The text encoder's weights in int8: fewer bytes, and other clips; needs `[int8]`."
    )


class WebhookSettings(_Section):
    """Whom the service may call, and how long that may take."""

    allow_http: bool = Field(default=False, description="Without TLS anyone on the way reads the event.")
    allow_private_addresses: bool = Field(
        default=False,
        description="Also this machine and private networks; link-local and metadata addresses stay refused.",
    )
    timeout_s: float = Field(default=10.0, gt=0, le=60, description="For a whole attempt to deliver one.")

    def policy(self, can_sign: bool) -> WebhookPolicy:
        """can_sign: whether there is a `webhook_signer`."""
        return WebhookPolicy(self.allow_http, self.allow_private_addresses, can_sign)

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self.timeout_s)


class Settings(BaseSettings):
    """Everything but secrets; safe to hand to a deployment, to log and to show."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, protected_namespaces=()
    )

    data_dir: Path = Field(default=Path("data"), description="Unfinished clips, and what a run needs.")
    public_url: str | None = Field(
        default=None, description="What clients call this service; local clips' URLs begin with it."
    )
    url_ttl_s: int = Field(
        default=3_600, ge=MIN_URL_TTL_S, le=MAX_URL_TTL_S, description="Seconds that a URL works by default."
    )
    auth: Literal["keys", "none"] = Field(
        default="keys", description="`none`: anyone who reaches the service may use it, on any address."
    )
    cluster: bool = Field(
        default=False,
        description="Several machines serve this: needs a bucket, `WAN_SIGNING_SECRET`, and API keys or `auth: none`.",
    )
    protect_monitoring: bool = Field(
        default=False, description="With API keys: `/health` and `/metrics` need one too (not `/health/live|ready`)."
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="Origins whose pages may call the API, such as `https://app.example.com`; `*`: all."
    )
    max_wait_s: float | None = Field(
        default=None,
        gt=0,
        description="`POST /generate` answers 202 with the job once it has waited so long; `null`: it waits on.",
    )
    max_body_bytes: int = Field(default=64 * 1024, ge=1_024, description="Larger request bodies get a 413.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least level that is logged."
    )
    model: ModelSettings = ModelSettings()
    storage: StorageSettings = StorageSettings()
    queue: QueueSettings = QueueSettings()
    engine: EngineSettings = EngineSettings()
    encode: EncodeSettings = EncodeSettings()
    text: TextSettings = TextSettings()
    webhooks: WebhookSettings = WebhookSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file."""
        return env_settings, init_settings

    @model_validator(mode="after")
    def _urls_end_before_clips(self) -> "Settings":
        kept = self.storage.clip_retention
        if kept is not None and timedelta(seconds=self.url_ttl_s) > kept:
            raise ValueError(
                "url_ttl_s is longer than storage.clip_retention_days or job_retention_days, "
                "and a URL never outlives its clip"
            )
        return self

    @model_validator(mode="after")
    def _cluster_shares_its_store(self) -> "Settings":
        if self.cluster and self.storage.kind != "s3":
            raise ValueError("cluster is true, so storage.kind must be s3: a local folder is one machine's")
        return self

    @model_validator(mode="after")
    def _compiled_blocks_take_no_loras(self) -> "Settings":
        if self.engine.compile != "off" and self.profile.loras:
            raise ValueError(
                f"engine.compile is {self.engine.compile}, and compiled blocks take no LoRA adapters: "
                f"set engine.compile: off, or serve none (there are {', '.join(self.profile.loras)})"
            )
        return self

    @property
    def profile(self) -> ModelProfile:
        return self.model.served

    def require_public_url(self) -> str:
        """Raises ConfigError where nothing said what clients call this service."""
        if self.public_url is None:
            raise ConfigError("public_url is not set: what do clients call this service?")
        return self.public_url

    @property
    def default_url_ttl(self) -> timedelta:
        return timedelta(seconds=self.url_ttl_s)

    @property
    def max_dispatched_jobs(self) -> int:
        """Jobs that one generator has at once: its slots and the few that wait behind them."""
        return self.engine.max_jobs_in_flight + self.queue.prefetch

    @property
    def spool_dir(self) -> Path:
        return self.data_dir / "spool"


class Secrets(BaseSettings):
    """From the environment only; each process reads its own and none is ever handed on."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    signing_secret: SecretStr | None = None
    api_keys: SecretStr | None = None
    webhook_secret: SecretStr | None = None
    s3_access_key: SecretStr | None = None
    s3_secret_key: SecretStr | None = None
    s3_session_token: SecretStr | None = None


def accepted_keys(settings: Settings) -> ApiKeys | None:
    """The environment's API keys; None where nobody is asked for one. Raises ConfigError."""
    given = Secrets().api_keys
    try:
        keys = ApiKeys("" if given is None else given.get_secret_value())
    except InvalidApiKeys as error:
        raise ConfigError(str(error)) from error
    if settings.auth == "none" and keys:
        raise ConfigError("auth is none, but WAN_API_KEYS holds keys: take one of the two away")
    return keys or None


def check_cluster(settings: Settings) -> None:
    """What every machine of a cluster needs in its environment, or they would disagree. Raises ConfigError.

    A job's id under an Idempotency-Key is made with the secret, so with two secrets one key would make two jobs.
    """
    if not settings.cluster:
        return
    if Secrets().signing_secret is None:
        raise ConfigError("cluster is true, so WAN_SIGNING_SECRET must be set, to the same on every machine")
    if accepted_keys(settings) is None and settings.auth != "none":
        raise ConfigError("cluster is true, so WAN_API_KEYS must hold keys (`wan-serve key new`), or auth: none be set")


def webhook_signer() -> WebhookSigner | None:
    """Signs with the environment's secrets; None where there are none, and then no webhook is sent. Raises ConfigError.

    Not one made here on the spot, as the signing secret is: receivers need it.
    """
    given = Secrets().webhook_secret
    if given is None or not given.get_secret_value().strip():
        return None
    try:
        return WebhookSigner(given.get_secret_value())
    except InvalidWebhookSecret as error:
        raise ConfigError(str(error)) from error


def read_settings(args: Mapping[str, Any], public_url: str | None = None) -> Settings:
    """Settings from a config file's `args` with the environment over them, relative folders made absolute.

    public_url: used where neither names one. Raises ConfigError, one line per mistake, with the setting's name.
    """
    _refuse_unknown_variables()
    try:
        settings = Settings(**args)
    except ValidationError as error:
        raise config_error(error) from error
    except TypeError as error:
        raise ConfigError("args must be a mapping with string keys") from error
    storage = settings.storage.model_copy(update={"folder": settings.storage.folder.absolute()})
    model = settings.model
    if model.path is not None:
        model = model.model_copy(update={"path": model.path.absolute()})
    if model.loras:
        model = model.model_copy(update={"loras": {name: lora.absolute() for name, lora in model.loras.items()}})
    update = {"data_dir": settings.data_dir.absolute(), "storage": storage, "model": model}
    if settings.public_url is None:
        update["public_url"] = public_url
    return settings.model_copy(update=update)


def config_error(error: ValidationError) -> ConfigError:
    """One line for each mistake, with the setting's name."""
    return ConfigError("; ".join(_in_words(mistake) for mistake in error.errors()))


def _refuse_unknown_variables() -> None:
    """A section's variable has a second part, which the section itself checks; any other has none."""
    for name in os.environ:
        if not name.upper().startswith(ENV_PREFIX) or name.upper() in SECRET_NAMES | CLIENT_NAMES | DEPLOY_NAMES:
            continue
        first, *rest = name.lower().removeprefix(ENV_PREFIX.lower()).split("__")
        field = Settings.model_fields.get(first)
        if field is None or _is_section(field.annotation) != bool(rest):
            raise ConfigError(f"unknown environment variable {name}")


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, _Section)


def _in_words(mistake: Any) -> str:
    name = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        return f"unknown setting {name}"
    return f"{name}: {mistake['msg'].removeprefix('Value error, ')}"
