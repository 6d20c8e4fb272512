"""A server as a child process: started, waited for, stopped; it never outlives its parent."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 20
POLL_S = 0.02


class ServerFailed(Exception):
    """A server did not start, or ended by itself. The message holds the end of its log."""


@dataclass(frozen=True)
class S3Server:
    """What a client needs to know of a running server."""

    endpoint: str
    access_key: str
    secret_key: str


def answers(url: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=2):
            return True
    except (URLError, OSError):
        return False


class Daemon:
    """One process in the foreground, its output in a log file."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*dies_with_parent(), *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env
            )

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the server says so. Raises ServerFailed when it ended or takes too long."""
        give_up = time.monotonic() + timeout_s
        while not ready():
            if self._process.poll() is not None:
                raise ServerFailed(f"it ended with status {self._process.returncode}: {self._last_lines()}")
            if time.monotonic() > give_up:
                raise ServerFailed(f"not ready after {timeout_s} s: {self._last_lines()}")
            time.sleep(POLL_S)  # a server says that it is ready by answering

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Ask it to end, then make it."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _last_lines(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


def dies_with_parent() -> list[str]:
    """What to put in front of a command so that the process ends with the thread that started it."""
    setpriv = shutil.which("setpriv")
    return [] if setpriv is None else [setpriv, "--pdeathsig", "KILL", "--"]
