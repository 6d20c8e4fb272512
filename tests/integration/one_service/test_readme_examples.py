"""The README's examples of jobs, the command line and the client, run as they stand against a real service."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import serve_graph
from tests.integration.service import RunningService

PROJECT = Path(serve_graph.__file__).parents[1]
DEFAULT_URL = "http://127.0.0.1:8000"


def example(section: str, language: str) -> str:
    """The first block of a language below a heading."""
    text = (PROJECT / "README.md").read_text()
    found = re.search(rf"^##+ {section}$.*?^```{language}$(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def run(service: RunningService, folder: Path, *command: str) -> str:
    """Run it in `folder`, with `wan-serve` on the path and the service in the environment."""
    (folder / "bin").mkdir()
    wan_serve = folder / "bin" / "wan-serve"
    wan_serve.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m serve_graph.cli "$@"\n')
    wan_serve.chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(PROJECT), "WAN_URL": service.base}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_line_examples_run(service: RunningService, tmp_path: Path) -> None:
    printed = run(service, tmp_path, "bash", "-euo", "pipefail", "-c", example("Command line", "sh"))

    assert "clip.mp4  (64x64, 17 frames, seed 7" in printed
    assert sorted(path.name for path in (tmp_path / "clips").glob("*.mp4")) == ["00000.mp4", "00001.mp4"]
    assert json.loads((tmp_path / "summary.json").read_text())["clips"] == 2


def test_python_client_example_runs(service: RunningService, tmp_path: Path) -> None:
    code = example("Python client", "python")
    assert DEFAULT_URL in code
    printed = run(service, tmp_path, sys.executable, "-c", code.replace(DEFAULT_URL, service.base))

    assert (tmp_path / "circle.mp4").stat().st_size > 0
    assert "80 is not legal" in printed


def test_jobs_example_runs(service: RunningService, tmp_path: Path) -> None:
    script = example("Jobs", "sh")
    assert "url=localhost:8000\n" in script
    printed = run(service, tmp_path, "bash", "-euo", "pipefail", "-c", script.replace("localhost:8000", service.base))

    assert "event: job" in printed
    assert '"state":"succeeded"' in printed
    assert '"next_cursor":' in printed
    with service.client() as http:
        gone = re.search(r"job_[0-9a-f]{32}", printed)
        assert gone is not None
        assert http.get(f"/jobs/{gone[0]}").status_code == 410
