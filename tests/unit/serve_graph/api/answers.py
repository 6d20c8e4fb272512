"""One assertion for every source of problem documents: their form, and that nothing of the inside is in one."""

from pathlib import Path

import httpx

from schemas.errors import PROBLEM_MEDIA_TYPE, PROBLEM_TYPE_PREFIX, Problem

INSIDE = (
    "Traceback",
    'File "',
    "site-packages",
    "/tmp",  # noqa: S108  # looked for, not used
    str(Path.home()),
    ".py",
    "jobs/job_",
    "clips/clip_",
    "pydantic",
    "starlette",
    "HTTPException",
    "0x7f",
)
"""What a client must never read."""


def problem_of(answer: httpx.Response, status: int, name: str) -> Problem:
    """The problem document of an answer, which is one and gives nothing away."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE
    problem = Problem.model_validate_json(answer.content)
    assert problem.type == PROBLEM_TYPE_PREFIX + name
    assert problem.status == status
    assert problem.title
    assert problem.detail
    assert problem.request_id == answer.headers["x-request-id"]
    assert problem.retry_after_s == (int(answer.headers["retry-after"]) if "retry-after" in answer.headers else None)
    assert_nothing_of_the_inside(answer)
    return problem


def assert_nothing_of_the_inside(answer: httpx.Response, *also: str | Path) -> None:
    """Neither the body nor a header has a path, a key, a module or a trace in it."""
    headers = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
    for word in (*INSIDE, *map(str, also)):
        assert word not in answer.text, word
        assert word not in headers, word
