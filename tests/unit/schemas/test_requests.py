"""GenerateRequest by itself: what it refuses before any profile has a say."""

import json
from datetime import timedelta
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from schemas.requests import (
    MAX_DEADLINE_S,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_URL_TTL_S,
    GenerateRequest,
    GenerationParameters,
    url_ttl,
)

HUGE = 10**400
"""An integer that JSON may hold and no float can."""

INTS = ["num_frames", "width", "height", "fps", "seed", "num_inference_steps", "url_ttl_s"]
FLOATS = ["duration", "guidance_scale", "flow_shift", "deadline_s"]


def refusals(document: dict[str, Any]) -> dict[str, str]:
    """Field -> pydantic's type of mistake, as FastAPI would validate a parsed JSON body."""
    with pytest.raises(ValidationError) as caught:
        GenerateRequest.model_validate(document)
    return {".".join(map(str, mistake["loc"])): mistake["type"] for mistake in caught.value.errors()}


def a_request(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a red circle", **fields}


@pytest.mark.parametrize(
    ("prompt", "mistake"),
    [
        ("", "string_too_short"),
        (" \t\r\n\u00a0\u2003 ", "string_too_short"),
        ("x" * (MAX_PROMPT_CHARS + 1), "string_too_long"),
        ("a\x00b", "value_error"),
        ("\x00", "value_error"),
        ("a \ud800 b", "string_unicode"),
        (5, "string_type"),
        (None, "string_type"),
        (True, "string_type"),
        (["a"], "string_type"),
        ({"text": "a"}, "string_type"),
        (b"bytes", "string_type"),
    ],
)
def test_request_refuses_a_bad_prompt(prompt: object, mistake: str) -> None:
    assert refusals({"prompt": prompt}) == {"prompt": mistake}


def test_request_refuses_a_missing_prompt() -> None:
    assert refusals({}) == {"prompt": "missing"}


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("x" * (MAX_PROMPT_CHARS + 1), "string_too_long"),
        ("\x00", "value_error"),
        ("\udfff", "string_unicode"),
    ],
)
def test_request_refuses_a_bad_negative_prompt(text: str, mistake: str) -> None:
    assert refusals(a_request(negative_prompt=text)) == {"negative_prompt": mistake}


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "resolution"])
def test_the_document_allows_the_white_space_that_is_trimmed(field: str) -> None:
    body = {"prompt": "a", field: " " * 3_000 + "64p"}

    jsonschema.validate(body, GenerateRequest.model_json_schema())
    assert getattr(GenerateRequest.model_validate(body), field) == "64p"


def test_request_trims_the_prompt_before_it_counts() -> None:
    request = GenerateRequest(prompt="  " + "x" * MAX_PROMPT_CHARS + "\n")

    assert request.prompt == "x" * MAX_PROMPT_CHARS


def test_request_takes_an_empty_negative_prompt() -> None:
    assert GenerateRequest(prompt="a", negative_prompt="").negative_prompt == ""


def test_request_takes_whole_characters_beyond_the_basic_plane() -> None:
    assert GenerateRequest(prompt="🦦" * MAX_PROMPT_CHARS).prompt == "🦦" * MAX_PROMPT_CHARS


@pytest.mark.parametrize("field", INTS)
@pytest.mark.parametrize("value", ["5", 5.0, 5.5, True, False, [5], {}])
def test_request_refuses_anything_but_an_integer(field: str, value: object) -> None:
    assert set(refusals(a_request(**{field: value}))) == {field}


@pytest.mark.parametrize("field", INTS)
@pytest.mark.parametrize("value", [-1, MAX_SEED + 1, HUGE, -HUGE], ids=["-1", "2**53", "10**400", "-10**400"])
def test_request_refuses_an_integer_that_is_negative_or_not_exact_in_json(field: str, value: int) -> None:
    assert set(refusals(a_request(**{field: value}))) == {field}


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", ["5", True, False, [5.0], {}, pytest.param(HUGE, id="10**400")])
def test_request_refuses_anything_but_a_number(field: str, value: object) -> None:
    assert set(refusals(a_request(**{field: value}))) == {field}


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_request_refuses_a_number_that_is_not_finite(field: str, text: str) -> None:
    document = json.loads(f'{{"prompt": "a", "{field}": {text}}}')

    assert refusals(document) == {field: "finite_number"}


