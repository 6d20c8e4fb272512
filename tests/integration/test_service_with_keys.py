"""The real service with API keys: no key is anywhere but with its owner."""

import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import OpenAI

from serve_graph.api_keys import new_key
from tests.integration.service import RunningService

PROMPT: dict[str, Any] = {"prompt": "an otter on a bicycle", "num_inference_steps": 2}

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")  # every call of the SDK says it


def check_the_sdk_s_flow(service: RunningService, key: str, other_key: str) -> None:
    """The official SDK knows its own jobs only."""

    def sdk(api_key: str) -> OpenAI:
        return OpenAI(base_url=f"{service.base}/v1", api_key=api_key)

    with sdk(key) as alice, sdk(other_key) as bob, sdk("sk-none") as stranger:
        video = alice.videos.create_and_poll(prompt=PROMPT["prompt"])
        assert alice.videos.download_content(video.id).content[4:8] == b"ftyp"
        assert video.id in [listed.id for listed in alice.videos.list()]
        assert list(bob.videos.list()) == []
        with pytest.raises(openai.NotFoundError):
            bob.videos.delete(video.id)
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.videos.list()
    assert refused.value.code == "unauthorized"


def test_a_key_makes_a_clip_and_shows_nowhere(tmp_path: Path) -> None:
    key, line = new_key("alice")
    key_hash = line.split(":")[1]
    other, other_line = new_key("bob")
    service = RunningService(tmp_path, env={"WAN_API_KEYS": f"{line} {other_line}"}).wait_ready()
    try:
        with service.client() as http:
            stranger = http.post("/generate", json=PROMPT)
            wrong = http.post("/generate", json=PROMPT, headers={"Authorization": "Bearer wan_wrong"})
            clip = http.post("/generate", json=PROMPT, headers={"Authorization": f"Bearer {key}"})
            metrics = http.get("/metrics").text
        assert (stranger.status_code, wrong.status_code, clip.status_code) == (401, 401, 200)
        assert stranger.headers["www-authenticate"] == 'Bearer realm="wan-serve"'
        assert httpx.get(clip.json()["output_url"], timeout=30).content[4:8] == b"ftyp"
        processes = [psutil.Process(service.process.pid), *service.family()]
        arguments = [" ".join(process.cmdline()) for process in processes]
        check_the_sdk_s_flow(service, key, other)
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
