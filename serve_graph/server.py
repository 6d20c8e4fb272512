"""Runs a Serve config file in the foreground: Ray on loopback, the application, one line when ready, a clean stop.

Ray is imported only after the environment that pins it is set.
"""

import asyncio
import json
import logging
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from pydantic import BaseModel, ValidationError

from schemas.errors import ModelNotReady, WanError
from serve_graph.logs import configure_logging, log_event
from serve_graph.niceness import RAY_WORKER_NICENESS
from serve_graph.open_ports import refused_port
from serve_graph.proxy import CALLBACK
from serve_graph.replica_lines import ReplicaLines
from serve_graph.settings import ConfigError, Settings, accepted_keys, check_cluster, read_settings, webhook_signer
from serve_graph.stores import prepare_store
from storage.s3_probe import UnfitStore

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

IMPORT_PATH = "serve_graph.app:build_app"
LOOPBACK = frozenset({"127.0.0.1", "localhost"})
EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})  # noqa: S104  # asks for API keys
START_TIMEOUT_S = 1_800.0
"""A 14B checkpoint from a cold disk takes minutes; a failed start ends sooner, by its own report."""

RAY_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK,
    "RAY_worker_niceness": str(RAY_WORKER_NICENESS),  # added to the starting process's own
    # A node is lost after five checks; until then Serve sends it calls, which wait. By default every 3 s.
    "RAY_health_check_period_ms": "1000",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a dead proxy is replaced after three checks; by default every 10 s
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a hung one would else get the drain's time to end what it can't
    # Our replicas never block their event loop, so they need no second one; two threads fewer fight for the GIL.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""What Ray and Serve read when they start, on one machine as on each of a cluster (the Dockerfile sets it there)."""

_POLL_S = 0.1
_STOP_MARGIN_S = 15.0


class StartFailed(Exception):
    """The application did not come up; the message says why."""


@dataclass(frozen=True)
class ServeConfig:
    """A validated config file: Serve's part as it is, and our application's settings."""

    serve: dict[str, Any]
    app_name: str
    host: str
    port: int
    settings: Settings


def load_config(
    path: Path, host: str | None = None, port: int | None = None, *, args: dict[str, Any] | None = None
) -> ServeConfig:
    """Read a Serve config file. Raises ConfigError, in one line that names what is wrong.

    args: in the place of those that the file has for our application.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"there is no config file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping")
    applications = raw.get("applications")
    listed = applications if isinstance(applications, list) else []
    ours = [app for app in listed if isinstance(app, dict) and app.get("import_path") == IMPORT_PATH]
    if len(ours) != 1:
        raise ConfigError(f"{path} must list one application with import_path: {IMPORT_PATH}")
    raw["http_options"] = http = _http_options(path, raw, host, port)
    settings = read_settings(args or ours[0].get("args") or {}, public_url=_public_url(http))
    check_cluster(settings)
    _check_exposure(http["host"], settings)
    webhook_signer()  # here already, so that a secret that is none is a line and not a deployment that fails
    ours[0]["args"] = settings.model_dump(mode="json")
    return ServeConfig(raw, ours[0].get("name", "default"), http["host"], http["port"], settings)


def _public_url(http: dict[str, Any]) -> str | None:
    """What clients call the service where nothing says it; unknown where it listens on every address."""
    return None if http["host"] in EVERY_ADDRESS else f"http://{http['host']}:{http['port']}"


def _check_exposure(host: str, settings: Settings) -> None:
    """Strangers stay outside. Raises ConfigError."""
    keys = accepted_keys(settings)
    if host not in LOOPBACK and keys is None and settings.auth != "none":
        raise ConfigError(
            f"http_options.host is {host}: without API keys the service answers on loopback only (127.0.0.1); "
            "make a key with `wan-serve key new`, or set auth: none where something else keeps strangers out"
        )
    if settings.public_url is None:
        raise ConfigError(f"http_options.host is {host}: set public_url, which clips' URLs begin with")


def _http_options(path: Path, raw: dict[str, Any], host: str | None, port: int | None) -> dict[str, Any]:
    """The file's `http_options` with the defaults under it and the command line over it."""
    given = raw.get("http_options") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: http_options must be a mapping")
    over = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    http: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, **given, **over}
    if type(http["port"]) is not int or not 0 < http["port"] < 65_536:
        raise ConfigError(f"{path}: http_options.port must be a whole number from 1 to 65535")
    return http


def serve_forever(config: ServeConfig, *, as_json: bool = False) -> None:
    """Start, say when ready in a line on stdout, serve until SIGINT or SIGTERM. Raises ConfigError, StartFailed."""
    _check_port(config.host, config.port)
    _check_model(config.settings)
    configure_logging(level=config.settings.log_level)
    _check_store(config.settings)
    stopping = threading.Event()
    began = time.monotonic()
    with ray_environment(config.settings):
        schema = check_schema(config.serve)
        # twice: Ray puts a handler of its own over ours, which prints a stack
        with _signals(stopping), ray_runtime(), _signals(stopping):
            log_event("starting", profile=config.settings.profile.name, storage=config.settings.storage.kind)
            try:
                deploy(schema, config.app_name, stopping)
                if not stopping.is_set():
                    _tell_ready(config.settings.require_public_url(), time.monotonic() - began, as_json)
                    stopping.wait()
            finally:
                log_event("stopping")
                asyncio.run(stop_app(config))
    log_event("stopped")


