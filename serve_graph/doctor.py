"""`wan-serve doctor`: looks at what the service needs on this machine, and says what to do. Starts and keeps nothing.

The store is tried with objects of its own, which are gone again afterwards.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from schemas.errors import ModelNotReady
from serve_graph.client import ClientError, WanClient
from serve_graph.findings import Check, Mark
from serve_graph.open_ports import refused_port, worker_ports
from serve_graph.server import EVERY_ADDRESS, LOOPBACK, ServeConfig, check_schema, load_config
from serve_graph.settings import ConfigError, Secrets, accepted_keys
from serve_graph.store_checks import existing, store_checks
from storage.secret import MIN_SECRET_CHARS

MIN_FREE_BYTES: Final = 1 << 30
ROOMY_FREE_BYTES: Final = 10 << 30
_GIB: Final = 2**30


def examine(config: Path, host: str | None = None, port: int | None = None) -> list[Check]:
    """Every check, in the order in which a start would need them. A wrong configuration leaves nothing else to try."""
    try:
        read = load_config(config, host, port)
        check_schema(read.serve)
    except ConfigError as error:
        return [Check("configuration", Mark.FAIL, str(error), f"correct {config} or the environment")]
    checks: tuple[Callable[[ServeConfig], Iterator[Check]], ...] = (
        *(_configuration, _keys, _secret, _model, _gpu, _disk),
        *(store_checks, _ports),
    )
    return [check for examined in checks for check in examined(read)]


def _configuration(config: ServeConfig) -> Iterator[Check]:
    settings = config.settings
    yield Check("configuration", Mark.OK, f"profile {settings.profile.name}, storage {settings.storage.kind}")


def _keys(config: ServeConfig) -> Iterator[Check]:
    keys = accepted_keys(config.settings)
    if keys is not None:
        yield Check("API keys", Mark.OK, "asked for")
    elif config.host in LOOPBACK:
        yield Check("API keys", Mark.OK, "none, and the service answers on loopback only")
    else:
        yield Check("API keys", Mark.WARN, f"none on {config.host} (auth: none)", "see that strangers can't reach it")


def _secret(config: ServeConfig) -> Iterator[Check]:
    given = Secrets().signing_secret
    if given is not None and len(given.get_secret_value()) < MIN_SECRET_CHARS:
        advice = f"give it at least {MIN_SECRET_CHARS} characters"
        yield Check("secret", Mark.FAIL, "WAN_SIGNING_SECRET is too short", advice)
    else:
        kept = f"made once and kept in {config.settings.storage.folder}"
        yield Check("secret", Mark.OK, kept if given is None else "WAN_SIGNING_SECRET")


def _model(config: ServeConfig) -> Iterator[Check]:
    from serve_graph.engine.checkpoint_folder import check_layout, find_lora

    settings, profile = config.settings, config.settings.profile
    if settings.model.path is not None:
        try:
            check_layout(settings.model.path)
            yield Check("model", Mark.OK, f"{profile.name} in {settings.model.path}")
        except ModelNotReady as error:
            yield Check("model", Mark.FAIL, error.detail, "name the folder of a checkpoint in diffusers' layout")
    elif profile.hub_id is None:
        yield Check("model", Mark.OK, f"{profile.name}, part of wan-serve")
    elif settings.model.revision is None:
        advice = "set model.revision, so that the same bytes come tomorrow"
        yield Check("model", Mark.WARN, f"{profile.hub_id}, the hub's newest", advice)
    else:
        yield Check("model", Mark.OK, f"{profile.hub_id} at {settings.model.revision}")
    for name, path in settings.model.lora_paths.items():
        try:
            yield Check("LoRA", Mark.OK, f"{name} in {find_lora(name, profile.loras[name], path)}")
        except ModelNotReady as error:
            yield Check("LoRA", Mark.FAIL, error.detail, f"name its safetensors file in model.loras.{name}.path")


def _gpu(config: ServeConfig) -> Iterator[Check]:
    import torch

    settings = config.settings
    wanted = settings.model.device
    if wanted == "cpu":
        yield Check("GPU", Mark.OK, "none is asked for (model.device: cpu)")
    elif torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(None if wanted == "auto" else wanted)
        name = torch.cuda.get_device_name(None if wanted == "auto" else wanted)
        yield Check("GPU", Mark.OK, f"{name}, {free / _GIB:.0f} of {total / _GIB:.0f} GiB free")
    elif wanted != "auto":
        yield Check(
            "GPU", Mark.FAIL, f"model.device is {wanted}, and torch finds no GPU", _gpu_advice(torch.version.cuda)
        )
    elif settings.profile.hub_id is not None:
        advice = _gpu_advice(torch.version.cuda) + "; on a CPU a clip takes hours"
        yield Check("GPU", Mark.WARN, f"none for {settings.profile.name}", advice)
    else:
        yield Check("GPU", Mark.OK, f"none, and {settings.profile.name} needs none")


def _gpu_advice(cuda: str | None) -> str:
    if cuda is None:
        return "this torch is built for CPUs: install the CUDA build"
    return "look at nvidia-smi: the driver, and whether this user may use the GPU"


def _disk(config: ServeConfig) -> Iterator[Check]:
    settings = config.settings
    folders = {"data_dir": settings.data_dir}
    if settings.storage.kind == "local":
        folders["storage.folder"] = settings.storage.folder
    for name, folder in folders.items():
        free = shutil.disk_usage(existing(folder)).free
        found = f"{free / _GIB:.1f} GiB free for {name} ({folder})"
        advice = "" if free >= ROOMY_FREE_BYTES else "make room, or move it to a larger disk"
        mark = Mark.OK if not advice else Mark.WARN if free >= MIN_FREE_BYTES else Mark.FAIL
        yield Check("disk", mark, found, advice)


def _ports(config: ServeConfig) -> Iterator[Check]:
    host, port = config.host, config.port
    reason = refused_port(host, port)
    if reason is None:
        yield Check("port", Mark.OK, f"{port} of {host} is free")
    elif _is_ours(f"http://{'127.0.0.1' if host in EVERY_ADDRESS else host}:{port}"):
        yield Check("port", Mark.OK, f"{port} of {host}: wan-serve answers there")
    else:
        yield Check(
            "port", Mark.FAIL, f"{port} of {host} {reason}", "stop what listens there, or choose another (--port)"
        )
    public = config.settings.public_url or ""
    if host not in LOOPBACK and public.startswith("http://"):
        advice = "put TLS in front and set public_url to its https:// address"
        yield Check("port", Mark.WARN, f"{host} is not loopback, and {public} has no TLS", advice)
    exposed = worker_ports()
    if exposed:
        found = f"Serve's replicas listen on every interface: {', '.join(map(str, exposed))} (guarded by Ray's token)"
        yield Check(
            "open ports", Mark.WARN, found, "keep strangers out with a firewall where they can reach this machine"
        )
    else:
        yield Check("open ports", Mark.OK, "no replica runs here that this user can see")


def _is_ours(url: str) -> bool:
    try:
        with WanClient(url, timeout_s=5, patience_s=0) as client:
            client.health()
    except ClientError:
        return False
    return True
