"""The error tree: its drawing, its names, its form on the wire and over a handle."""

import pickle
import re
from collections.abc import Iterator

import pytest

import schemas.errors
from schemas.errors import (
    PROBLEM_TYPE_PREFIX,
    BatchGone,
    BatchNotFound,
    BodyTooLarge,
    ClipGone,
    ClipNotFound,
    DeadlineExceeded,
    FieldError,
    Forbidden,
    IdempotencyMismatch,
    InternalError,
    InvalidRequest,
    JobCancelled,
    JobGone,
    JobNotEnded,
    JobNotFound,
    MethodNotAllowed,
    ModelNotReady,
    OutOfMemory,
    Problem,
    PromptTooLong,
    QueueFull,
    QuotaExceeded,
    RangeNotSatisfiable,
    RateLimited,
    RecordedFailure,
    RenderFailed,
    RouteNotFound,
    RunTimeExceeded,
    ShuttingDown,
    StoreFull,
    StoreUnavailable,
    Unauthorized,
    Unavailable,
    UrlExpired,
    UrlInvalid,
    WanError,
    WorkerLost,
)

FIELD_ERROR = FieldError(field="num_frames", message="80 is not legal", legal="4k+1", nearest=(77, 81))
RECORDED = StoreFull().problem(request_id="recorded", job_id="job_1")

SAMPLES = [
    WanError("a detail"),
    InvalidRequest([FIELD_ERROR]),
    PromptTooLong("prompt", 600, 512),
    Unauthorized(),
    Forbidden(),
    RouteNotFound("a detail"),
    MethodNotAllowed("a detail"),
    ClipNotFound(),
    JobNotFound(),
    BatchGone(),
    BatchNotFound(),
    ClipGone(),
    JobGone(),
    JobNotEnded(),
    IdempotencyMismatch(),
    RunTimeExceeded(3600.0),
    BodyTooLarge(65_536),
    UrlInvalid(),
    UrlExpired(),
    RangeNotSatisfiable(1_234),
    QueueFull(8, 30),
    QuotaExceeded(2, 30),
    QuotaExceeded(2, 30, "batches"),
    RateLimited(60, 30),
    JobCancelled(),
    Unavailable("a detail"),
    ModelNotReady("a detail", 7),
    ShuttingDown("a detail"),
    StoreUnavailable("a detail"),
    WorkerLost("a detail", 1),
    DeadlineExceeded(2.5),
    StoreFull(),
    OutOfMemory(),
    RenderFailed("a detail"),
    InternalError(),
    RecordedFailure(RECORDED),
]
DRAWN = re.compile(r"^    (?P<indent>[│ ]*)[├└]── (?P<cls>\w+) +(?P<status>\d{3}) +(?P<name>[a-z-]+)?", re.M)


def tree(root: type[WanError]) -> Iterator[type[WanError]]:
    """The classes of schemas.errors; other modules may add leaves of their own."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == schemas.errors.__name__:
            yield from tree(child)


def drawn_tree() -> dict[str, tuple[str, int, str | None]]:
    """Class name -> (parent, status, problem name), as the module's docstring draws it."""
    drawn: dict[str, tuple[str, int, str | None]] = {}
    path = ["WanError"]
    for match in DRAWN.finditer(schemas.errors.__doc__ or ""):
        depth = len(match["indent"]) // 4 + 1
        path[depth:] = [match["cls"]]
        drawn[match["cls"]] = (path[depth - 1], int(match["status"]), match["name"])
    return drawn


def test_samples_cover_every_class_of_the_tree() -> None:
    assert {type(sample) for sample in SAMPLES} == set(tree(WanError))


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_error_survives_pickling_with_all_it_says(error: WanError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes

    assert type(copy) is type(error)
    assert copy.args == error.args
    assert copy.problem("request-1", "job_1") == error.problem("request-1", "job_1")
    assert str(copy) == error.detail


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_problem_says_what_its_class_says(error: WanError) -> None:
    problem = error.problem(request_id="request-1", job_id="job_1")

    assert problem.request_id == "request-1"
    assert problem.job_id == "job_1"
    assert problem.type.startswith(PROBLEM_TYPE_PREFIX)
    assert 400 <= problem.status <= 599
    assert problem.detail
    if not isinstance(error, RecordedFailure):
        assert (problem.name, problem.title, problem.status) == (error.name, error.title, error.status)


def test_problem_names_are_unique() -> None:
    names = [cls.name for cls in tree(WanError) if "name" in vars(cls)]

    names.remove(InternalError.name)  # the root's own name, for whatever forgets to set one
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)


def test_every_class_but_a_recorded_failure_sets_its_own_name_title_and_status() -> None:
    for cls in set(tree(WanError)) - {RecordedFailure}:
        parent = cls.__mro__[1]
        assert {"name", "title"} <= vars(cls).keys(), cls
        assert "status" in vars(cls) or parent is Unavailable, cls


def test_docstring_draws_the_tree_as_it_is() -> None:
    drawn = drawn_tree()

    for cls in set(tree(WanError)) - {WanError}:
        assert cls.__name__ in drawn, f"{cls.__name__} is missing in the docstring"
        parent, status, name = drawn.pop(cls.__name__)
        assert parent == cls.__mro__[1].__name__, cls
        if cls is not RecordedFailure:
            assert status == cls.status, cls
            assert name in {cls.name, None}, cls
    assert drawn == {}, "the docstring draws classes that aren't there"


@pytest.mark.parametrize(
    ("error", "retry_after_s"),
    [(QueueFull(8, 30), 30), (ModelNotReady("loading"), 5), (WorkerLost("gone", 1), 1), (StoreFull(), None)],
)
def test_problem_says_when_to_come_back(error: WanError, retry_after_s: int | None) -> None:
    assert error.problem().retry_after_s == retry_after_s


def test_invalid_request_detail_names_every_field() -> None:
    error = InvalidRequest([FIELD_ERROR, FieldError(field="fps", message="7 is not offered")])

    assert error.detail == "num_frames: 80 is not legal; fps: 7 is not offered"


def test_prompt_too_long_names_both_numbers() -> None:
    error = PromptTooLong("negative_prompt", 600, 512)

    assert "600" in error.detail
    assert "512" in error.detail
    assert [field_error.field for field_error in error.errors] == ["negative_prompt"]


def test_deadline_exceeded_names_the_deadline() -> None:
    assert "2.5" in DeadlineExceeded(2.5).detail


def test_recorded_failure_answers_with_the_recorded_problem_under_the_new_request_id() -> None:
    problem = RecordedFailure(RECORDED).problem(request_id="now")

    assert problem == RECORDED.model_copy(update={"request_id": "now"})


def test_problem_round_trips_through_json() -> None:
    problem = InvalidRequest([FIELD_ERROR]).problem("request-1", "job_1")

    assert Problem.model_validate_json(problem.model_dump_json()) == problem