def _tell_ready(base: str, start_s: float, as_json: bool) -> None:
    places = {name: f"{base}/{name}" for name in ("docs", "health", "metrics")}
    if as_json:
        print(json.dumps({"ready": base, "start_s": round(start_s, 1), **places}), flush=True)
    else:
        print(f"ready in {start_s:.1f} s: {base}  " + "  ".join(f"{n} {url}" for n, url in places.items()), flush=True)


def check_schema(raw: dict[str, Any]) -> "ServeDeploySchema":
    """The file as Serve reads it. Raises ConfigError, also for a key that Serve would ignore.

    It imports Ray, which reads its environment then: `ray_environment` comes first.
    """
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    parts: list[tuple[str, dict[str, Any], type[BaseModel]]] = [
        ("", raw, ServeDeploySchema),
        ("http_options.", raw["http_options"], HTTPOptionsSchema),
        *(("applications.", application, ServeApplicationSchema) for application in raw["applications"]),
    ]
    for where, part, known in parts:
        for key in part:
            if key not in known.model_fields:
                raise ConfigError(f"unknown key {where}{key} in the config file")
    try:
        return ServeDeploySchema.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{name} in the config file: {first['msg']}") from error


def _check_model(settings: Settings) -> None:
    """A checkpoint folder that isn't one is told at once, not after Serve's retries."""
    from serve_graph.engine.checkpoint_folder import check_layout

    if settings.model.path is not None:
        try:
            check_layout(settings.model.path)
        except ModelNotReady as error:
            raise StartFailed(error.detail) from error


def _check_store(settings: Settings) -> None:
    """A bucket that can't be used is told at once; what an operator should know of it is logged."""
    try:
        _, warnings = prepare_store(settings)
    except (UnfitStore, WanError) as error:
        raise StartFailed(f"the object store can't be used: {error}") from error
    for warning in warnings:
        log_event("store_warning", level=logging.WARNING, message=warning)


def _check_port(host: str, port: int) -> None:
    """Serve's proxy would share a taken port silently (SO_REUSEPORT), so look first."""
    reason = refused_port(host, port)
    if reason is not None:
        raise StartFailed(f"port {port} on {host} {reason}: stop what listens there, or choose another with --port")


@contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks for a clean stop; a second SIGINT is the usual KeyboardInterrupt."""

    def ask(number: int, frame: object) -> None:
        stopping.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ray_environment(settings: Settings) -> Iterator[None]:
    """What pins Ray to loopback, with token authentication and no usage statistics; Ray reads it when imported."""
    token = _token_file(settings.data_dir)
    os.environ.update(
        RAY_ENVIRONMENT,
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # everything on 127.0.0.1, whatever the machine's address
        RAY_AUTH_TOKEN_PATH=str(token),
    )
    try:
        yield
    finally:
        token.unlink(missing_ok=True)


@contextmanager
def ray_runtime(
    *, num_cpus: int | None = None, num_gpus: int | None = None, object_store_memory: int | None = None
) -> Iterator[None]:
    """A Ray of our own, told of these, with memory in bytes; by default it looks itself."""
    import ray
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as worker_output

    ray.init(
        address="local",
        namespace="serve",
        include_dashboard=False,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        object_store_memory=object_store_memory,
        configure_logging=False,
        log_to_driver=True,
    )
    worker_output.remove_handler("ray_print_logs")
    worker_output.add_handler("wan", ReplicaLines())  # Ray's own talk stays in its session's log files
    try:
        yield
    finally:
        ray.shutdown()


def _token_file(data_dir: Path) -> Path:
    """Ray's token, in a file of this start's own, readable by this user only: two services may share a data folder."""
    folder = data_dir / "run"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(prefix="ray-token-", dir=folder)  # mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return Path(name)


def deploy(schema: "ServeDeploySchema", app_name: str, stopping: threading.Event) -> None:
    """Hand the file to Serve and wait until its application runs. Raises StartFailed with its report."""
    from ray import serve
    from ray.serve._private.api import serve_start
    from ray.serve.config import ProxyLocation
    from ray.serve.schema import ApplicationStatus

    client = serve_start(
        http_options=schema.http_options.model_dump(),
        proxy_location=ProxyLocation(schema.proxy_location),
        global_logging_config=schema.logging_config,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process; Serve has just set it to INFO
    client.deploy_apps(schema)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not stopping.wait(_POLL_S):
        status = client.get_serve_status(app_name).app_status.status  # serve.status() costs both sides 50 ms of CPU
        if status == ApplicationStatus.RUNNING:
            return
        failed = status in {ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY}
        if failed or time.monotonic() > deadline:
            raise StartFailed(_report(serve.status().applications.get(app_name)))


def _report(app: Any) -> str:
    """The last line of what went wrong: the exception itself, without the traceback above it."""
    messages = [app.message, *(part.message for part in app.deployments.values())] if app is not None else []
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line or line.startswith(("schemas.errors.", "serve_graph."))]
    return str((told or lines or ["the application did not start in time"])[-1])


async def stop_app(config: ServeConfig) -> None:
    """Let running jobs end within the drain limit, then take everything down.

    On the event loop where this process has used Serve's handles, if it has.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    limit_s = config.settings.queue.drain_timeout_s + _STOP_MARGIN_S
    try:
        async with asyncio.timeout(limit_s):
            await serve.get_app_handle(config.app_name).drain.remote()
    except (RayError, RayServeException, TimeoutError):
        log_event("not_drained", level=logging.WARNING)
    await asyncio.to_thread(serve.delete, config.app_name)  # requests end; the caller's ray.shutdown() ends the rest
