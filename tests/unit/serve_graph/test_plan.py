"""What fits where, in what time and at what cost; the arithmetic below it is tried in test_architecture.py."""

from dataclasses import replace

import pytest

from schemas.errors import InvalidRequest, ModelNotReady
from schemas.health import GpuHealth
from schemas.official_profiles import PROFILES, WAN_1_3B, WAN_14B, WAN_14B_FEW_STEP
from schemas.requests import GenerateRequest
from serve_graph.plan import (
    CONTEXT_BYTES,
    EFFICIENCY,
    GPUS,
    SLACK,
    Clip,
    ModelPlan,
    Placement,
    card_named,
    plan_of,
    rows,
)
from serve_graph.service_plan import ServicePlan, check_start, placement_of, plan_for
from serve_graph.settings import EngineSettings, LoraSettings, ModelSettings, Settings, TextSettings

L4, A100_40GB, A100_80GB, H100 = GPUS.values()
TEXT_ON_GPU = Placement(text_on_gpu=True, text_dtype="bfloat16")


def plan(name: str = WAN_1_3B.name, placement: Placement = Placement()) -> ModelPlan:  # noqa: B008  # frozen
    made = plan_of(PROFILES[name], placement)
    assert made is not None
    return made


def default_clip(planned: ModelPlan, size: int = 0) -> Clip:
    return planned.clip(planned.profile.resolutions[size], planned.profile.max_num_frames)


def settings(name: str, **engine: int) -> Settings:
    return Settings(model=ModelSettings(profile=PROFILES[name]), engine=EngineSettings(**engine))


def gpu(memory_bytes: int, name: str = "NVIDIA L4") -> GpuHealth:
    return GpuHealth(name=name, memory_total_bytes=memory_bytes, memory_used_bytes=0)


# ---- memory


@pytest.mark.parametrize(
    ("name", "placement", "fitting"),
    [
        (WAN_1_3B.name, Placement(), {"480p": "L4 A100-40GB A100-80GB H100"}),
        (WAN_1_3B.name, TEXT_ON_GPU, {"480p": "A100-40GB A100-80GB H100"}),
        (WAN_1_3B.name, replace(TEXT_ON_GPU, vae_dtype="bfloat16"), {"480p": "L4 A100-40GB A100-80GB H100"}),
        (WAN_14B.name, Placement(), {"480p": "A100-40GB A100-80GB H100", "720p": "A100-80GB H100"}),
        (WAN_14B.name, Placement(vae_dtype="bfloat16"), {"480p": "A100-40GB A100-80GB H100"}),
        (WAN_14B.name, Placement(dtype="float32"), {"480p": "A100-80GB H100"}),
    ],
)
def test_what_fits_where(name: str, placement: Placement, fitting: dict[str, str]) -> None:
    planned = plan(name, placement)
    for size, cards in fitting.items():
        clip = default_clip(planned, [r.name for r in planned.profile.resolutions].index(size))
        assert " ".join(card.name for card in GPUS.values() if planned.fits(clip, card.memory_bytes)) == cards


def test_peak_is_what_is_resident_and_the_larger_of_both_stages_with_the_allowances() -> None:
    planned = plan()
    held = planned.footprint(default_clip(planned))

    assert held.resident == held.transformer + held.vae
    assert held.host == held.text_encoder
    assert held.decode_activations > held.denoise_activations
    assert held.peak == held.resident + int((1 + SLACK) * held.decode_activations) + CONTEXT_BYTES


def test_a_text_encoder_on_the_gpu_is_resident_in_a_second_process() -> None:
    on_host, on_gpu = plan(), plan(placement=TEXT_ON_GPU)
    clip = default_clip(on_host)
    added = on_gpu.footprint(clip).peak - on_host.footprint(clip).peak

    assert added == on_gpu.footprint(clip).text_encoder + CONTEXT_BYTES
    assert on_gpu.footprint(clip).host == 0


def test_adapters_whose_size_is_known_are_resident() -> None:
    size = sum(lora.size_bytes or 0 for lora in WAN_14B_FEW_STEP.loras.values())
    few, many = (
        plan_for(Settings(model=ModelSettings(profile=profile, loras={"ours": LoraSettings(size_bytes=10**6)})))
        for profile in (WAN_14B_FEW_STEP, WAN_14B)
    )
    assert few is not None
    assert many is not None

    clip = few.smallest_clip()
    assert size > 600 * 10**6
    assert few.footprint(clip).resident == many.footprint(clip).resident + size
    assert many.footprint(clip).resident == plan(WAN_14B.name, many.placement).footprint(clip).resident
    assert many.placement.lora_bytes == 10**6


