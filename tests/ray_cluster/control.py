"""The parent's side of `ray_cluster.process`: start it, tell it what to do, read what it says."""

import json
import secrets
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_cluster.process import PROJECT, Plan
from serve_graph.open_ports import free_port
from tests.integration.service import ServiceProcess

START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 300.0


class RayCluster(ServiceProcess):
    """Two nodes and the graph on them. env: settings and secrets, as every node of a cluster has them."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        token = folder / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.plan = Plan(token=str(token), port=free_port(), other_port=free_port())
        self.other_base = f"http://127.0.0.1:{self.plan.other_port}"
        base = f"http://127.0.0.1:{self.plan.port}"
        paths = f"{PROJECT}:{PROJECT / 'tests'}"
        super().__init__(
            [sys.executable, "-m", "ray_cluster.process", self.plan.line()],
            base,
            {"PYTHONPATH": paths, "WAN_PUBLIC_URL": base, **env},
        )
        self._answers = 0

    def wait_ready(self) -> float:
        """Returns the seconds that it took."""
        return float(self._answer(START_TIMEOUT_S)["ready"])

    def tell(self, command: str, *numbers: int) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join([command, *map(str, numbers)]) + "\n")
        self.process.stdin.flush()
        return self._answer(ANSWER_TIMEOUT_S)

    def log(self, event: str) -> list[dict[str, Any]]:
        """As any service's. Ray reads its workers' files as they grow, so now and then a line comes in two."""
        found = []
        for line in list(self.stderr):
            with suppress(ValueError):
                found += [said for said in [json.loads(line)] if said.get("event") == event]
        return found

    def end(self) -> None:
        """Ask it to stop; what is left then is killed."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.write("stop\n")
            self.process.stdin.flush()
        try:
            self.stop(0)
        except subprocess.TimeoutExpired:
            self.kill()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        self.wait_for(lambda: len(self._said()) > self._answers, timeout_s)
        self._answers += 1
        return self._said()[self._answers - 1]

    def _said(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.stdout) if line.startswith("{")]
