"""`make demo` as a newcomer runs it: the shipped checkpoint, and clips that show what their captions say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from integration.service import write_config
from PIL import Image

from serve_graph.demo import PROMPTS
from serve_graph.mp4_frames import read_frames
from serve_graph.tiny_wan.measure import measure
from serve_graph.tiny_wan.world import HELD_OUT

SHOWN = (
    ("circle", "red", "blue", "right"),
    ("square", "yellow", "black", "up"),
    ("triangle", "white", "purple", "right"),
    ("circle", "green", "black", "left"),
    ("square", "purple", "yellow", "down"),
    ("triangle", "red", "white", "still"),
    ("circle", "white", "blue", "up"),
    ("triangle", "yellow", "red", "left"),
)
"""What `PROMPTS` ask for: shape, colour, background, motion."""


def run_demo(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    config = write_config(tmp_path, model={})  # the defaults: the shipped checkpoint
    command = [sys.executable, "-m", "serve_graph.cli", "demo", "--config", str(config), "--out", str(tmp_path / "out")]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)


def test_demo_shows_what_its_held_out_captions_say(tmp_path: Path) -> None:
    assert set(SHOWN) <= HELD_OUT

    ended = run_demo(tmp_path, "--json")

    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert [clip["prompt"] for clip in told["clips"]] == list(PROMPTS)
    seen = [measure(read_frames(Path(path))) for path in told["mp4s"]]
    right = [
        [reading.shape, reading.colour, reading.background, reading.motion] == list(shown)
        for reading, shown in zip(seen, SHOWN, strict=True)
    ]
    assert sum(right) >= 7, list(zip(SHOWN, seen, strict=True))
    sheet = np.asarray(Image.open(told["contact_sheet"]).convert("RGB"))
    assert sheet.shape[0] > 8 * 160
    assert sheet.shape[1] > 6 * 160


def test_demo_tells_a_bad_prompt_before_anything_starts(tmp_path: Path) -> None:
    ended = run_demo(tmp_path, "--prompt", "")

    assert (ended.returncode, ended.stdout) == (1, "")
    assert "1 to 2,000 characters" in ended.stderr
    assert not (tmp_path / "out").exists()
