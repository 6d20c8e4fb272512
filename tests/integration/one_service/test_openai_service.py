"""The official `openai` SDK against the real service, with nothing set but `base_url` and `api_key`."""

import hashlib
import io
import re
import subprocess
import sys
from pathlib import Path

import av
import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image

from tests.integration.service import RunningService

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")  # every call of the SDK says it

PROMPT = "a red circle moving left"
LONG = {"num_frames": 81, "num_inference_steps": 100}


def sdk_of(service: RunningService, key: str = "any") -> OpenAI:
    return OpenAI(base_url=f"{service.base}/v1", api_key=key)


def test_the_sdk_s_flow_works_from_create_to_delete(service: RunningService) -> None:
    with sdk_of(service) as sdk:
        video = sdk.videos.create_and_poll(prompt=PROMPT, model="wan-random", seconds="1", size="112x64")
        assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "1", "112x64")
        assert video._request_id
        content = sdk.videos.download_content(video.id)
        thumbnail = sdk.videos.download_content(video.id, variant="thumbnail")
        assert video.id in [listed.id for listed in sdk.videos.list(limit=2)]
        assert sdk.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            sdk.videos.retrieve(video.id)
    assert httpx.get(str(content.response.url), timeout=30).status_code == 404  # the same signed URL, the clip gone
    assert httpx.get(str(thumbnail.response.url), timeout=30).status_code == 404
    with av.open(io.BytesIO(content.content), "r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(64, 112, 3)] * 17
    with Image.open(io.BytesIO(thumbnail.content)) as image:
        assert (image.format, image.size) == ("JPEG", (112, 64))


def test_a_video_and_generate_make_the_same_clip(service: RunningService) -> None:
    fields = {"seed": 5, "num_frames": 9, "fps": 8, "num_inference_steps": 3, "guidance_scale": 1.5, "flow_shift": 2.0}
    with service.client() as http, sdk_of(service) as sdk:
        clip = http.post("/generate", json={"prompt": PROMPT, **fields}).json()
        video = sdk.videos.create_and_poll(prompt=PROMPT, extra_body=fields)
        content = sdk.videos.download_content(video.id).content
    assert hashlib.sha256(content).hexdigest() == clip["sha256"]


def test_progress_rises_and_the_answers_say_when_to_look_again(service: RunningService) -> None:
    seen: list[int] = []
    with sdk_of(service) as sdk:
        video = sdk.videos.create(prompt=PROMPT, extra_body=LONG)
        while video.status in ("queued", "in_progress"):
            answer = sdk.videos.with_raw_response.retrieve(video.id)
            video = answer.parse()
            seen.append(video.progress)
            if video.status in ("queued", "in_progress"):
                assert 250 <= int(answer.headers["openai-poll-after-ms"]) <= 5_000
    assert seen == sorted(seen)
    assert seen[-1] == 100
    assert len(set(seen)) > 2


def test_refusals_are_the_sdk_s_own_errors(service: RunningService) -> None:
    with sdk_of(service) as sdk:
        with pytest.raises(openai.BadRequestError) as seconds:
            sdk.videos.create(prompt=PROMPT, seconds="12")
        with pytest.raises(openai.BadRequestError) as prompt:
            sdk.videos.create(prompt="zq " * 600)
        with pytest.raises(openai.BadRequestError) as image:
            sdk.videos.create(prompt=PROMPT, input_reference=("a.png", b"\x89PNG\r\n\xff"))
        with pytest.raises(openai.APIStatusError) as large:
            sdk.videos.create(prompt=PROMPT, input_reference=("a.png", b"\x89" * 100_000))
        with pytest.raises(openai.NotFoundError) as unknown:
            sdk.videos.retrieve("video_123")
        video = sdk.videos.create(prompt=PROMPT, extra_body=LONG)
        with pytest.raises(openai.NotFoundError, match="not ready yet"):
            sdk.videos.download_content(video.id)
        with pytest.raises(openai.ConflictError):
            sdk.videos.delete(video.id)
        with service.client() as http:
            http.post(f"/jobs/{video.id}/cancel")
        cancelled = sdk.videos.poll(video.id)
    assert (seconds.value.param, seconds.value.code) == ("seconds", "invalid_request")
    assert (prompt.value.param, prompt.value.code) == ("prompt", "prompt_too_long")
    assert image.value.param == "input_reference"
    assert (large.value.status_code, large.value.code) == (413, "body_too_large")
    assert unknown.value.code == "job_not_found"
    assert unknown.value.request_id
    assert (cancelled.status, cancelled.error and cancelled.error.code) == ("failed", "job_cancelled")


def test_the_readme_s_example_runs_as_it_stands(service: RunningService, tmp_path: Path) -> None:
    readme = Path("README.md").read_text()
    (example,) = re.findall(r"### OpenAI client\n.*?```python\n(.*?)```", readme, re.DOTALL)
    assert "http://127.0.0.1:8000/v1" in example
    script = tmp_path / "example.py"
    script.write_text(example.replace("http://127.0.0.1:8000", service.base))
    ran = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "completed" in ran.stdout
    assert (tmp_path / "clip.mp4").read_bytes()[4:8] == b"ftyp"
    assert (tmp_path / "clip.jpg").read_bytes()[:2] == b"\xff\xd8"
