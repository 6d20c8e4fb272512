"""What is deployed: apps, functions, images, mounts, Secrets and Volumes, as tests assert on them."""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from modal_proto import api_pb2

if TYPE_CHECKING:
    from modal_loopback.calls import Input
    from modal_loopback.container import Container

Files = dict[str, bytes]
"""By the path in the container."""


@dataclass(frozen=True)
class Image:
    """One image; `commands` are the Dockerfile lines of its own layer, `files` what it copied from here."""

    image_id: str
    commands: tuple[str, ...]
    bases: tuple["Image", ...]
    files: Files
    builder_version: str

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """The commands of each layer, the base's first."""
        return [layer for base in self.bases for layer in base.layers] + [self.commands]

    @property
    def all_commands(self) -> list[str]:
        return [command for layer in self.layers for command in layer]

    @property
    def all_files(self) -> Files:
        return {path: data for base in self.bases for path, data in base.all_files.items()} | self.files


@dataclass
class Secret:
    """A Secret; `required_keys` are those that any app asked for by now."""

    secret_id: str
    name: str
    env: dict[str, str]
    required_keys: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Volume:
    """A Volume; its files lie in `folder`."""

    volume_id: str
    name: str
    folder: Path


@dataclass(frozen=True)
class VolumeMount:
    volume: str
    read_only: bool


@dataclass(frozen=True)
class FunctionLayout:
    """A function or a class as it was defined. Unset limits are None; `gpu` is as "L4" or "A100:2"."""

    name: str
    is_class: bool
    gpu: str | None
    cpu: float | None
    memory_mb: int | None
    snapshot: bool
    experimental_options: dict[str, str]
    max_inputs: int
    target_inputs: int
    min_containers: int | None
    max_containers: int | None
    buffer_containers: int | None
    scaledown_window_s: int | None
    timeout_s: int
    startup_timeout_s: int
    retries: int
    volumes: dict[str, VolumeMount]
    """By mount path."""
    secrets: dict[str, frozenset[str]]
    """The required keys by the Secret's name, which is empty for one made of a dict."""
    schedule: str | None
    """As "period: hours=1" or "cron: 0 6 * * *"."""
    methods: tuple[str, ...]
    web: dict[str, str]
    """The type of endpoint (as "asgi_app") by the method's name, which is empty for a function."""
    image: Image
    files: Files
    """The files that are mounted when a container starts, and those in the image."""


@dataclass(eq=False, repr=False)
class Function:
    """A function, or a class, of an app, with its calls and containers. `proto` and `layout` are those published."""

    function_id: str
    app: "App"
    name: str
    proto: api_pb2.Function
    layout: FunctionLayout | None = None
    draft: tuple[api_pb2.Function, FunctionLayout] | None = None
    web_urls: dict[str, str] = field(default_factory=dict)
    """By the method's name, which is empty for a function."""
    queue: "deque[Input]" = field(default_factory=deque)
    containers: "list[Container]" = field(default_factory=list)
    """Those that live, in the order of their start."""
    lost_starts: int = 0
    """Containers in a row that ended before they were ready."""

    def publish(self) -> None:
        """Make the last definition the one that containers start with."""
        if self.draft is not None:
            self.proto, self.layout = self.draft


@dataclass(eq=False, repr=False)
class App:
    """An app; `state` is initializing, ephemeral (`modal run`, `modal serve`), deployed or stopped."""

    app_id: str
    name: str
    state: str = "initializing"
    tags: dict[str, str] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)
    """By name; a class is one."""
    classes: dict[str, str] = field(default_factory=dict)
    """The id of each class by its name."""
    publications: int = 0
    log: list[tuple[str, str]] = field(default_factory=list)
    """What the containers wrote, with their ids."""
    log_ended: bool = False

    @property
    def layout(self) -> dict[str, FunctionLayout]:
        """The published functions and classes by name."""
        return {name: function.layout for name, function in self.functions.items() if function.layout}


def web_type(config: api_pb2.WebhookConfig) -> str:
    """As "asgi_app"; empty for no endpoint."""
    return api_pb2.WebhookType.Name(config.type).removeprefix("WEBHOOK_TYPE_").lower() if config.type else ""


def schedule_text(schedule: api_pb2.Schedule) -> str | None:
    """As "period: hours=1" or "cron: 0 6 * * *"."""
    match schedule.WhichOneof("schedule_oneof"):
        case "cron":
            return f"cron: {schedule.cron.cron_string}"
        case "period":
            return "period: " + ", ".join(f"{part.name}={value:g}" for part, value in schedule.period.ListFields())
        case _:
            return None


def function_layout(
    proto: api_pb2.Function,
    schedule: api_pb2.Schedule,
    image: Image,
    mounted: Files,
    volumes: dict[str, Volume],
    secrets: dict[str, Secret],
) -> FunctionLayout:
    """Read a definition. volumes and secrets: by id."""
    gpu, scaling = proto.resources.gpu_config, proto.autoscaler_settings
    endpoints = {"": proto.webhook_config, **{name: m.webhook_config for name, m in proto.method_definitions.items()}}

    def limit(name: str) -> int | None:
        return getattr(scaling, name) if scaling.HasField(name) else None

    return FunctionLayout(
        name=proto.function_name.removesuffix(".*"),
        is_class=proto.is_class,
        gpu=(gpu.gpu_type if gpu.count == 1 else f"{gpu.gpu_type}:{gpu.count}") if gpu.gpu_type else None,
        cpu=proto.resources.milli_cpu / 1000 or None,
        memory_mb=proto.resources.memory_mb or None,
        snapshot=proto.checkpointing_enabled,
        experimental_options=dict(proto.experimental_options),
        max_inputs=proto.max_concurrent_inputs or 1,
        target_inputs=proto.target_concurrent_inputs or proto.max_concurrent_inputs or 1,
        min_containers=limit("min_containers"),
        max_containers=limit("max_containers"),
        buffer_containers=limit("buffer_containers"),
        scaledown_window_s=limit("scaledown_window"),
        timeout_s=proto.timeout_secs,
        startup_timeout_s=proto.startup_timeout_secs,
        retries=proto.retry_policy.retries,
        volumes={v.mount_path: VolumeMount(volumes[v.volume_id].name, v.read_only) for v in proto.volume_mounts},
        secrets={secrets[key].name: frozenset(secrets[key].required_keys) for key in proto.secret_ids},
        schedule=schedule_text(schedule),
        methods=tuple(sorted(proto.method_definitions)),
        web={name: web_type(config) for name, config in endpoints.items() if config.type},
        image=image,
        files=image.all_files | mounted,
    )
