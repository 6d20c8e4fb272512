"""LoRA adapters in a request, against a profile's list."""

from typing import Any

import pytest
from pydantic import ValidationError
from random_wan import RANDOM_WAN

from schemas.errors import FieldError, InvalidRequest
from schemas.loras import AppliedLora, Lora
from schemas.model_profile import ModelProfile
from schemas.requests import GenerateRequest, GenerationParameters

PROFILE = RANDOM_WAN.model_copy(update={"loras": {"style": Lora(weight=0.8), "motion": Lora(), "distilled": Lora()}})
ALWAYS = PROFILE.model_copy(
    update={
        "defaults": PROFILE.defaults.model_copy(update={"loras": (AppliedLora(name="distilled", weight=1.0),)}),
    }
)


def resolve(profile: ModelProfile, loras: Any) -> GenerationParameters:
    return profile.resolve(GenerateRequest.model_validate({"prompt": "a", "seed": 1, "loras": loras}))


def chosen(profile: ModelProfile, loras: Any) -> dict[str, float]:
    return {lora.name: lora.weight for lora in resolve(profile, loras).loras}


@pytest.mark.parametrize(
    ("asked", "effective"),
    [
        (None, {}),
        ([], {}),
        ([{"name": "style"}], {"style": 0.8}),
        ([{"name": "style", "weight": -2}, {"name": "motion", "weight": 0.5}], {"motion": 0.5, "style": -2.0}),
        ([{"name": "style", "weight": 0}], {}),
    ],
)
def test_a_request_gets_the_adapters_that_it_names(asked: Any, effective: dict[str, float]) -> None:
    assert chosen(PROFILE, asked) == effective


@pytest.mark.parametrize(
    ("asked", "effective"),
    [
        (None, {"distilled": 1.0}),
        ([], {"distilled": 1.0}),
        ([{"name": "style"}], {"distilled": 1.0, "style": 0.8}),
        ([{"name": "distilled", "weight": 0.5}], {"distilled": 0.5}),
        ([{"name": "distilled", "weight": 0}], {}),
    ],
)
def test_a_profile_s_own_adapters_stay_unless_a_request_weighs_them_otherwise(
    asked: Any, effective: dict[str, float]
) -> None:
    assert chosen(ALWAYS, asked) == effective


def test_the_order_in_a_request_is_no_matter() -> None:
    both = [{"name": "style"}, {"name": "motion"}]

    assert resolve(PROFILE, both) == resolve(PROFILE, both[::-1])


def test_an_unknown_name_is_refused_with_the_ones_that_there_are() -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve(PROFILE, [{"name": "style"}, {"name": "other"}])

    legal = "up to 4 of style, motion, distilled, weights from -2 to 2"
    message = f"wan-random has no 'other'; legal: {legal}"
    assert refused.value.errors == (FieldError(field="loras", message=message, legal=legal),)


def test_a_profile_without_adapters_says_so() -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolve(RANDOM_WAN, [{"name": "style"}])

    assert [error.message for error in refused.value.errors] == ["wan-random has no 'style'; legal: none"]


@pytest.mark.parametrize(
    "asked",
    [
        [{"name": "style", "weight": 2.1}],
        [{"name": "style", "weight": float("nan")}],
        [{"name": "style", "weight": "1"}],
        [{"name": "style", "weight": True}],
        [{"name": ""}],
        [{"name": "s" * 65}],
        [{"name": "style", "path": "/etc/passwd"}],
        [{"name": "style"}, {"name": "style", "weight": 0.5}],
        [{"name": name} for name in "abcde"],
        [{}],
        ["style"],
        {"name": "style"},
        "style",
    ],
    ids=str,
)
def test_what_is_no_choice_of_adapters_is_refused(asked: Any) -> None:
    with pytest.raises(ValidationError):
        GenerateRequest.model_validate({"prompt": "a", "loras": asked})


def test_a_profile_s_own_adapters_are_of_its_list() -> None:
    with pytest.raises(ValidationError, match=r"defaults\.loras names distilled, which loras lacks"):
        ModelProfile.model_validate(ALWAYS.model_dump() | {"loras": {}})


@pytest.mark.parametrize("name", ["", "Style", "a/b", "../a", "a b", ".a", "ä"])
def test_a_name_is_one_that_folders_and_variables_can_have(name: str) -> None:
    with pytest.raises(ValidationError):
        ModelProfile.model_validate(PROFILE.model_dump() | {"loras": {name: {}}})


def test_parameters_on_record_from_before_adapters_have_none() -> None:
    recorded = resolve(PROFILE, None).model_dump(mode="json", exclude={"loras"})

    assert GenerationParameters.model_validate(recorded) == resolve(PROFILE, None)
