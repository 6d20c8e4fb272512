"""ModelProfile.resolve: defaults filled in, everything illegal refused with what would have been legal."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_wan import RANDOM_WAN

from schemas.errors import FieldError, InvalidRequest
from schemas.model_profile import DRAWN_SEED_BITS, ModelProfile, nearest_values
from schemas.official_profiles import PROFILES, WAN_1_3B, WAN_14B, WAN_TINY
from schemas.presets import NO_LEVERS
from schemas.requests import MAX_SEED, GenerateRequest, GenerationParameters

GENERATED = ("num_frames", "duration", "fps", "resolution", "aspect_ratio", "width", "height")
BOUNDED = (*GENERATED, "seed", "num_inference_steps", "guidance_scale", "flow_shift")


def resolve(profile: ModelProfile = WAN_1_3B, **fields: Any) -> GenerationParameters:
    return profile.resolve(GenerateRequest.model_validate({"prompt": "a red circle", **fields}))


def refused(profile: ModelProfile = WAN_1_3B, **fields: Any) -> dict[str, FieldError]:
    with pytest.raises(InvalidRequest) as caught:
        resolve(profile, **fields)
    return {error.field: error for error in caught.value.errors}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_resolve_fills_in_the_profiles_defaults(profile: ModelProfile) -> None:
    parameters = resolve(profile, seed=7)
    defaults = profile.defaults

    assert parameters.model_dump() == {
        "prompt": "a red circle",
        "negative_prompt": defaults.negative_prompt,
        "width": parameters.width,
        "height": parameters.height,
        "num_frames": defaults.num_frames,
        "fps": defaults.fps,
        "seed": 7,
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "flow_shift": defaults.flow_shift,
        "reproducible": False,
        "preset": "exact",
        "levers": NO_LEVERS.model_dump(),
        "loras": tuple(lora.model_dump() for lora in defaults.loras),
    }
    assert [
        (r.name, r.aspect_ratio)
        for r in profile.resolutions
        if (r.width, r.height) == (parameters.width, parameters.height)
    ] == [(defaults.resolution, defaults.aspect_ratio)]


def test_resolve_keeps_what_was_asked_for() -> None:
    asked: dict[str, Any] = {
        "negative_prompt": "",
        "width": 480,
        "height": 832,
        "num_frames": 33,
        "fps": 24,
        "seed": 0,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "flow_shift": 3.5,
        "reproducible": True,
    }

    assert resolve(**asked).model_dump(exclude={"prompt", "preset", "levers", "loras"}) == asked


@pytest.mark.parametrize(
    ("duration", "fps", "num_frames"),
    [(5, 16, 81), (5.0, 16, 81), (1, 16, 17), (0.25, 16, 5), (2, 24, 49), (0.5, 8, 5), (2 / 3, 30, 21)],
)
def test_resolve_counts_duration_as_wan_does(duration: float, fps: int, num_frames: int) -> None:
    parameters = resolve(duration=duration, fps=fps)

    assert parameters.num_frames == num_frames
    assert parameters.duration == pytest.approx(duration)


@pytest.mark.parametrize(
    ("num_frames", "nearest"),
    [(80, (77, 81)), (1, (5,)), (4, (5,)), (6, (5, 9)), (82, (81,)), (10**9, (81,))],
)
def test_resolve_names_the_nearest_frame_counts(num_frames: int, nearest: tuple[int, ...]) -> None:
    errors = refused(num_frames=num_frames)

    assert set(errors) == {"num_frames"}
    assert errors["num_frames"].nearest == nearest
    assert errors["num_frames"].legal == "4k+1 from 5 to 81"
    assert all(str(number) in errors["num_frames"].message for number in nearest)


@pytest.mark.parametrize(
    ("duration", "nearest"),
    [(4.9, (4.75, 5.0)), (5.1, (5.0,)), (0.1, (0.25,)), (1e308, (5.0,)), (1e-300, (0.25,))],
)
def test_resolve_names_the_nearest_durations(duration: float, nearest: tuple[float, ...]) -> None:
    errors = refused(duration=duration)

    assert set(errors) == {"duration"}
    assert errors["duration"].nearest == nearest


@pytest.mark.parametrize("duration", [10, 4.9])
def test_resolve_says_that_a_duration_is_not_a_legal_length(duration: float) -> None:
    message = refused(duration=duration)["duration"].message

    assert message.startswith(f"{duration:g} s at 16 fps is not a legal length; legal: ")


@pytest.mark.parametrize("duration", [5, 10, 4.9])
def test_resolve_does_not_judge_a_duration_by_a_refused_fps(duration: float) -> None:
    assert set(refused(duration=duration, fps=17)) == {"fps"}


def test_resolve_takes_the_durations_that_a_refusal_names() -> None:
    for duration in refused(duration=4.9, fps=24)["duration"].nearest or ():
        resolve(duration=duration, fps=24)


def test_resolve_refuses_a_size_that_the_model_does_not_have() -> None:
    errors = refused(RANDOM_WAN, width=100, height=100)

    assert set(errors) == {"width", "height"}
    for error in errors.values():
        assert "64x64" in (error.legal or "")
        assert error.nearest == ("112x64", "64x112") or "128x128" in (error.nearest or ())


def test_resolve_refuses_the_resolution_of_another_model() -> None:
    errors = refused(WAN_1_3B, resolution="720p")

    assert set(errors) == {"resolution"}
    assert errors["resolution"].legal == "one of 480p"


def test_resolve_refuses_a_size_of_another_model() -> None:
    assert set(refused(WAN_1_3B, width=1280, height=720)) == {"width", "height"}
    assert resolve(WAN_14B, width=1280, height=720).width == 1280


def test_resolve_refuses_an_aspect_ratio_that_the_resolution_does_not_have() -> None:
    errors = refused(RANDOM_WAN, resolution="128p", aspect_ratio="16:9")

    assert set(errors) == {"aspect_ratio"}
    assert errors["aspect_ratio"].nearest == ("1:1",)


def test_resolve_finds_the_size_by_name_and_ratio() -> None:
    parameters = resolve(WAN_14B, resolution="720p", aspect_ratio="9:16")

    assert (parameters.width, parameters.height) == (720, 1280)


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("fps", 15, (12, 16)),
        ("fps", 60, (30,)),
        ("num_inference_steps", 101, (100,)),
        ("guidance_scale", 0.5, (1.0,)),
        ("guidance_scale", 20.5, (20.0,)),
        ("flow_shift", 0.0, (1.0,)),
        ("flow_shift", -1e300, (1.0,)),
    ],
)
def test_resolve_names_the_nearest_bound(field: str, value: float, nearest: tuple[float, ...]) -> None:
    errors = refused(WAN_1_3B, **{field: value})

    assert set(errors) == {field}
    assert errors[field].nearest == nearest
    assert errors[field].legal is not None


def test_resolve_names_every_bad_field_at_once() -> None:
    errors = refused(num_frames=80, resolution="4k", fps=17, guidance_scale=100.0)

    assert set(errors) == {"num_frames", "resolution", "fps", "guidance_scale"}


def test_resolve_draws_a_seed_where_none_is_given() -> None:
    request = GenerateRequest(prompt="a")

    assert WAN_TINY.resolve(request, draw_seed=lambda: 1234).seed == 1234
    seeds = {WAN_TINY.resolve(request).seed for _ in range(20)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**DRAWN_SEED_BITS for seed in seeds)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_legal_says_what_every_bounded_field_may_hold(profile: ModelProfile) -> None:
    assert all(profile.legal(field) for field in BOUNDED)
    assert profile.legal("prompt") is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(4, (5,)), (5, (5, 9)), (7, (5, 9)), (13, (13,)), (99, (13,)), (float("inf"), (13,))],
)
def test_nearest_values_are_the_legal_neighbours(value: float, expected: tuple[int, ...]) -> None:
    assert nearest_values(value, (13, 5, 9)) == expected


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_guidance_is_off_at_a_scale_of_one(scale: float) -> None:
    assert resolve(guidance_scale=scale).does_guidance == (scale > 1)


sizes: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {},
        optional={
            "resolution": st.sampled_from(["64p", "128p", "480p", "720p", "4k"]),
            "aspect_ratio": st.sampled_from(["1:1", "16:9", "9:16", "4:3"]),
        },
    ),
    st.fixed_dictionaries(
        {
            "width": st.sampled_from([64, 112, 480, 832, 1280, 100, MAX_SEED]),
            "height": st.sampled_from([64, 112, 480, 832, 720, 100, 1]),
        }
    ),
)
lengths: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"num_frames": st.integers(1, 100) | st.integers(1, MAX_SEED)}),
    st.fixed_dictionaries(
        {
            "duration": st.floats(0, 8, exclude_min=True)
            | st.integers(0, 90).map(lambda n: (n + 1) / 16)
            | st.floats(min_value=0, exclude_min=True, allow_infinity=False)
        }
    ),
)
numbers = st.fixed_dictionaries(
    {},
    optional={
        "fps": st.sampled_from([8, 12, 16, 24, 30, 15, 1, MAX_SEED]),
        "seed": st.integers(0, MAX_SEED),
        "num_inference_steps": st.integers(1, 120) | st.integers(1, MAX_SEED),
        "guidance_scale": st.floats(0, 25) | st.floats(allow_nan=False, allow_infinity=False),
        "flow_shift": st.floats(0, 25) | st.floats(allow_nan=False, allow_infinity=False),
    },
)


@given(profile=st.sampled_from(list(PROFILES.values())), size=sizes, length=lengths, rest=numbers)
def test_resolve_accepts_the_legal_and_refuses_the_rest_by_name(
    profile: ModelProfile, size: dict[str, Any], length: dict[str, Any], rest: dict[str, Any]
) -> None:
    asked = {**size, **length, **rest}
    request = GenerateRequest.model_validate({"prompt": "a", **asked})

    outcome = _resolve_or_refuse(profile, request)
    if isinstance(outcome, InvalidRequest):
        assert outcome.errors
        for error in outcome.errors:
            _check_refusal(profile, error)
    else:
        _check_obeys(profile, outcome)
        for field, value in asked.items():  # nothing was corrected
            if field == "duration":
                assert outcome.duration == pytest.approx(value, abs=1e-6)
            elif field not in {"resolution", "aspect_ratio"}:
                assert getattr(outcome, field) == value


def _resolve_or_refuse(profile: ModelProfile, request: GenerateRequest) -> GenerationParameters | InvalidRequest:
    try:
        return profile.resolve(request)
    except InvalidRequest as refusal:
        return refusal


def _check_refusal(profile: ModelProfile, error: FieldError) -> None:
    """It names the field and what is legal; a value that it calls the nearest is legal itself."""
    assert error.field in BOUNDED
    assert error.legal
    assert error.legal == profile.legal(error.field)
    assert error.legal in error.message
    if error.field not in {"resolution", "aspect_ratio", "width", "height", "duration"}:
        assert error.nearest
        for value in error.nearest:
            request = GenerateRequest.model_validate({"prompt": "a", error.field: value})
            assert isinstance(_resolve_or_refuse(profile, request), GenerationParameters)


def _check_obeys(profile: ModelProfile, parameters: GenerationParameters) -> None:
    assert (parameters.width, parameters.height) in {(r.width, r.height) for r in profile.resolutions}
    assert (parameters.num_frames - 1) % 4 == 0
    assert profile.min_num_frames <= parameters.num_frames <= profile.max_num_frames
    assert parameters.fps in profile.fps
    assert 1 <= parameters.num_inference_steps <= profile.max_num_inference_steps
    assert profile.min_guidance_scale <= parameters.guidance_scale <= profile.max_guidance_scale
    assert profile.min_flow_shift <= parameters.flow_shift <= profile.max_flow_shift
    assert 0 <= parameters.seed <= MAX_SEED
