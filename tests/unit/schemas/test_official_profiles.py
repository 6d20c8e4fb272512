"""The shipped profiles against Wan's own release."""

import pytest

from schemas.errors import InvalidRequest
from schemas.model_profile import TEMPORAL_STRIDE, ModelProfile
from schemas.official_profiles import PROFILES, WAN_1_3B, WAN_14B, WAN_14B_FEW_STEP, WAN_NEGATIVE_PROMPT, WAN_TINY
from schemas.requests import GenerateRequest


def test_profiles_are_known_by_their_names() -> None:
    assert list(PROFILES) == ["wan-tiny", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-t2v-14b-few-step"]
    assert all(name == profile.name for name, profile in PROFILES.items())


@pytest.mark.parametrize(
    ("profile", "hub_id", "resolution", "width", "height", "guidance_scale", "flow_shift"),
    [
        (WAN_1_3B, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "480p", 832, 480, 6.0, 8.0),
        (WAN_14B, "Wan-AI/Wan2.1-T2V-14B-Diffusers", "720p", 1280, 720, 5.0, 5.0),
    ],
    ids=["1.3B", "14B"],
)
def test_official_profile_has_the_releases_values(
    profile: ModelProfile,
    hub_id: str,
    resolution: str,
    width: int,
    height: int,
    guidance_scale: float,
    flow_shift: float,
) -> None:
    parameters = profile.resolve(GenerateRequest(prompt="a"))

    assert profile.hub_id == hub_id
    assert profile.max_sequence_length == 512
    assert profile.defaults.resolution == resolution
    assert (parameters.width, parameters.height) == (width, height)
    assert (parameters.num_frames, parameters.fps, parameters.duration) == (81, 16, 5.0)
    assert parameters.num_inference_steps == 50
    assert (parameters.guidance_scale, parameters.flow_shift) == (guidance_scale, flow_shift)
    assert parameters.negative_prompt == WAN_NEGATIVE_PROMPT


def test_the_few_step_profile_has_its_authors_values() -> None:
    parameters = WAN_14B_FEW_STEP.resolve(GenerateRequest(prompt="a"))

    assert WAN_14B_FEW_STEP.hub_id == WAN_14B.hub_id
    assert (parameters.num_inference_steps, parameters.guided_steps, parameters.flow_shift) == (4, 0, 5.0)
    assert [(lora.name, lora.weight) for lora in parameters.loras] == [("lightx2v-4-steps", 1.0)]


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [("num_inference_steps", 2, "3 to 8"), ("num_inference_steps", 50, "3 to 8"), ("guidance_scale", 5.0, "1 to 1")],
)
def test_the_few_step_profile_refuses_what_its_adapter_was_not_made_for(field: str, value: float, legal: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        WAN_14B_FEW_STEP.resolve(GenerateRequest.model_validate({"prompt": "a", field: value}))

    assert [(error.field, error.legal) for error in refused.value.errors] == [(field, legal)]


def test_only_the_14b_model_does_720p() -> None:
    assert {r.name for r in WAN_1_3B.resolutions} == {"480p"}
    assert {r.name for r in WAN_14B.resolutions} == {"480p", "720p"}


def test_official_negative_prompt_is_whole() -> None:
    assert WAN_NEGATIVE_PROMPT.startswith("色调艳丽，过曝，静态")
    assert WAN_NEGATIVE_PROMPT.endswith("倒着走")
    assert len(WAN_NEGATIVE_PROMPT.split("，")) == 28


def test_tiny_profile_needs_no_hub() -> None:
    assert WAN_TINY.hub_id is None


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_profile_is_one_that_wan_can_render(profile: ModelProfile) -> None:
    assert all(r.width % 16 == 0 and r.height % 16 == 0 for r in profile.resolutions)
    assert (profile.min_num_frames - 1) % TEMPORAL_STRIDE == 0
    assert (profile.max_num_frames - 1) % TEMPORAL_STRIDE == 0
    assert len({(r.name, r.aspect_ratio) for r in profile.resolutions}) == len(profile.resolutions)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_profile_accepts_its_own_defaults(profile: ModelProfile) -> None:
    defaults = profile.defaults.model_dump()

    assert profile.resolve(GenerateRequest.model_validate({"prompt": "a", **defaults})).prompt == "a"


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_profile_survives_json(profile: ModelProfile) -> None:
    assert ModelProfile.model_validate_json(profile.model_dump_json()) == profile