def test_few_steps_are_a_twenty_fifth_of_the_forwards() -> None:
    few, many = plan(WAN_14B_FEW_STEP.name), plan(WAN_14B.name)
    few_clip, many_clip = (model.clip(WAN_14B.resolutions[0], 81) for model in (few, many))

    assert many.flop(many_clip).denoise == 25 * few.flop(few_clip).denoise


def test_a_vae_that_moves_counts_while_it_decodes_only() -> None:
    kept, moved = plan(), plan(placement=Placement(vae_moves=True))
    clip = default_clip(kept)

    assert kept.footprint(clip).resident - moved.footprint(clip).resident == kept.footprint(clip).vae
    assert moved.footprint(clip).peak == pytest.approx(kept.footprint(clip).peak, abs=1)  # the decode is the peak
    assert moved.footprint(clip).host == moved.footprint(clip).text_encoder + moved.footprint(clip).vae


def test_what_is_nearest_is_what_fits() -> None:
    beside_text = plan(placement=TEXT_ON_GPU)
    assert beside_text.nearest(default_clip(beside_text), L4.memory_bytes) == (
        "the text encoder on the CPU (model.text_device: cpu)",
        "an A100-40GB",
    )
    large = plan(WAN_14B.name)
    assert large.nearest(default_clip(large, 2), A100_40GB.memory_bytes) == (
        "480p",
        "the VAE in bfloat16 (model.vae_dtype)",
        "an A100-80GB",
    )
    assert plan().nearest(default_clip(plan()), 1) == ("an L4",)


def test_fewer_frames_are_nearest_where_the_forward_is_the_peak() -> None:
    planned = plan(WAN_14B.name, Placement(dtype="float32", vae_dtype="bfloat16"))
    clip = default_clip(planned, 2)
    memory_bytes = planned.footprint(clip).peak - 1
    frames = planned.most_frames(clip, memory_bytes)

    assert frames == 77
    assert planned.nearest(clip, memory_bytes)[0] == "77 frames"
    assert planned.fits(clip._replace(num_frames=frames), memory_bytes)


# ---- time and cost


def test_guidance_takes_a_second_forward_and_a_second_text() -> None:
    planned = plan()
    size = WAN_1_3B.resolutions[0]
    guided, alone = (planned.flop(planned.clip(size, 81, 4, scale)) for scale in (6.0, 1.0))

    assert (guided.denoise, guided.text) == (2 * alone.denoise, 2 * alone.text)
    assert guided.decode == alone.decode


def test_the_text_encoder_is_in_the_floor_where_it_is_on_the_gpu() -> None:
    clip = default_clip(plan())
    added = plan(placement=TEXT_ON_GPU).floor_s(clip, L4) - plan().floor_s(clip, L4)

    assert added == pytest.approx(plan().flop(clip).text / L4.flops)


def test_rows_cost_what_the_expected_seconds_do() -> None:
    made = rows(plan(), L4, price_per_hour=3.6)

    assert [(row.width, row.height, row.num_frames) for row in made] == [(832, 480, 81), (480, 832, 81)]
    for row in made:
        assert row.expected_s == row.floor_s / EFFICIENCY
        assert row.cost == pytest.approx(row.expected_s / 1_000)
    assert rows(plan(), L4)[0].cost is None


def test_rows_have_the_default_and_the_longest_frame_count() -> None:
    short = WAN_1_3B.model_copy(update={"defaults": WAN_1_3B.defaults.model_copy(update={"num_frames": 33})})
    planned = plan_of(short, Placement())
    assert planned is not None

    assert [row.num_frames for row in rows(planned, L4)] == [33, 81, 33, 81]


# ---- a service's own


def test_placement_follows_the_settings() -> None:
    profile = WAN_1_3B
    assert placement_of(ModelSettings(profile=profile)) == Placement(has_bfloat16_vae=True)
    assert placement_of(ModelSettings(profile=profile, text_device="auto")) == replace(
        TEXT_ON_GPU, has_bfloat16_vae=True
    )
    chosen = ModelSettings(profile=profile, dtype="float16", vae_dtype="auto", text_dtype="bfloat16")
    assert placement_of(chosen) == Placement("float16", "bfloat16", "bfloat16")


