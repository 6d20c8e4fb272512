"""What `modal run` does from the user's machine, over HTTP, as any client would."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import httpx

from schemas.clips import Clip
from schemas.requests import GenerateRequest
from serve_graph.cli import app as cli
from serve_graph.client.wan_client import WanClient
from serve_graph.settings import API_KEY_VARIABLE

OUT: Final = Path("out")

SMOKE_TTL_S: Final = 5
EXPIRY_MARGIN_S: Final = 30

FLOORS_480P_S: Final = {"L4": 234.0, "A100": 91.0, "H100": 28.6}
"""Seconds for the denoising of 81 frames of 480x832, 50 steps with guidance, Wan 2.1 1.3B: 28.3 PFLOP at the card's
dense bf16 peak (NVIDIA's data sheets). No real run can be faster without doing less work."""


def wan_serve(*arguments: str, url: str) -> None:
    """Run one of our own commands against a service; ends the process with its exit code."""
    cli([*arguments, "--url", url])


def smoke_test(url: str, api_key: str | None = None) -> None:
    """Health, one clip, its bytes, its expiry; a line for each. Exits with 1 at the first that fails."""
    with WanClient(url, api_key=api_key or _api_key()) as client:
        health = client.health()
        _told("health", health.status == "ok", f"model {health.model.profile}, storage {health.storage.kind}")
        request = GenerateRequest(prompt="a red circle moving left", url_ttl_s=SMOKE_TTL_S)
        began = time.monotonic()
        clip = client.generate(request)
        signed_at = time.monotonic()
        _told("generate", True, f"{clip.clip_id} in {signed_at - began:.1f} s")
        answer = httpx.get(clip.output_url, follow_redirects=True, timeout=60)
        _told("fetch", answer.status_code == 200 and answer.content[4:8] == b"ftyp", f"{len(answer.content)} bytes")
        while time.monotonic() - signed_at < SMOKE_TTL_S + EXPIRY_MARGIN_S and answer.status_code == 200:
            time.sleep(1)  # the clock is what expires it
            answer = httpx.get(clip.output_url, headers={"Range": "bytes=0-0"}, timeout=60)
            if answer.status_code == 206:
                answer.status_code = 200
        _told("expiry", answer.status_code == 403, f"{answer.status_code} after {time.monotonic() - signed_at:.0f} s")


def record_480p(url: str, folder: Path = OUT, api_key: str | None = None) -> Path:
    """Make one clip of 480p and 5 s, and write down how long it took and how near the card's floor that is.

    Returns the record's path.
    """
    with WanClient(url, api_key=api_key or _api_key()) as client:
        clip = client.generate(GenerateRequest(prompt="a red circle moving left", resolution="480p", duration=5.0))
        gpu = client.health().gpu
    record = record_of(clip, None if gpu is None else gpu.name)
    return write_record(folder, "record_480p", "Generation time at 480p, 5 s", record)


def record_of(clip: Clip, gpu: str | None) -> dict[str, Any]:
    """floor_fraction: the floor over the measured denoising; 1 is the card's peak. None for another card or model."""
    known = [seconds for name, seconds in FLOORS_480P_S.items() if gpu is not None and name in gpu]
    size = (clip.model, clip.width * clip.height, clip.num_frames)
    work = (clip.num_inference_steps, clip.guidance_scale > 1, clip.preset)
    is_floors = size == ("wan2.1-t2v-1.3b", 480 * 832, 81) and work == (50, True, "exact")
    floor_s = known[0] if known and is_floors else None
    return {
        "gpu": gpu,
        "model": clip.model,
        "width": clip.width,
        "height": clip.height,
        "num_frames": clip.num_frames,
        "num_inference_steps": clip.num_inference_steps,
        "total_s": clip.timings.total,
        "denoise_s": clip.timings.denoise,
        "decode_s": clip.timings.decode,
        "floor_s": floor_s,
        "floor_fraction": None if floor_s is None else round(floor_s / clip.timings.denoise, 3),
    }


def write_record(folder: Path, name: str, title: str, record: dict[str, Any]) -> Path:
    """Write a record as JSON and as a Markdown table, and print the table. Returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f"{name}.json"
    written.write_text(json.dumps(record, indent=1) + "\n")
    rows = "\n".join(f"| {key} | {value} |" for key, value in record.items())
    table = f"# {title}\n\n| what | value |\n|---|---|\n{rows}\n"
    (folder / f"{name}.md").write_text(table)
    print(table)
    return written


def _api_key() -> str | None:
    return os.environ.get(API_KEY_VARIABLE)


def _told(what: str, ok: bool, detail: str) -> None:
    print(f"{'ok' if ok else 'FAILED':7} {what}: {detail}", flush=True)
    if not ok:
        sys.exit(1)
