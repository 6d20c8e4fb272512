"""`python -m benchmarks.gpu`: the whole script on the CPU, in its small form, and what it makes of a GPU's figures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from benchmarks import gpu
from benchmarks.figures import spread
from benchmarks.gpu_report import Card, GpuReport, Held, StageRow, StepRow, markdown
from benchmarks.random_parts import random_text_encoder, random_transformer, random_vae
from schemas.official_profiles import WAN_1_3B
from serve_graph.architecture import ARCHITECTURES
from serve_graph.plan import CONTEXT_BYTES, EFFICIENCY, GPUS, SLACK, ModelPlan, Placement
from serve_graph.settings import EncodeSettings

CPU = torch.device("cpu")
H100 = GPUS["H100"]
CARD = Card(name="NVIDIA H100", memory_bytes=H100.memory_bytes, driver="1", flops=H100.flops)
ENGINE = ("exact", "balanced", "fast", "batched_guidance", "one_key_padding", "guidance_interval 0 to 0.8")
ENGINE += ("first_block_threshold", "engine.fuse_qkv", "engine.compile regional")
NOT_ON_A_CPU = "engine.attention_backend _native_cudnn"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of a GPU, in which a try-out has run."""
    folder = tmp_path_factory.mktemp("results")
    for name in ("gpu.json", "gpu.md"):
        (folder / name).write_text("of a GPU")
    before = torch.get_default_dtype()
    assert gpu.main(["--small", "--steps-timed", "1", "--out", str(folder)]) == 0
    assert torch.get_default_dtype() == before
    return folder


@pytest.fixture(scope="module")
def found(results: Path) -> GpuReport:
    return GpuReport.model_validate_json((results / "gpu_try_out.json").read_text())


def row(seconds: float = 1.0, held: Held | None = None) -> tuple[StepRow, StageRow]:
    """Exact's steps and decode."""
    step = StepRow(
        model="1.3b", size="480p", variant="exact", steps=50, guided_steps=50, denoise_s=50 * seconds, held=held
    )
    decode = StageRow(stage="decode", size="480p", variant="exact", seconds=spread([seconds]), held=held)
    return step, decode


# ---- the try-out


def test_every_variant_has_a_row_at_every_size(found: GpuReport) -> None:
    names = {(step.size, step.variant) for step in found.steps}
    others = {"stock", NOT_ON_A_CPU, "engine.int8_weights"}

    assert names == {(size.name, name) for size in gpu.SMALL_SIZES for name in {*ENGINE, *others}}
    assert found.missing == ()
    for step in found.steps:
        if step.variant in {"stock", *ENGINE}:
            assert step.failed is None
            assert step.guided_s is not None
            assert (step.alone_s is not None) == (step.guided_steps < step.steps)


def test_both_kinds_of_forwards_are_timed_where_forwards_may_end_early(found: GpuReport) -> None:
    cached = {step.variant for step in found.steps if step.cached_s is not None}

    assert cached == {"balanced", "fast", "first_block_threshold"}
    assert cached == {step.variant for step in found.steps if step.half_cached_denoise_s is not None}


def test_a_lever_that_can_t_be_had_is_a_row_that_says_so(found: GpuReport, results: Path) -> None:
    failed = [step for step in found.steps if step.variant == NOT_ON_A_CPU]

    assert len(failed) == len(gpu.SMALL_SIZES)
    assert all(step.failed and step.guided_s is None for step in failed)
    assert f"| small 32p | {NOT_ON_A_CPU} | No " in (results / "gpu_try_out.md").read_text()
    assert _AttentionBackendRegistry.get_active_backend()[0].value == "native"  # for whoever comes after it


def test_clips_are_the_sum_of_their_stages(found: GpuReport) -> None:
    assert [(clip.size, clip.variant) for clip in found.clips] == [
        (size.name, name) for size in gpu.SMALL_SIZES for name in ("stock", "exact", "balanced", "fast")
    ]
    exact = next(step for step in found.steps if (step.size, step.variant) == ("32p", "exact"))
    fast = next(step for step in found.steps if (step.size, step.variant) == ("32p", "fast"))
    assert exact.guided_s is not None
    assert fast.guided_s is not None
    assert fast.alone_s is not None
    assert exact.denoise_s == pytest.approx(50 * exact.guided_s.median)
    assert fast.denoise_s == pytest.approx(12 * fast.guided_s.median + 8 * fast.alone_s.median)
    decodes = {clip.variant: clip.decode for clip in found.clips}
    assert decodes == {"stock": "stock", "exact": "exact", "balanced": "exact", "fast": "bfloat16_decode"}


def test_a_try_out_says_so_and_leaves_the_results_of_a_gpu_alone(found: GpuReport, results: Path) -> None:
    assert found.try_out
    assert found.card is None
    assert found.assumptions == ()
    assert "**No GPU was at hand.**" in (results / "gpu_try_out.md").read_text()
    assert {(results / name).read_text() for name in ("gpu.json", "gpu.md")} == {"of a GPU"}


def test_a_report_of_a_gpu_goes_into_files_of_its_own(found: GpuReport) -> None:
    report = found.model_copy(update={"try_out": False, "card": CARD})

    assert report.file_name == "gpu"
    assert "- Machine: NVIDIA H100, 79.0 GiB, driver 1, 989 TFLOP/s dense bfloat16;" in markdown(report)


# ---- the budget


def test_rows_beyond_the_budget_are_named_and_not_run(tmp_path: Path) -> None:
    assert gpu.main(["--small", "--budget-s", "0", "--out", str(tmp_path)]) == 0
    found = GpuReport.model_validate_json((tmp_path / "gpu_try_out.json").read_text())

    assert found.steps == found.stages == found.clips == ()
    assert "small 48p, engine.fuse_qkv: beyond the budget of 0 s" in found.missing
    assert "decode 32p, exact: beyond the budget of 0 s" in found.missing
    assert "## Missing\n\n- text, stock" in (tmp_path / "gpu_try_out.md").read_text()


def test_no_row_begins_after_one_that_would_have_ended_too_late() -> None:
    budget = gpu.Budget(seconds=1e6, began=gpu.time.monotonic(), rates={"steps": 1e12})

    assert budget.allows("steps", 1e12, fixed_s=1.0)
    assert not budget.allows("steps", 1e18, fixed_s=0.0)
    assert not budget.allows("steps", 1.0, fixed_s=0.0)


def test_a_row_is_expected_to_be_as_quick_as_the_last() -> None:
    budget = gpu.Budget(seconds=1_000, began=gpu.time.monotonic(), rates={"steps": 1e12})
    budget.saw("steps", 1e15, seconds=100)

    assert budget.allows("steps", 5e15, fixed_s=0.0)
    assert not budget.allows("steps", 9e15, fixed_s=0.0)


# ---- the plan beside what was measured


def test_assumptions_that_hold_are_measured_as_they_are_assumed() -> None:
    plan = ModelPlan(WAN_1_3B, ARCHITECTURES[WAN_1_3B.name], Placement())
    clip = plan.clip(WAN_1_3B.resolutions[0], 81)
    planned, flop = plan.footprint(clip), plan.flop(clip)
    step, decode = row((flop.denoise + flop.decode) / H100.flops / EFFICIENCY / 51)
    held = {
        name: Held(
            before=planned.resident,
            allocated=planned.resident + activations,
            reserved=planned.resident + int((1 + SLACK) * activations),
        )
        for name, activations in (("step", planned.denoise_activations), ("decode", planned.decode_activations))
    }
    step, decode = (one.model_copy(update={"held": held[name]}) for one, name in ((step, "step"), (decode, "decode")))

    made = list(gpu.assumptions(plan, clip, step, decode, CARD, CONTEXT_BYTES))

    assert [one.name for one in made] == [
        "EFFICIENCY, steps and decode",
        "weights on the card",
        "activations of a forward",
        "SLACK of a forward",
        "activations of a decode",
        "SLACK of a decode",
        "peak of a clip",
    ]
    for one in made:
        assert one.measured == pytest.approx(one.assumed, rel=1e-6), one.name


def test_nothing_is_compared_where_nothing_was_measured() -> None:
    plan = ModelPlan(WAN_1_3B, ARCHITECTURES[WAN_1_3B.name], Placement())

    assert list(gpu.assumptions(plan, plan.clip(WAN_1_3B.resolutions[0], 81), *row(), None, None)) == []


# ---- what it is made of


def test_random_parts_have_as_many_bytes_as_the_plan_says() -> None:
    dims = gpu.SMALL_ARCHITECTURE
    made = {
        "transformer": random_transformer(dims.transformer, CPU, torch.bfloat16),
        "vae": random_vae(dims.vae, CPU, torch.bfloat16),
        "text_encoder": random_text_encoder(dims.text_encoder, CPU, torch.bfloat16),
    }

    for name, module in made.items():
        held = sum(parameter.nbytes for parameter in module.parameters())
        assert held == getattr(dims, name).weight_bytes("bfloat16"), name


def test_mp4s_are_made_as_the_service_makes_them() -> None:
    assert gpu.EncodeDefaults()._asdict() == EncodeSettings().model_dump()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run for minutes")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_it_needs_no_server_s_packages() -> None:
    others = "ray fastapi starlette modal minio pydantic_settings standardwebhooks prometheus_client"
    code = f"import sys, benchmarks.gpu; print([name for name in '{others}'.split() if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)

    assert told.stdout.strip() == "[]"
