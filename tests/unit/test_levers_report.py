"""The report of `benchmarks.levers`: what its tables and its Markdown say."""

from datetime import UTC, datetime

import pytest

from benchmarks.figures import Comparison, at_most, spread
from benchmarks.levers_report import BlockReport, LeversReport, Variant, markdown
from benchmarks.machine import Machine
from schemas.official_profiles import WAN_TINY
from schemas.presets import Effort
from schemas.requests import GenerateRequest
from serve_graph.adherence import Rates
from serve_graph.settings import EncodeSettings

RATES = Rates(count=4, shape=1.0, colour=0.75, background=1.0, motion=0.5, all=0.5)
EFFORT = Effort(steps=12, guided_steps=12, forwards=24, cached_forwards=6)


def variant(name: str, ratio: float, psnr_db: float | None = None, effort: Effort | None = EFFORT) -> Variant:
    return Variant(
        name=name,
        seconds=spread([ratio]),
        ratio_to_stock=spread([ratio]),
        cpu_ratio_to_stock=spread([ratio]),
        effort=effort,
        cached_share=0.0 if effort is None else 0.25,
        latents_error=None if effort is None else 0.0,
        psnr_db=psnr_db,
        ssim=1.0,
        adherence=RATES,
    )


def report_of(comparison: Comparison) -> LeversReport:
    return LeversReport(
        created_at=datetime(2026, 11, 27, tzinfo=UTC),
        duration_s=60.0,
        machine=Machine(cpu="a CPU", num_cores=2, memory_bytes=2**34, load=0.1),
        versions={"torch": "2.13.0"},
        model="wan-tiny",
        parameters=WAN_TINY.resolve(GenerateRequest(prompt="a red circle", seed=1)),
        num_threads=1,
        encode=EncodeSettings(),
        prompts=4,
        presets=WAN_TINY.presets,
        variants=(variant("stock", 1.0, 85.0, None), variant("exact", 0.6), variant("fast", 0.25, 21.5)),
        comparisons=(comparison,),
        block=BlockReport(
            tokens=3_120, text_tokens=512, prompt_tokens=40, seconds={"none": spread([2.0])}, ratios={"none": 1.0}
        ),
    )


@pytest.mark.parametrize(("seconds", "verdict"), [([0.3], "pass"), ([0.4], "MISS")])
def test_markdown_has_each_variant_each_preset_and_each_goal(seconds: list[float], verdict: str) -> None:
    report = report_of(at_most("fast / stock", seconds, [1.0], share=0.35))

    text = markdown(report)

    assert report.passed == (verdict == "pass")
    assert f"| fast / stock | {seconds[0]:.3f} |" in text
    assert f"| ratio ≤ 0.35 | {verdict} |" in text
    assert "| exact | 12 | 12 | 25% | 600 | 0.600 | 0.600 | 0 | same | 1.0000 |" in text
    assert "| fast | 12 | 12 | 25% | 250 | 0.250 | 0.250 | 0 | 21.5 | 1.0000 |" in text
    assert "| stock | 1.00 | 0.75 | 1.00 | 0.50 | 0.50 |" in text
    assert "- `exact`: no lever\n" in text
    assert "- `fast`: 6 steps, guidance_interval (0.0, 0.6), batched_guidance" in text
    assert "3,120 latent tokens" in text
    assert LeversReport.model_validate_json(report.model_dump_json()) == report
