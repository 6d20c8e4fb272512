"""The real service with API keys: no key is anywhere but with its owner."""

import subprocess
from pathlib import Path

import httpx
import psutil

from serve_graph.api_keys import new_key
from tests.integration.service import RunningService

PROMPT = {"prompt": "an otter on a bicycle", "num_inference_steps": 2}


def test_a_key_makes_a_clip_and_shows_nowhere(tmp_path: Path) -> None:
    key, line = new_key("alice")
    key_hash = line.split(":")[1]
    service = RunningService(tmp_path, env={"WAN_API_KEYS": line}).wait_ready()
    try:
        with service.client() as http:
            stranger = http.post("/generate", json=PROMPT)
            wrong = http.post("/generate", json=PROMPT, headers={"Authorization": "Bearer wan_wrong"})
            clip = http.post("/generate", json=PROMPT, headers={"Authorization": f"Bearer {key}"})
            metrics = http.get("/metrics").text
        assert (stranger.status_code, wrong.status_code, clip.status_code) == (401, 401, 200)
        assert stranger.headers["www-authenticate"] == 'Bearer realm="wan-serve"'
        assert httpx.get(clip.json()["output_url"]).content[4:8] == b"ftyp"
        processes = [psutil.Process(service.process.pid), *service.family()]
        arguments = [" ".join(process.cmdline()) for process in processes]
    finally:
        service.stop()
    assert [log["principal"] for log in service.log("request") if log["route"] == "/generate"] == [
        "anonymous",
        "anonymous",
        "alice",
    ]
    found = {"log": service.output(), "metrics": metrics, "arguments": "\n".join(arguments)}
    for place, text in found.items():
        assert key not in text, place
        assert key_hash not in text, place
        assert "wan_wrong" not in text, place
    store = subprocess.run(["grep", "-rlE", f"{key}|{key_hash}", str(tmp_path)], capture_output=True, text=True)
    assert store.stdout == ""
