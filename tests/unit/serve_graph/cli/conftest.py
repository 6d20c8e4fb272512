"""`wan-serve` as a process, against the scripted service."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import COMMAND, PROJECT, Run, Start
from scripted.service import ScriptedService, scripted_service


@pytest.fixture
def scripted() -> Iterator[ScriptedService]:
    with scripted_service() as service:
        yield service


@pytest.fixture
def environment(scripted: ScriptedService) -> dict[str, str]:
    return {**os.environ, "WAN_URL": scripted.base, "PYTHONPATH": str(PROJECT)}


@pytest.fixture
def wan_serve(environment: dict[str, str], tmp_path: Path) -> Run:
    """Run a command to its end in an empty folder."""

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments], env={**environment, **env}, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Start a command; it is killed when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [*COMMAND, *arguments],
                env=environment,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()
