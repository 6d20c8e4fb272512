"""What listens on this machine: whether a port is free, and which ports Serve's replicas have opened to all."""

import errno
import random
import socket

import psutil

_REPLICA = "ServeReplica:"
_LOOPBACK = ("127.", "::1")
_QUIET_PORTS = range(20_000, 32_768)
"""Above Ray's (10002 to 19999), below Linux's ephemeral ones."""


def refused_port(host: str, port: int) -> str | None:
    """Why nobody can listen there now; None where it is free."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return "is taken" if error.errno == errno.EADDRINUSE else f"can't be listened on ({error.strerror})"
    return None


def free_port() -> int:
    """A port on loopback that nobody listens on now.

    From a range that Linux gives to no outgoing connection: one of those may have taken it by the time it is used.
    """
    return next(
        port for port in random.sample(_QUIET_PORTS, len(_QUIET_PORTS)) if refused_port("127.0.0.1", port) is None
    )


def worker_ports() -> list[int]:
    """The ports beyond loopback of every Serve replica that this user may look at."""
    ports = set[int]()
    for process in psutil.process_iter():
        try:
            if any(_REPLICA in part for part in process.cmdline()):
                ports.update(_exposed(process))
        except psutil.Error:  # ended meanwhile, or another user's
            continue
    return sorted(ports)


def _exposed(process: psutil.Process) -> set[int]:
    listening = (c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    return {address.port for address in listening if address and not address.ip.startswith(_LOOPBACK)}
