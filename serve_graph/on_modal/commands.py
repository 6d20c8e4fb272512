"""What `modal run` does from the user's machine, over HTTP, as any client would."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import httpx

from schemas.clips import Clip
from schemas.health import GpuHealth
from schemas.official_profiles import PROFILES
from schemas.requests import GenerateRequest
from serve_graph.cli import app as cli
from serve_graph.client.wan_client import WanClient
from serve_graph.plan import Clip as Work
from serve_graph.plan import Placement, card_named, plan_of
from serve_graph.settings import API_KEY_VARIABLE

OUT: Final = Path("out")

SMOKE_TTL_S: Final = 5
EXPIRY_MARGIN_S: Final = 30


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
    record = record_of(clip, gpu)
    return write_record(folder, "record_480p", "Generation time at 480p, 5 s", record)


def record_of(clip: Clip, gpu: GpuHealth | None) -> dict[str, Any]:
    """floor_s: of the denoising, by `serve_graph.plan`. floor_fraction: it over what was measured.

    None for a card or a model that the plan does not know, and where forwards ended after their first block.
    """
    floor_s = _floor_s(clip, gpu)
    return {
        "gpu": None if gpu is None else gpu.name,
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


def _floor_s(clip: Clip, gpu: GpuHealth | None) -> float | None:
    profile = PROFILES.get(clip.model)
    plan = None if profile is None else plan_of(profile, Placement())
    card = None if gpu is None else card_named(gpu.name, gpu.memory_total_bytes)
    effort = clip.effort
    if plan is None or card is None or effort is None or effort.cached_forwards:
        return None
    work = Work(clip.width, clip.height, clip.num_frames, effort.steps, effort.guided_steps)
    return plan.flop(work).denoise / card.flops


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
