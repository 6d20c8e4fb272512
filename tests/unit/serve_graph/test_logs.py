"""Lines of the log: their form, and what may never be in one."""

import io
import json
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray._common.formatters import JSONFormatter
from ray.exceptions import RayTaskError

from schemas.clips import Timings
from schemas.errors import FieldError, InvalidRequest, PromptTooLong, RecordedFailure, RenderFailed, StoreFull
from schemas.jobs import JobState
from schemas.requests import GenerateRequest, GenerationParameters
from serve_graph.logs import (
    FOREIGN_LOGGERS,
    LOGGER_NAME,
    MAX_FRAMES,
    REDACTED,
    configure_logging,
    log_event,
    log_failure,
    log_job,
    log_request,
)

PROMPT = "a secret otter in a red boat"
NEGATIVE = "blurry walrus"
PARAMETERS = GenerationParameters(
    prompt=PROMPT,
    negative_prompt=NEGATIVE,
    width=64,
    height=64,
    num_frames=17,
    fps=16,
    seed=7,
    num_inference_steps=12,
    guidance_scale=2.0,
    flow_shift=3.0,
    reproducible=False,
)

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def untouched_logger() -> Iterator[None]:
    """Puts the loggers back as they were before the test."""
    logger = logging.getLogger(LOGGER_NAME)
    before = (logger.handlers[:], logger.level, logger.propagate)
    filters = {name: logging.getLogger(name).filters[:] for name in FOREIGN_LOGGERS}
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
    for name, were in filters.items():
        logging.getLogger(name).filters[:] = were


@pytest.fixture
def stream() -> io.StringIO:
    stream = io.StringIO()
    configure_logging(stream, deployment="Ingress", replica="i1")
    return stream


