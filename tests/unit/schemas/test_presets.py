"""Levers and presets: what they count, and how a profile answers a request that names one."""

from typing import Any

import pytest
from pydantic import ValidationError

from schemas.errors import InvalidRequest
from schemas.model_profile import ModelProfile
from schemas.official_profiles import PROFILES, WAN_TINY
from schemas.presets import EXACT, NO_LEVERS, Levers, Preset
from schemas.requests import GenerateRequest, GenerationParameters


def resolve(profile: ModelProfile = WAN_TINY, **fields: Any) -> GenerationParameters:
    return profile.resolve(GenerateRequest.model_validate({"prompt": "a red circle", **fields}))


@pytest.mark.parametrize(
    ("interval", "num_steps", "guided"),
    [
        (None, 12, range(12)),
        ((0.0, 1.0), 12, range(12)),
        ((0.0, 0.5), 12, range(6)),
        ((0.25, 0.75), 8, range(2, 6)),
        ((0.0, 0.6), 5, range(3)),
        ((0.4, 0.6), 1, range(1)),
        ((0.0, 0.0), 50, range(0)),
    ],
)
def test_guidance_applies_where_the_middle_of_a_step_is_in_the_interval(
    interval: tuple[float, float] | None, num_steps: int, guided: range
) -> None:
    levers = Levers(guidance_interval=interval)

    assert [step for step in range(num_steps) if levers.guides(step, num_steps)] == list(guided)
    assert levers.guided_steps(num_steps) == len(guided)


@pytest.mark.parametrize("interval", [(0.6, 0.4), (-0.1, 0.5), (0.0, 1.1)])
def test_an_interval_that_is_none_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValidationError):
        Levers(guidance_interval=interval)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_exact_has_no_lever_in_any_profile_and_the_others_have_some(profile: ModelProfile) -> None:
    assert list(profile.presets) == ["exact", "balanced", "fast"]
    assert profile.presets["exact"] == EXACT == Preset(levers=NO_LEVERS)
    work = [resolve(profile, preset=name) for name in profile.presets]
    forwards = [parameters.num_inference_steps + parameters.guided_steps for parameters in work]
    assert forwards == sorted(forwards, reverse=True)
    assert forwards[0] > forwards[-1]
    assert len({(count, parameters.levers) for count, parameters in zip(forwards, work, strict=True)}) == 3
    unguided = profile.max_guidance_scale == 1
    assert not (unguided and any(p.levers.batched_guidance or p.levers.guidance_interval for p in work))


def test_a_profile_can_not_give_levers_to_exact() -> None:
    fields = WAN_TINY.model_dump() | {"presets": {"exact": {"levers": {"batched_guidance": True}}}}

    with pytest.raises(ValidationError, match="exact does without nothing"):
        ModelProfile.model_validate(fields)


def test_a_profile_without_presets_has_exact_alone_and_refuses_the_others() -> None:
    fields = WAN_TINY.model_dump(exclude={"presets"})
    profile = ModelProfile.model_validate(fields)

    assert profile.presets == {"exact": EXACT}
    with pytest.raises(InvalidRequest) as caught:
        resolve(profile, preset="fast")
    (error,) = caught.value.errors
    assert (error.field, error.legal, error.nearest) == ("preset", "one of exact", ("exact",))


def test_a_request_without_a_preset_is_rendered_as_exact_is_and_may_share_forwards() -> None:
    silent, named = resolve(seed=1), resolve(seed=1, preset="exact")

    assert (silent.preset, silent.levers, silent.reproducible) == ("exact", NO_LEVERS, False)
    assert named == silent.model_copy(update={"reproducible": True})


def test_a_preset_fills_in_its_own_defaults_and_leaves_alone_what_was_asked_for() -> None:
    fast = WAN_TINY.presets["fast"]
    parameters = resolve(preset="fast")

    assert (parameters.preset, parameters.levers) == ("fast", fast.levers)
    assert parameters.num_inference_steps == fast.num_inference_steps != WAN_TINY.defaults.num_inference_steps
    assert parameters.guidance_scale == WAN_TINY.defaults.guidance_scale
    assert resolve(preset="fast", num_inference_steps=9, guidance_scale=3.0).num_inference_steps == 9


def test_a_distilled_checkpoint_is_a_profile_with_few_steps_and_no_guidance() -> None:
    defaults = WAN_TINY.defaults.model_dump() | {"num_inference_steps": 4, "guidance_scale": 1.0}
    fields = WAN_TINY.model_dump() | {"defaults": defaults, "max_num_inference_steps": 8, "max_guidance_scale": 1.0}
    parameters = resolve(ModelProfile.model_validate(fields))

    assert (parameters.num_inference_steps, parameters.guided_steps) == (4, 0)


def test_a_profile_whose_preset_takes_more_steps_than_are_legal_is_refused() -> None:
    with pytest.raises(ValidationError, match="preset fast takes more than max_num_inference_steps"):
        ModelProfile.model_validate(WAN_TINY.model_dump() | {"max_num_inference_steps": 5})


def test_a_profile_whose_preset_takes_fewer_steps_than_are_legal_is_refused() -> None:
    with pytest.raises(ValidationError, match="preset fast takes fewer than min_num_inference_steps"):
        ModelProfile.model_validate(WAN_TINY.model_dump() | {"min_num_inference_steps": 7})


def test_parameters_on_record_from_before_presets_were_exact() -> None:
    recorded = resolve(seed=1).model_dump(mode="json", exclude={"preset", "levers"})

    assert GenerationParameters.model_validate(recorded) == resolve(seed=1)