def test_a_model_that_fits_no_clip_on_the_gpu_does_not_start() -> None:
    check_start(settings(WAN_1_3B.name), "NVIDIA L4", L4.memory_bytes)
    check_start(settings(WAN_14B.name), "NVIDIA A100-SXM4-40GB", A100_40GB.memory_bytes)
    with pytest.raises(ModelNotReady) as refusal:
        check_start(settings(WAN_14B.name), "NVIDIA L4", L4.memory_bytes)

    assert str(refusal.value) == (
        "wan2.1-t2v-14b does not fit on NVIDIA L4: it needs 35.9 GiB for its smallest clip, and there are 22.0; "
        "it would with an A100-40GB"
    )


def test_max_clip_pixels_takes_the_plan_s_place_at_the_start() -> None:
    check_start(settings(WAN_14B.name, max_clip_pixels=10**9), "NVIDIA L4", L4.memory_bytes)


@pytest.mark.parametrize(
    ("engine", "text", "text_device", "plans"),
    [(True, False, "cpu", False), (False, True, "auto", False), (False, True, "cpu", True)],
)
def test_nothing_is_planned_with_int8_weights_on_the_gpu(
    engine: bool, text: bool, text_device: str, plans: bool
) -> None:
    asked = Settings(
        model=ModelSettings(profile=WAN_14B, text_device=text_device),
        engine=EngineSettings(int8_weights=engine),
        text=TextSettings(int8_weights=text),
    )

    assert (plan_for(asked) is not None) is plans


def test_a_profile_of_one_s_own_is_not_judged() -> None:
    own = WAN_14B.model_copy(update={"name": "ours"})

    assert plan_of(own, Placement()) is None
    check_start(Settings(model=ModelSettings(profile=own)), "NVIDIA L4", 1)
    planned = ServicePlan(plan_for(Settings(model=ModelSettings(profile=own))), lambda: gpu(1))
    parameters = own.resolve(GenerateRequest(prompt="a cat"))
    planned.refuse_what_does_not_fit(parameters)
    assert planned.device(parameters) is None
    assert planned.work(parameters).teraflop is None


@pytest.mark.parametrize(
    ("name", "memory_gib", "card"),
    [
        ("NVIDIA L4", 22.2, L4),
        ("NVIDIA A100-SXM4-40GB", 39.5, A100_40GB),
        ("NVIDIA A100 80GB PCIe", 79.25, A100_80GB),
        ("NVIDIA H100 80GB HBM3", 79.1, H100),
        ("NVIDIA L40S", 44.4, None),
        ("Tesla T4", 14.7, None),
        ("NVIDIA H200", 139.7, None),
    ],
)
def test_cards_are_known_by_what_torch_calls_them(name: str, memory_gib: float, card: object) -> None:
    assert card_named(name, int(memory_gib * 2**30)) == card


def test_no_request_is_refused_where_nothing_is_known_of_a_gpu() -> None:
    planned = ServicePlan(plan_for(Settings(model=ModelSettings(profile=WAN_14B))), lambda: None)
    parameters = WAN_14B.resolve(GenerateRequest(prompt="a cat"))

    planned.refuse_what_does_not_fit(parameters)
    assert planned.device(parameters) is None


def test_a_request_with_too_many_frames_is_told_how_many_fit() -> None:
    model = ModelSettings(profile=WAN_14B, dtype="float32", vae_dtype="bfloat16")
    peak = plan(WAN_14B.name, placement_of(model)).footprint(default_clip(plan(WAN_14B.name), 2)).peak
    planned = ServicePlan(plan_for(Settings(model=model)), lambda: gpu(peak - 1))
    with pytest.raises(InvalidRequest) as refusal:
        planned.refuse_what_does_not_fit(WAN_14B.resolve(GenerateRequest(prompt="a cat")))

    (error,) = refusal.value.errors
    assert (error.field, error.nearest) == ("num_frames", (77,))
    assert error.legal == "at most 77 frames of 1280x720 fit into this device"
    planned.refuse_what_does_not_fit(WAN_14B.resolve(GenerateRequest(prompt="a cat", num_frames=77)))


def test_a_card_of_unknown_speed_has_a_peak_memory_and_no_floor() -> None:
    l40s = gpu(44 * 2**30, "NVIDIA L40S")
    planned = ServicePlan(plan_for(Settings(model=ModelSettings(profile=WAN_1_3B))), lambda: l40s)
    found = planned.device(WAN_1_3B.resolve(GenerateRequest(prompt="a cat")))

    assert found is not None
    assert (found.floor_s, found.expected_s) == (None, None)
    assert found.peak_memory_bytes > 0
