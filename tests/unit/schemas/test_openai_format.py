"""The OpenAI Videos wire format."""

from schemas.jobs import JobState, Progress
from schemas.openai_videos import STATUS_OF, VIDEO_NUMBERS, VideoCreate, _percent


def test_the_numbers_are_all_of_the_fields_that_are_numbers() -> None:
    fields = VideoCreate.model_json_schema()["properties"]
    kinds = {name: {kind["type"] for kind in field.get("anyOf", [field])} for name, field in fields.items()}

    assert {name for name, kind in kinds.items() if kind & {"integer", "number"}} == VIDEO_NUMBERS
    assert "input_reference" not in fields


def test_every_state_has_a_status() -> None:
    assert STATUS_OF.keys() == set(JobState)
    assert set(STATUS_OF.values()) == {"queued", "in_progress", "completed", "failed"}


def test_progress_rises_through_both_stages_and_is_100_only_at_the_end() -> None:
    stages = [Progress(stage="denoise", step=step, steps=50, seconds_left=None) for step in range(51)]
    stages += [Progress(stage="decode", step=step, steps=21, seconds_left=None) for step in range(22)]
    percents = [_percent(JobState.RUNNING, progress) for progress in stages]

    assert percents == sorted(percents)
    assert (percents[0], percents[50], percents[-1]) == (0, 90, 99)
    assert _percent(JobState.SUCCEEDED, None) == 100
    assert _percent(JobState.QUEUED, stages[-1]) == _percent(JobState.FAILED, stages[-1]) == 0
