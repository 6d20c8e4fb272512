"""`wan-serve batch` with both of its ends killed in the middle."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.service import RunningService

PROMPTS = 200
WAIT_S = 300
QUEUE = {"lease_s": 3}


def start_batch(folder: Path, base: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serve_graph.cli", "batch", "prompts.jsonl", "-o", "out", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "WAN_URL": base}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.timeout(600)  # 200 clips, and two starts
def test_batch_whose_client_and_service_are_killed_half_way_makes_every_clip_once(
    tmp_path: Path, tell: Callable[[str, str], None]
) -> None:
    lines = [json.dumps({"prompt": f"circle {n}", "seed": n, "num_frames": 5}) for n in range(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    service = RunningService(tmp_path, queue=QUEUE).wait_ready()
    client = start_batch(tmp_path, service.base)
    while len(list((tmp_path / "out").glob("*.mp4"))) < PROMPTS // 2:
        assert client.poll() is None, client.communicate()
    client.kill()
    client.communicate()
    service.kill()
    before = [line["job_id"] for line in service.log("job") if line["state"] == "succeeded"]
    fetched = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.mp4")}

    client = start_batch(tmp_path, service.base)  # it waits for the service
    service = RunningService(tmp_path, port=service.port, queue=QUEUE).wait_ready()
    printed, errors = client.communicate(timeout=WAIT_S)
    after = [line["job_id"] for line in service.log("job") if line["state"] == "succeeded"]
    service.stop(signal.SIGTERM)

    assert client.returncode == 0, errors
    assert json.loads(printed)["clips"] == PROMPTS
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == [f"{n:05d}.mp4" for n in range(PROMPTS)]
    assert {path: path.stat().st_ino for path in fetched} == fetched  # none of them was fetched again
    assert max(Counter(before + after).values()) == 1
    assert len(list((tmp_path / "store" / "clips").rglob("*.mp4"))) == PROMPTS
    tell("batch of 200, both ends killed", f"{len(fetched)} clips fetched before, {PROMPTS - len(fetched)} after")
