"""Ceph's S3 gateway: one monitor, one object daemon on a sparse file, one RADOS gateway, all on loopback.

A real production server as Debian packages it, without systemd. Its lifecycle days last five seconds here.
"""

import os
import secrets
import shutil
import subprocess
import uuid
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from s3_servers.process import Daemon, S3Server, ServerFailed, answers
from serve_graph.open_ports import free_port

LIFECYCLE_DAY_S = 5
COMMANDS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")
PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"
_COMMAND_TIMEOUT_S = 60
_START_ATTEMPTS = 3
_STOP_TIMEOUT_S = 3  # the gateway waits for its lifecycle thread, and nothing here is worth keeping

_CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}/run
log file = {folder}/$name.log
pid file = {folder}/run/$name.pid
admin socket = {folder}/run/$name.asok
crash dir = {folder}/crash
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 1
mon data avail warn = 2
mon osd full ratio = 0.99
mon osd nearfull ratio = 0.98
mon osd backfillfull ratio = 0.985
paxos propose interval = 0.02
paxos min wait = 0.01
mon election timeout = 1
mon lease = 2
osd heartbeat grace = 5

[mon]
mon data = {folder}/mon

[osd]
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = 8589934592
bluestore block create = true
bluestore cache autotune = false
osd memory target = 939524096

[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{rgw_port} tcp_nodelay=1
rgw lc debug interval = {lifecycle_day_s}
rgw enable usage log = false
"""


class CephRgw:
    """A gateway with one user. `with CephRgw(folder) as server: server.info.endpoint`.

    Raises ServerFailed when Ceph's commands are missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running = ExitStack()
        self._info: S3Server | None = None

    def __enter__(self) -> Self:
        missing = [command for command in COMMANDS if shutil.which(command) is None]
        if missing:
            raise ServerFailed(
                f"Ceph is not installed (no {', '.join(missing)}): apt-get install --no-install-recommends {PACKAGES}"
            )
        for attempt in range(_START_ATTEMPTS):
            try:
                self._start(self._folder / str(attempt))
                break
            except ServerFailed:  # somebody else may have taken a port
                self._running.close()
                if attempt == _START_ATTEMPTS - 1:
                    raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    @property
    def info(self) -> S3Server:
        assert self._info is not None, "not started"
        return self._info

    def _start(self, folder: Path) -> None:
        cluster = _Cluster(folder)
        cluster.make_monitor()
        self._run(cluster, "mon", ["ceph-mon", "-i", "a"]).wait_until(cluster.has_quorum)
        cluster.make_object_daemon()
        self._run(cluster, "osd", ["ceph-osd", "-i", "0"]).wait_until(cluster.has_object_daemon)
        access_key, secret_key = cluster.make_user()
        gateway = self._run(cluster, "rgw", ["radosgw", "-n", "client.rgw"])
        endpoint = f"http://127.0.0.1:{cluster.rgw_port}"
        gateway.wait_until(lambda: answers(endpoint))
        self._info = S3Server(endpoint, access_key, secret_key)

    def _run(self, cluster: "_Cluster", name: str, command: list[str]) -> Daemon:
        daemon = Daemon([*command, "-f", "-c", str(cluster.config)], cluster.folder / f"{name}.out", os.environ)
        self._running.callback(daemon.stop, _STOP_TIMEOUT_S)
        return daemon


class _Cluster:
    """The files of a new cluster and the commands that make it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fsid = str(uuid.uuid4())
        self.rgw_port = free_port()
        self._ports = {"mon_v2": free_port(), "mon_v1": free_port()}
        for name in ("run", "mon", "osd", "crash"):
            (folder / name).mkdir(parents=True)
        self.config = folder / "ceph.conf"
        self.config.write_text(
            _CONFIG.format(
                fsid=self.fsid,
                folder=folder,
                rgw_port=self.rgw_port,
                lifecycle_day_s=LIFECYCLE_DAY_S,
                **self._ports,
            )
        )

    def make_monitor(self) -> None:
        keyring = str(self.folder / "keyring")
        self._tool("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        caps = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        for name in ("client.admin", "client.rgw"):
            self._tool("ceph-authtool", keyring, "--gen-key", "-n", name, *caps)
        osd_caps = ["--cap", "mon", "allow profile osd", "--cap", "osd", "allow *", "--cap", "mgr", "allow profile osd"]
        self._tool("ceph-authtool", keyring, "--gen-key", "-n", "osd.0", *osd_caps)
        monmap = str(self.folder / "monmap")
        addresses = f"[v2:127.0.0.1:{self._ports['mon_v2']},v1:127.0.0.1:{self._ports['mon_v1']}]"
        self._tool("monmaptool", "--create", "--addv", "a", addresses, "--fsid", self.fsid, monmap)
        self._tool("ceph-mon", "--mkfs", "-i", "a", "-c", str(self.config), "--monmap", monmap, "--keyring", keyring)

    def has_quorum(self) -> bool:
        return self._asks("mon", "stat")

    def make_object_daemon(self) -> None:
        osd_id = str(uuid.uuid4())
        self._tool("ceph", "-c", str(self.config), "osd", "new", osd_id)
        self._tool("ceph-osd", "--mkfs", "-i", "0", "-c", str(self.config), "--osd-uuid", osd_id)

    def has_object_daemon(self) -> bool:
        return "1 up" in self._tool("ceph", "-c", str(self.config), "osd", "stat")

    def make_user(self) -> tuple[str, str]:
        access_key, secret_key = secrets.token_hex(10).upper(), secrets.token_hex(20)
        keys = ["--access-key", access_key, "--secret", secret_key]
        admin = ["radosgw-admin", "-c", str(self.config), "-n", "client.rgw"]
        self._tool(*admin, "user", "create", "--uid", "wan-serve", "--display-name", "wan-serve", *keys)
        return access_key, secret_key

    def _asks(self, *question: str) -> bool:
        command = ["ceph", "-c", str(self.config), "--connect-timeout", "2", *question]
        return subprocess.run(command, capture_output=True, timeout=_COMMAND_TIMEOUT_S, check=False).returncode == 0

    def _tool(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise ServerFailed(f"{command[0]} ended with status {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout
