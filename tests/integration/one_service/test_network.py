"""Who can reach the running service: HTTP on loopback for all, Ray's own ports for holders of the token."""

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.integration.service import RunningService
from tests.integration.sockets import Kind, Listener, kind_of, listeners

TITLE = "listening sockets of the service"

CONNECT = """
import sys
import ray
try:
    ray.init(address=sys.argv[1], namespace="serve", logging_level="CRITICAL")
except ConnectionError:
    sys.exit("refused")
print("connected to", sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))[0][:5])
"""


def token_file(service: RunningService) -> Path:
    (path,) = (service.folder / "data" / "run").glob("ray-token-*")
    return path


def gcs_address(service: RunningService) -> str:
    (gcs,) = [process for process in service.family() if process.name() == "gcs_server"]
    ports = {c.laddr.port for c in gcs.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert len(ports) == 1
    return f"127.0.0.1:{ports.pop()}"


@pytest.mark.parametrize(("knows_token", "told"), [(True, "connected to SERVE"), (False, "refused")])
def test_ray_lets_in_only_who_has_the_token(service: RunningService, knows_token: bool, told: str) -> None:
    token = token_file(service).read_text() if knows_token else "0" * 64
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_NUM_REDIS_GET_RETRIES": "1",  # refused, it would ask twenty times, a second apart
    }
    tried = subprocess.run(
        [sys.executable, "-c", CONNECT, gcs_address(service)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told in tried.stdout + tried.stderr


def test_ray_token_is_readable_by_its_owner_only(service: RunningService) -> None:
    token = token_file(service)
    assert token.stat().st_mode & 0o777 == 0o600
    commands = [" ".join(process.cmdline()) for process in [*service.family(), psutil.Process(service.process.pid)]]
    assert not [command for command in commands if token.read_text() in command]


def test_every_listening_socket_is_explained(service: RunningService, tell: Callable[[str, str], None]) -> None:
    """Each Serve replica's gRPC server listens on all interfaces, whatever it is told: the token guards it."""
    found = [(listener, kind_of(listener)) for listener in listeners(service)]
    for listener, kind in found:
        tell(TITLE, f"{listener.line}\n    {'UNEXPLAINED' if kind is None else _described(kind)}")
    assert [listener for listener, kind in found if kind is None] == []
    assert [at for at, kind in found if kind and not (at.is_on_loopback or kind.wants_token)] == []
    kinds = Counter(kind.name for _, kind in found if kind)
    assert kinds["the service's HTTP, at Serve's proxy"] == 1
    assert kinds["a Serve replica's gRPC"] == 3
    assert kinds["Ray's GCS, gRPC"] == 1


def test_a_socket_that_nobody_knows_is_unexplained(service: RunningService) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        assert kind_of(Listener("python -m http.server", "127.0.0.1", port, "")) is None
    http = next(found for found in listeners(service) if found.port == service.port)
    assert kind_of(replace(http, process="ray::ServeReplica:wan:Ingress")) is None


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("*", False),
        ("0.0.0.0", False),  # noqa: S104  # told apart, not bound
        ("::", False),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
    ],
)
def test_loopback_is_told_from_the_rest(address: str, expected: bool) -> None:
    assert Listener("", address, 1, "").is_on_loopback is expected


def _described(kind: Kind) -> str:
    return f"{kind.name}; {'refuses whoever has no token' if kind.wants_token else 'open, on loopback only'}"
