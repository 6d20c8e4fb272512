"""Which sockets of the service listen, and what each of them is: found out by asking it, without Ray's token."""

import ipaddress
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import grpc
import httpx
import psutil

from tests.integration.service import RunningService

PROBE_TIMEOUT_S = 10


@dataclass(frozen=True)
class Listener:
    """A TCP socket that listens. line: as `ss` or psutil shows it."""

    process: str
    address: str
    port: int
    line: str

    @property
    def is_on_loopback(self) -> bool:
        if self.address == "*":
            return False
        ip = ipaddress.ip_address(self.address)
        return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


@dataclass(frozen=True)
class Kind:
    """A socket that is meant to be there.

    process: how the title of its process begins.
    answers: whether what listens on this port is it, asked without the token.
    wants_token: `answers` has seen it refuse whoever has no token.
    """

    name: str
    process: str
    answers: Callable[[int], bool]
    wants_token: bool


def refuses_grpc(method: str) -> Callable[[int], bool]:
    """A gRPC server that knows this method and asks for the token."""

    def ask(port: int) -> bool:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                channel.unary_unary(method)(b"", timeout=PROBE_TIMEOUT_S)
            except grpc.RpcError as error:
                return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
        return False

    return ask


def http(status: int, beginning: str, path: str = "/") -> Callable[[int], bool]:
    """An HTTP server that answers so."""

    def ask(port: int) -> bool:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=PROBE_TIMEOUT_S, trust_env=False)
        except httpx.HTTPError:
            return False
        return answer.status_code == status and answer.text.startswith(beginning)

    return ask


A_RAY_PROCESS = r"ray::(ServeController|ServeReplica|ProxyActor|IDLE)|.* -m serve_graph\.cli serve"
NO_TOKEN = "Unauthorized: Missing authentication token"

KINDS = (
    Kind(
        "the service's HTTP, at Serve's proxy", "ray::ProxyActor", http(200, '{"status":"ok"}', "/health/live"), False
    ),
    Kind(
        "a Serve replica's gRPC", "ray::ServeReplica:wan:", refuses_grpc("/ray.serve.ASGIService/HandleRequest"), True
    ),
    Kind("a Ray process's gRPC", A_RAY_PROCESS, refuses_grpc("/ray.rpc.CoreWorkerService/GetCoreWorkerStats"), True),
    Kind("Ray's GCS, gRPC", ".*/gcs_server ", refuses_grpc("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"), True),
    Kind("raylet's node manager, gRPC", ".*/raylet ", refuses_grpc("/ray.rpc.NodeManagerService/GetNodeStats"), True),
    Kind("raylet's object manager, gRPC", ".*/raylet ", refuses_grpc("/ray.rpc.ObjectManagerService/Pull"), True),
    Kind("Ray's agent, gRPC", "ray::DashboardAgent", refuses_grpc("/ray.rpc.ReporterService/GetTraceback"), True),
    Kind("Ray's agent, HTTP", "ray::DashboardAgent", http(401, NO_TOKEN), True),
    Kind("Ray's runtime environments, HTTP", "ray::RuntimeEnvAgent", http(401, NO_TOKEN), True),
    Kind("Ray's metrics of the agent, HTTP", "ray::DashboardAgent", http(200, "# HELP "), False),
    Kind("Ray's metrics of the autoscaler, HTTP", ".*/autoscaler/_private/monitor.py ", http(200, "# HELP "), False),
    Kind("Ray's metrics of the dashboard, HTTP", ".*/dashboard/dashboard.py ", http(200, "# HELP "), False),
)


def kind_of(listener: Listener) -> Kind | None:
    """What it is; None where that is not known."""
    candidates = [kind for kind in KINDS if re.match(kind.process, listener.process)]
    return next((kind for kind in candidates if kind.answers(listener.port)), None)


def listeners(service: RunningService) -> list[Listener]:
    """The sockets of the service and of every process below it."""
    processes = [psutil.Process(service.process.pid), *service.family()]
    titles: dict[int, str] = {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            titles[process.pid] = " ".join(process.cmdline())
    return list(_by_ss(titles) if shutil.which("ss") else _by_psutil(processes, titles))


def _by_ss(titles: dict[int, str]) -> Iterator[Listener]:
    shown = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True, timeout=PROBE_TIMEOUT_S)
    for line in shown.stdout.splitlines():
        for pid in {int(pid) for pid in re.findall(r"pid=([0-9]+)", line)} & titles.keys():
            address, _, port = line.split()[3].rpartition(":")
            yield Listener(titles[pid], address.strip("[]").partition("%")[0], int(port), " ".join(line.split()))


def _by_psutil(processes: list[psutil.Process], titles: dict[int, str]) -> Iterator[Listener]:
    for process in processes:
        connections = process.net_connections("tcp") if process.pid in titles else []
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                ip, port = connection.laddr
                yield Listener(titles[process.pid], ip, port, f"{ip}:{port} {process.name()} pid={process.pid}")
