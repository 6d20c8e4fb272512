"""Who can reach the running service: HTTP on loopback for all, Ray's own ports for holders of the token."""

import os
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
import pytest

from tests.integration.service import RunningService

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


def test_what_listens_beyond_loopback_asks_for_the_token(service: RunningService) -> None:
    """Each Serve replica's gRPC server listens on all interfaces, whatever it is told."""
    beyond = [
        (process.name(), connection.laddr.port)
        for process in [*service.family(), psutil.Process(service.process.pid)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.endswith(("127.0.0.1", "::1"))
    ]
    assert {name.split(":")[2] for name, _ in beyond} == {"ServeReplica"}
    for _, port in beyond:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
