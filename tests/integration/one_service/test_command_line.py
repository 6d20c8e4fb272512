"""`wan-serve`'s commands on the real service."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from schemas.jobs import JobState
from serve_graph.client import WanClient
from serve_graph.doctor import examine
from serve_graph.findings import Mark
from tests.integration.service import RunningService

LONG = ["a long one", "--num-frames", "81", "--steps", "100", "--resolution", "128p"]


def start(service: RunningService, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "serve_graph.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "WAN_URL": service.base},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(service: RunningService, folder: Path, *arguments: str) -> dict[str, object]:
    process = start(service, folder, *arguments, "--json")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    found: dict[str, object] = json.loads(output)
    return found


def test_generate_jobs_status_and_cancel_agree(service: RunningService, tmp_path: Path) -> None:
    made = printed(service, tmp_path, "generate", "a red circle", "-o", "clip.mp4")
    clip = made["clip"]
    assert isinstance(clip, dict)

    listed = printed(service, tmp_path, "jobs", "--state", "succeeded", "--limit", "1")
    assert isinstance(listed["jobs"], list)
    assert [job["job_id"] for job in listed["jobs"]] == [clip["job_id"]]
    assert printed(service, tmp_path, "status", clip["job_id"], "--watch")["state"] == "succeeded"
    assert printed(service, tmp_path, "cancel", clip["job_id"])["state"] == "succeeded"
    assert (tmp_path / "clip.mp4").stat().st_size == clip["size_bytes"]


def test_value_that_is_not_legal_is_wrong_usage_with_the_nearest(service: RunningService, tmp_path: Path) -> None:
    process = start(service, tmp_path, "generate", "x", "--num-frames", "80")
    _, errors = process.communicate(timeout=60)

    assert process.returncode == 2
    assert errors.startswith("wan-serve: num_frames: 80 is not legal")
    assert "nearest: 77, 81" in errors


def test_ctrl_c_cancels_a_running_job(service: RunningService, tmp_path: Path) -> None:
    process = start(service, tmp_path, "generate", *LONG)
    assert process.stderr is not None
    job_id = process.stderr.readline().split()[0]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)

    assert process.returncode == 130
    assert f"interrupted: {job_id} is " in errors
    with WanClient(service.base) as client:
        assert client.wait(job_id).state is JobState.CANCELLED


def test_doctor_knows_a_service_that_runs_here(service: RunningService) -> None:
    checks = {check.name: check for check in examine(service.folder / "serve.yaml", port=service.port)}

    assert (checks["port"].mark, "wan-serve answers" in checks["port"].found) == (Mark.OK, True)
    assert checks["open ports"].mark is Mark.WARN
    assert checks["store"].mark is Mark.OK
