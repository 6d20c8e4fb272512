"""Memory and CPU time of processes, read from /proc. Knows what Ray calls its processes, and nothing of Ray."""

from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

_ROLES = (
    ("ServeReplica:wan:Ingress", "ingress"),
    ("ServeReplica:wan:Preprocessor", "preprocessor"),
    ("ServeReplica:wan:Generator", "generator"),
    ("ProxyActor", "proxy"),
    ("ServeController", "controller"),
    ("serve_graph.cli", "cli"),
    ("gcs_server", "gcs"),
    ("raylet/raylet", "raylet"),
)
"""A part of the command line, and the role it stands for; the first that fits counts."""

OTHERS, TOGETHER = "others", "together"


class Memory(BaseModel):
    """Of one process, or of several that share a role. All in bytes.

    peak_rss: the high-water mark, shared pages included; of the largest, since such peaks don't add up.
    pss: when it was read, shared pages divided among those who share them; the sum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_processes: int
    peak_rss_bytes: int
    pss_bytes: int


def role_of(command: str) -> str:
    """What a process of the service does, by its command line."""
    return next((role for part, role in _ROLES if part in command), OTHERS)


def roles(root: int) -> dict[str, list[psutil.Process]]:
    """The process `root` and all below it, by role, in the order of `_ROLES`."""
    parent = psutil.Process(root)
    found: dict[str, list[psutil.Process]] = {role: [] for _, role in _ROLES}
    for process in (parent, *parent.children(recursive=True)):
        try:
            found.setdefault(role_of(" ".join(process.cmdline())), []).append(process)
        except psutil.NoSuchProcess:
            continue
    return {role: processes for role, processes in found.items() if processes}


def memory(pids: Iterable[int]) -> Memory:
    """The memory of these processes, without those that have ended."""
    return _summed([one for pid in pids if (one := _read(pid)) is not None])


def memory_by_role(root: int) -> dict[str, Memory]:
    """Of each role among `root` and all below it, in the order of `_ROLES`, and last of all `TOGETHER`."""
    found = {role: memory(process.pid for process in processes) for role, processes in roles(root).items()}
    return {role: one for role, one in found.items() if one.num_processes} | {TOGETHER: _summed(found.values())}


def cpu_seconds(root: int) -> dict[str, float]:
    """User and system time so far, by role, of `root` and all below it."""
    seconds: dict[str, float] = defaultdict(float)
    for role, processes in roles(root).items():
        for process in processes:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            seconds[role] += times.user + times.system
    return dict(seconds)


def _summed(parts: Collection[Memory]) -> Memory:
    return Memory(
        num_processes=sum(one.num_processes for one in parts),
        peak_rss_bytes=max((one.peak_rss_bytes for one in parts), default=0),
        pss_bytes=sum(one.pss_bytes for one in parts),
    )


def _read(pid: int) -> Memory | None:
    """Of one process; None where it has ended, or has and waits for its parent."""
    try:
        peak, pss = _kilobytes(pid, "status", "VmHWM"), _kilobytes(pid, "smaps_rollup", "Pss")
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return None
    return Memory(num_processes=1, peak_rss_bytes=1024 * peak, pss_bytes=1024 * pss)


def _kilobytes(pid: int, file: str, name: str) -> int:
    """The line `name:  1234 kB` of one of a process's files. Raises OSError or StopIteration where there is none."""
    text = Path(f"/proc/{pid}/{file}").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name + ":"))