@pytest.fixture
def lines(stream: io.StringIO) -> Lines:
    """What was logged since the test began, each line parsed by a strict JSON parser."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return lambda: [json.loads(line, parse_constant=refuse) for line in stream.getvalue().split("\n")[:-1]]


def fail_with(error: BaseException) -> BaseException:
    """`error` as it looks once caught: with a frame, in which a local holds the prompt."""
    prompt = PROMPT
    try:
        raise error
    except type(error) as caught:
        assert prompt
        return caught


def log_one_job(state: JobState, **fields: Any) -> None:
    log_job(
        request_id="req_1",
        job_id="job_1",
        state=state,
        duration_s=61.5,
        prompt_hash="00ff00ff00ff00ff",
        parameters=PARAMETERS,
        **fields,
    )


def test_log_request_writes_every_field_of_a_request(lines: Lines) -> None:
    log_request(
        request_id="req_1",
        job_id="job_1",
        method="POST",
        route="/generate",
        status=200,
        duration_s=61.5,
        prompt_hash="00ff00ff00ff00ff",
        parameters=PARAMETERS,
    )
    (line,) = lines()
    assert datetime.now(UTC).timestamp() - datetime.fromisoformat(line.pop("time")).timestamp() < 60
    assert line == {
        "level": "info",
        "deployment": "Ingress",
        "replica": "i1",
        "event": "request",
        "request_id": "req_1",
        "job_id": "job_1",
        "method": "POST",
        "route": "/generate",
        "status": 200,
        "duration_s": 61.5,
        "prompt_hash": "00ff00ff00ff00ff",
        "parameters": {
            "width": 64,
            "height": 64,
            "num_frames": 17,
            "fps": 16,
            "seed": 7,
            "num_inference_steps": 12,
            "guidance_scale": 2.0,
            "flow_shift": 3.0,
            "reproducible": False,
            "preset": "exact",
            "loras": [],
        },
    }


def test_time_is_rfc_3339_utc_with_milliseconds(lines: Lines) -> None:
    log_event("ready")
    datetime.strptime(lines()[0]["time"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert len(lines()[0]["time"]) == len("2025-01-31T12:00:00.123Z")


@pytest.mark.parametrize(("status", "level"), [(200, "info"), (422, "info"), (500, "error"), (503, "error")])
def test_log_request_is_an_error_when_the_service_is_at_fault(lines: Lines, status: int, level: str) -> None:
    log_request(request_id="r", method="GET", route="/models", status=status, duration_s=0.1)
    assert lines()[0]["level"] == level


def test_log_request_without_a_route_says_unmatched_and_leaves_out_what_does_not_apply(lines: Lines) -> None:
    log_request(request_id="r", method="GET", route=None, status=404, duration_s=0.1, error="route-not-found")
    (line,) = lines()
    assert (line["route"], line["error"]) == ("unmatched", "route-not-found")
    assert not {"job_id", "prompt_hash", "parameters"} & line.keys()


def test_log_job_writes_the_end_of_a_job(lines: Lines) -> None:
    log_one_job(JobState.SUCCEEDED, timings=Timings(denoise=50, total=61.5))
    (line,) = lines()
    assert (line["event"], line["level"], line["state"]) == ("job", "info", "succeeded")
    assert (line["request_id"], line["job_id"], line["duration_s"]) == ("req_1", "job_1", 61.5)
    assert (line["prompt_hash"], line["parameters"]["seed"]) == ("00ff00ff00ff00ff", 7)
    assert line["timings"]["denoise"] == 50


def test_log_job_is_an_error_when_the_job_failed(lines: Lines) -> None:
    log_one_job(JobState.FAILED, error="out-of-memory")
    log_one_job(JobState.CANCELLED, error="job-cancelled")
    assert [(line["level"], line["error"]) for line in lines()] == [
        ("error", "out-of-memory"),
        ("info", "job-cancelled"),
    ]


def test_no_line_has_either_text_of_the_prompt(stream: io.StringIO, lines: Lines) -> None:
    log_request(request_id="r", method="POST", route="/generate", status=200, duration_s=1, parameters=PARAMETERS)
    log_one_job(JobState.SUCCEEDED)
    log_event("odd", request=GenerateRequest(prompt=PROMPT, negative_prompt=NEGATIVE), parameters=PARAMETERS)
    log_event("odd", prompt=PROMPT, nested=[{"raw-prompt": PROMPT, "prompts": [PROMPT]}])
    log_failure("render_failed", fail_with(ValueError(f"bad text {PROMPT}")))
    assert len(lines()) == 5
    assert "otter" not in stream.getvalue()
    assert "walrus" not in stream.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "X-Api-Key",
        "Authorization",
        "signature",
        "url_signature",
        "attempt_token",
        "query",
        "clip_key",
        "password",
    ],
)
def test_log_event_redacts_fields_by_their_name(lines: Lines, name: str) -> None:
    fields: dict[str, Any] = {name: "s3cr3t", "nested": {name: "s3cr3t"}}
    log_event("odd", **fields)
    (line,) = lines()
    assert (line[name], line["nested"]) == (REDACTED, {name: REDACTED})


@pytest.mark.parametrize("name", ["prompt_hash", "prompt_tokens", "max_tokens", "keyword", "num_keyframes"])
def test_log_event_keeps_fields_that_only_sound_private(lines: Lines, name: str) -> None:
    log_event("fine", **{name: 17})
    assert lines()[0][name] == 17


@pytest.mark.parametrize(
    ("text", "logged"),
    [
        ("GET /outputs/c/x.mp4?sig=abc&exp=1 done", f"GET /outputs/c/x.mp4?{REDACTED} done"),
        ("https://s3.test/b/k?X-Amz-Signature=abc", f"https://s3.test/b/k?{REDACTED}"),
        ("https://user:pass@s3.test/bucket", f"https://{REDACTED}@s3.test/bucket"),
        ("http://127.0.0.1:8000/docs", "http://127.0.0.1:8000/docs"),
        ("ready? yes", "ready? yes"),
    ],
)
def test_log_event_redacts_query_strings_and_credentials_in_texts(lines: Lines, text: str, logged: str) -> None:
    log_event("odd", where=text, nested=[text])
    assert (lines()[0]["where"], lines()[0]["nested"]) == (logged, [logged])


def test_log_failure_gives_type_and_frames_but_no_message_source_or_locals(stream: io.StringIO, lines: Lines) -> None:
    log_failure("job_failed", fail_with(ValueError(PROMPT)), job_id="job_1")
    (line,) = lines()
    assert (line["exc_type"], line["level"], line["job_id"]) == ("ValueError", "error", "job_1")
    first, frame = line["traceback"].split("\n")
    assert first == "ValueError"
    assert __file__ in frame
    assert frame.endswith(" in fail_with")
    assert "otter" not in stream.getvalue()


def test_log_failure_shows_what_an_error_was_raised_from(stream: io.StringIO, lines: Lines) -> None:
    def put() -> None:
        try:
            raise OSError(28, f"No space left for {PROMPT}", "/data/otter.mp4")
        except OSError as exc:
            raise StoreFull from exc

    with pytest.raises(StoreFull) as caught:
        put()
    log_failure("upload_failed", caught.value)
    (line,) = lines()
    assert (line["exc_type"], line["error"]) == ("schemas.errors.StoreFull", "store-full")
    assert line["detail"] == "there is no space left for the clip"
    assert [text for text in line["traceback"].split("\n") if not text.startswith(" ")] == [
        "schemas.errors.StoreFull",
        "OSError [ENOSPC]",
    ]
    assert "otter" not in stream.getvalue()


def test_log_failure_shows_the_members_of_a_group_and_ends_on_a_cycle(lines: Lines) -> None:
    first, second = KeyError("a"), TypeError("b")
    first.__context__, second.__context__ = second, first
    log_failure("stopped", ExceptionGroup("g", [first, second]))
    assert lines()[0]["traceback"].split("\n") == ["ExceptionGroup", "KeyError", "TypeError"]


def test_log_failure_names_a_refusal_without_its_detail(stream: io.StringIO, lines: Lines) -> None:
    refusal = InvalidRequest([FieldError(field="resolution", message=f"{PROMPT!r} is not one of wan-tiny")])
    log_failure("refused", refusal)
    log_failure("refused", RecordedFailure(refusal.problem()))
    assert [(line["error"], "detail" in line) for line in lines()] == [("invalid-request", False)] * 2
    assert "otter" not in stream.getvalue()


def test_log_failure_looks_inside_an_error_that_ray_wrapped(stream: io.StringIO, lines: Lines) -> None:
    for cause in (PromptTooLong("prompt", 600, 512), RenderFailed("the encoder failed"), ValueError(PROMPT)):
        task_error: Any = RayTaskError
        wrapped = task_error("generate", f"Traceback: {cause} {PROMPT}", cause).as_instanceof_cause()
        log_failure("job_failed", fail_with(wrapped))
    logged = [(line["exc_type"].rpartition(".")[2], line.get("error"), line.get("detail")) for line in lines()]
    assert logged == [
        ("PromptTooLong", "prompt-too-long", None),
        ("RenderFailed", "render-failed", "the encoder failed"),
        ("ValueError", None, None),
    ]
    assert "otter" not in stream.getvalue()


def test_log_failure_bounds_the_frames_of_a_runaway_recursion(lines: Lines) -> None:
    def recurse() -> None:
        recurse()

    with pytest.raises(RecursionError) as caught:
        recurse()
    log_failure("job_failed", caught.value)
    assert lines()[0]["traceback"].count("\n") == MAX_FRAMES


def test_log_failure_ignores_fields_that_claim_its_own_names(lines: Lines) -> None:
    log_failure("job_failed", ValueError(), exc_type="mine", traceback="mine")
    assert (lines()[0]["exc_type"], lines()[0]["traceback"]) == ("ValueError", "ValueError")


def test_one_event_is_one_line_whatever_its_values_hold(stream: io.StringIO, lines: Lines) -> None:
    text = "a\nb\r\nc\u2028d\x85e\x00f\ud800"
    fields: dict[str, Any] = {"text": text, "na\nme": {text: text}}
    log_event("odd", **fields)
    assert len(stream.getvalue().splitlines()) == 1
    assert (lines()[0]["text"], lines()[0]["na\nme"]) == (text, {text: text})


def test_log_event_writes_plain_data_as_such(lines: Lines) -> None:
    log_event(
        "odd",
        path=Path("/tmp/x"),  # noqa: S108  # only a text here
        at=datetime(2025, 1, 31, tzinfo=UTC),
        state=JobState.RUNNING,
        small=np.float32(0.5),
        count=np.int64(3),
        flag=True,
        items=(1, frozenset({2})),
        model=Timings(total=2.0),
        by_number={1: "a", JobState.QUEUED: "b"},
        absent=None,
    )
    (line,) = lines()
    assert (line["path"], line["at"], line["state"]) == ("/tmp/x", "2025-01-31T00:00:00+00:00", "running")  # noqa: S108  # only a text here
    assert (line["small"], line["count"], line["flag"], line["items"]) == (0.5, 3, True, [1, [2]])
    assert line["model"]["total"] == 2.0
    assert line["by_number"] == {"1": "a", "queued": "b"}
    assert "absent" not in line


def test_log_event_shows_only_the_type_of_what_is_not_plain_data(stream: io.StringIO, lines: Lines) -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError(PROMPT)

    class Wrapped(Enum):
        ITEM = Hostile()

    log_event("odd", a=Hostile(), b=PROMPT.encode(), c=np.zeros(3), d=10**400, e=ValueError(PROMPT), f=Wrapped.ITEM)
    (line,) = lines()
    assert [line[name] for name in "abcdef"] == [
        *("<Hostile>", "<bytes>", "<ndarray>", "<int>", "<ValueError>", "<Hostile>")
    ]
    assert "otter" not in stream.getvalue()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_log_event_writes_numbers_that_json_lacks_as_text(lines: Lines, number: float) -> None:
    log_event("odd", number=number)
    assert lines()[0]["number"] == str(number)


def test_log_event_survives_a_cycle(lines: Lines) -> None:
    cycle: list[object] = []
    cycle.append(cycle)
    log_event("odd", cycle=cycle)
    assert "<list>" in json.dumps(lines()[0]["cycle"])


@given(
    fields=st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_log_event_writes_one_object_for_any_fields(fields: dict[str, object]) -> None:
    stream = io.StringIO()
    configure_logging(stream)
    log_event("odd", facts=fields)
    assert stream.getvalue().count("\n") == 1
    assert json.loads(stream.getvalue())["event"] == "odd"


def test_log_event_keeps_the_lines_own_fields(lines: Lines) -> None:
    log_event("odd", time="never", deployment="Other", replica="o9")
    (line,) = lines()
    assert line["time"] != "never"
    assert (line["deployment"], line["replica"]) == ("Ingress", "i1")


def test_configure_logging_leaves_out_an_unnamed_deployment() -> None:
    stream = io.StringIO()
    configure_logging(stream)
    log_event("started")
    assert json.loads(stream.getvalue()).keys() == {"time", "level", "event"}


def test_configure_logging_again_replaces_the_stream(stream: io.StringIO) -> None:
    second = io.StringIO()
    configure_logging(second)
    log_event("ready")
    assert stream.getvalue() == ""
    assert second.getvalue().count("\n") == 1


def test_configure_logging_hides_lower_levels() -> None:
    stream = io.StringIO()
    configure_logging(stream, "warning")
    log_event("started")
    log_event("slow", level=logging.WARNING)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["slow"]


def test_configure_logging_refuses_an_unknown_level() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        configure_logging(io.StringIO(), "loud")


@pytest.mark.parametrize("other", ["", "ray", "ray.serve"])
def test_lines_reach_no_other_loggers_handlers(stream: io.StringIO, other: str) -> None:
    elsewhere = io.StringIO()
    handler = logging.StreamHandler(elsewhere)
    logging.getLogger(other).addHandler(handler)
    log_event("ready")
    logging.getLogger("wan.engine").warning("free-form")
    logging.getLogger(other).removeHandler(handler)
    assert elsewhere.getvalue() == ""
    assert stream.getvalue().count("\n") == 2


def test_a_free_form_record_below_wan_shows_its_template_only(stream: io.StringIO, lines: Lines) -> None:
    try:
        raise ValueError(PROMPT)
    except ValueError:
        logging.getLogger("wan.engine").exception("can't encode %s", PROMPT)
    (line,) = lines()
    assert (line["event"], line["logger"], line["message"]) == ("message", "wan.engine", "can't encode %s")
    assert (line["level"], line["exc_type"]) == ("error", "ValueError")
    assert "otter" not in stream.getvalue()


@pytest.mark.parametrize("formatter", [logging.Formatter(), JSONFormatter()])
@pytest.mark.parametrize("other", FOREIGN_LOGGERS)
def test_other_loggers_show_our_traceback_of_an_exception_and_not_its_message(
    stream: io.StringIO, other: str, formatter: logging.Formatter
) -> None:
    elsewhere = io.StringIO()
    handler = logging.StreamHandler(elsewhere)
    handler.setFormatter(formatter)
    logger = logging.getLogger(other)
    logger.addHandler(handler)
    logger.error("Request failed.", exc_info=fail_with(ValueError(PROMPT)))
    logger.removeHandler(handler)
    assert "Request failed." in elsewhere.getvalue()
    assert re.search(r"ValueError(\n|\\n)  \S+test_logs\.py:\d+ in fail_with", elsewhere.getvalue())
    assert "otter" not in elsewhere.getvalue()


def test_lines_go_to_the_first_stderr_though_sys_stderr_was_swapped() -> None:
    program = (
        "import io, sys; sys.stderr = io.StringIO()\n"
        "from serve_graph.logs import configure_logging, log_event\n"
        "configure_logging(); log_event('ready')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stderr)["event"] == "ready"


def test_logs_import_neither_ray_nor_torch() -> None:
    program = "import sys, serve_graph.logs; print(sorted({'ray', 'torch', 'fastapi'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_logging_changes_no_error_that_still_crosses_a_handle(stream: io.StringIO) -> None:
    failure = fail_with(StoreFull())
    log_failure("upload_failed", failure)
    assert pickle.loads(pickle.dumps(failure)).args == failure.args  # noqa: S301  # our own bytes
