"""What is written down of cold starts and of the 480p clip."""

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.clips import Clip, Timings
from schemas.health import GpuHealth
from schemas.presets import Effort
from serve_graph.on_modal.coldstart import measure, summary
from serve_graph.on_modal.commands import record_of, write_record
from serve_graph.on_modal.options import ModalOptions

CLIP = Clip(
    clip_id="clip_" + "0" * 32,
    job_id="job_" + "0" * 32,
    request_id="r",
    output_url="https://bucket.example/clip.mp4",
    expires_at=datetime(2026, 11, 25, tzinfo=UTC),
    model="wan2.1-t2v-1.3b",
    prompt="an otter",
    negative_prompt="",
    width=832,
    height=480,
    num_frames=81,
    fps=16,
    duration=5.0,
    seed=1,
    num_inference_steps=50,
    guidance_scale=5.0,
    flow_shift=3.0,
    reproducible=False,
    size_bytes=1,
    sha256="0" * 64,
    effort=Effort(steps=50, guided_steps=50, forwards=100, cached_forwards=0),
    timings=Timings(total=500.0, denoise=468.0, decode=20.0),
)


L4 = GpuHealth(name="NVIDIA L4", memory_total_bytes=23_600_000_000, memory_used_bytes=0)


def test_a_clip_of_480p_is_compared_with_the_card_s_floor(tmp_path: Path) -> None:
    """28.3 PFLOP over 121 TFLOP/s, by hand."""
    record = record_of(CLIP, L4)
    write_record(tmp_path, "record_480p", "480p", record)

    assert record["gpu"] == "NVIDIA L4"
    assert record["floor_s"] == pytest.approx(234, rel=0.002)
    assert record["floor_fraction"] == pytest.approx(0.5, abs=0.001)
    assert json.loads((tmp_path / "record_480p.json").read_text()) == record
    assert f"| floor_fraction | {record['floor_fraction']} |" in (tmp_path / "record_480p.md").read_text()


def test_the_floor_counts_the_forwards_that_were_made() -> None:
    half = CLIP.model_copy(update={"effort": Effort(steps=50, guided_steps=0, forwards=50, cached_forwards=0)})

    assert record_of(half, L4)["floor_s"] == pytest.approx(record_of(CLIP, L4)["floor_s"] / 2)


@pytest.mark.parametrize(
    ("changes", "gpu"),
    [
        ({"model": "one-of-ones-own"}, L4),
        ({"effort": CLIP.effort.model_copy(update={"cached_forwards": 1}) if CLIP.effort else None}, L4),
        ({"effort": None}, L4),
        ({}, L4.model_copy(update={"name": "NVIDIA L40S"})),
        ({}, None),
    ],
)
def test_what_the_plan_does_not_know_has_no_floor(changes: dict[str, Any], gpu: GpuHealth | None) -> None:
    record = record_of(CLIP.model_copy(update=changes), gpu)

    assert (record["floor_s"], record["floor_fraction"]) == (None, None)


class Generator:
    """A deployed generator whose containers end at the second look, and whose second start fails."""

    def __init__(self) -> None:
        self.autoscaler: list[dict[str, int]] = []
        self.looks = 0
        self.starts = 0

    @property
    def started(self) -> "Generator":
        """Its method, which has its own `remote` and `get_current_stats`."""
        return self

    def update_autoscaler(self, **settings: int) -> SimpleNamespace:
        self.autoscaler.append(settings)
        return SimpleNamespace(scaledown_window=77, min_containers=1, buffer_containers=0)

    def get_current_stats(self) -> Any:
        self.looks += 1
        return type("Stats", (), {"num_total_runners": self.looks % 2})

    def remote(self) -> dict[str, Any]:
        self.starts += 1
        if self.starts == 2:
            raise RuntimeError("the restore has crashed")
        return {"container": f"c{self.starts}", "start": "restored", "awake_s": 0.5, "gpu": "NVIDIA L4"}


def test_cold_starts_are_counted_failures_too_and_the_autoscaler_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = Generator()
    monkeypatch.setattr("serve_graph.on_modal.coldstart.OUT", tmp_path)
    monkeypatch.setattr("serve_graph.on_modal.coldstart.POLL_S", 0)

    measure(generator, 3, ModalOptions())

    record = json.loads((tmp_path / "coldstart.json").read_text())
    assert (record["count"], record["failures"], record["rebuilt"], record["awake_p50_s"]) == (3, 1, 0, 0.5)
    assert generator.autoscaler[-1] == {"scaledown_window": 77, "min_containers": 1, "buffer_containers": 0}
    assert "2/3: RuntimeError: the restore has crashed" in capsys.readouterr().out


def test_percentiles_of_cold_starts() -> None:
    found = summary([float(n) for n in range(1, 21)], [0.5], 0, ["rebuilt"], ModalOptions())

    assert (found["p50_s"], found["rebuilt"]) == (10.5, 1)
    assert 19 <= found["p95_s"] <= 21
