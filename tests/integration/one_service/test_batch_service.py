"""Batches on the real service, with real clips; and what the README says to type."""

import json
import os
import re
import subprocess
from pathlib import Path

import httpx
from polling import until
from service import RunningService

from schemas.batches import Batch, BatchResult

PATIENCE_S = 90.0
README = Path(__file__).parents[3] / "README.md"


def ended(http: httpx.Client, batch_id: str) -> Batch:
    def seen() -> Batch:
        return Batch.model_validate_json(http.get(f"/batches/{batch_id}").content)

    until(lambda: seen().state == "ended", "the batch's end", PATIENCE_S)
    return seen()


def test_a_batch_of_20_ends_with_20_clips_in_order(service: RunningService) -> None:
    requests = [{"prompt": f"a red circle, number {index}", "seed": index} for index in range(20)]
    body = {"requests": requests, "defaults": {"num_frames": 9, "num_inference_steps": 3}}
    with service.client() as http:
        answer = http.post("/batches", json=body)
        assert answer.status_code == 202, answer.text
        batch = Batch.model_validate_json(answer.content)
        assert ended(http, batch.batch_id).counts.succeeded == 20
        lines = http.get(f"/batches/{batch.batch_id}/results").content.splitlines()
        results = [BatchResult.model_validate_json(line) for line in lines]
        clips = [result.clip for result in results if result.clip]
        assert [clip.seed for clip in clips] == list(range(20))
        assert {clip.num_frames for clip in clips} == {9}
        for clip in clips[:3]:
            assert len(httpx.get(clip.output_url, trust_env=False, timeout=30).content) == clip.size_bytes
        metrics = http.get("/metrics").text
        assert 'outcome="completed"' in metrics


def test_a_large_batch_is_taken_whole_and_cancelled(service: RunningService) -> None:
    lines = "\n".join(json.dumps({"prompt": f"a red circle, number {index}"}) for index in range(10_000))
    with service.client() as http:
        answer = http.post("/batches", content=lines, headers={"content-type": "application/x-ndjson"})
        assert answer.status_code == 202, answer.text
        batch_id = answer.json()["batch_id"]
        cancelled = http.post(f"/batches/{batch_id}/cancel")
        assert cancelled.status_code in (200, 202)
        counts = ended(http, batch_id).counts
        assert counts.succeeded + counts.cancelled == 10_000


def test_what_the_readme_says_to_type_for_a_batch_works(service: RunningService, tmp_path: Path) -> None:
    section = README.read_text().split("### Batches", 1)[1].split("\n### ", 1)[0]
    commands = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[0].replace(
        "localhost:8000", f"127.0.0.1:{service.port}"
    )
    environment = {"PATH": os.environ["PATH"], "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    results = [BatchResult.model_validate_json(line) for line in (tmp_path / "results.jsonl").read_bytes().splitlines()]
    assert [result.state for result in results] == ["succeeded", "succeeded"]
    assert results[1].clip is not None
    assert results[1].clip.seed == 7