@pytest.mark.parametrize("field", FLOATS)
def test_request_takes_a_whole_number_for_a_float(field: str) -> None:
    value = getattr(GenerateRequest.model_validate(a_request(**{field: 2})), field)

    assert value == 2.0
    assert type(value) is float


@pytest.mark.parametrize("duration", [0, 0.0, -1, -0.5])
def test_request_refuses_a_duration_that_is_not_positive(duration: float) -> None:
    assert refusals(a_request(duration=duration)) == {"duration": "greater_than"}


@pytest.mark.parametrize("field", ["num_frames", "width", "height", "fps", "num_inference_steps", "url_ttl_s"])
def test_request_refuses_zero(field: str) -> None:
    assert set(refusals(a_request(**{field: 0}))) == {field}


@pytest.mark.parametrize("seed", [0, MAX_SEED])
def test_request_takes_a_seed_at_either_bound(seed: int) -> None:
    assert GenerateRequest(prompt="a", seed=seed).seed == seed


def test_request_refuses_a_url_that_lives_longer_than_s3_allows() -> None:
    assert set(refusals(a_request(url_ttl_s=MAX_URL_TTL_S + 1))) == {"url_ttl_s"}


@pytest.mark.parametrize("value", [1, 0, "true", "yes", []])
def test_request_refuses_anything_but_a_boolean_for_reproducible(value: object) -> None:
    assert refusals(a_request(reproducible=value)) == {"reproducible": "bool_type"}


@pytest.mark.parametrize("value", ["", "HIGH", "urgent", 1, None, True, ["high"]])
def test_request_refuses_anything_but_a_class_for_priority(value: object) -> None:
    assert refusals(a_request(priority=value)) == {"priority": "literal_error"}


@pytest.mark.parametrize("value", [0, -1.5, MAX_DEADLINE_S + 1])
def test_request_refuses_a_deadline_that_is_over_or_too_far_off(value: float) -> None:
    assert set(refusals(a_request(deadline_s=value))) == {"deadline_s"}


def test_whose_turn_it_is_does_not_belong_to_what_the_output_depends_on() -> None:
    assert {"priority", "deadline_s"}.isdisjoint(GenerationParameters.model_fields)


@pytest.mark.parametrize("field", ["resolution", "aspect_ratio"])
@pytest.mark.parametrize("value", ["", "x" * 17, 480, True, "\ud800"])
def test_request_refuses_a_bad_name(field: str, value: object) -> None:
    assert set(refusals(a_request(**{field: value}))) == {field}


@pytest.mark.parametrize("field", ["frames", "Prompt", "n", "image", "__class__", ""])
def test_request_refuses_an_unknown_field(field: str) -> None:
    assert refusals(a_request(**{field: 1})) == {field: "extra_forbidden"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"duration": 1.0, "num_frames": 17}, "duration or num_frames, not both"),
        ({"width": 64}, "width and height go together"),
        ({"height": 64}, "width and height go together"),
        ({"width": 64, "height": 64, "resolution": "64p"}, "not both"),
        ({"width": 64, "height": 64, "aspect_ratio": "1:1"}, "not both"),
    ],
)
def test_request_refuses_two_ways_to_say_one_thing(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        GenerateRequest.model_validate(a_request(**fields))


@pytest.mark.parametrize("body", [None, [], "prompt", 5, [{"prompt": "a"}]])
def test_request_refuses_anything_but_an_object(body: object) -> None:
    with pytest.raises(ValidationError):
        GenerateRequest.model_validate(body)


def test_request_can_not_be_changed() -> None:
    request = GenerateRequest(prompt="a")

    with pytest.raises(ValidationError, match="frozen"):
        request.prompt = "b"  # type: ignore[misc]  # that it is refused is the point


def test_request_examples_are_valid() -> None:
    examples = GenerateRequest.model_json_schema()["examples"]

    assert len(examples) >= 1
    for example in examples:
        GenerateRequest.model_validate(example)


def test_url_ttl_is_the_requests_own_else_the_default() -> None:
    default = timedelta(hours=1)

    assert url_ttl(GenerateRequest(prompt="a"), default) == default
    assert url_ttl(GenerateRequest(prompt="a", url_ttl_s=5), default) == timedelta(seconds=5)
