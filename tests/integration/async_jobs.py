"""Jobs over plain HTTP: submitted without waiting, and followed by their events."""

from collections.abc import Iterator
from typing import Any

import httpx

from schemas.jobs import Job

PROMPT = "a red circle moving left"
ASYNC = {"Prefer": "respond-async"}


def submit(http: httpx.Client, key: str | None = None, **fields: Any) -> Job:
    headers = ASYNC | ({"Idempotency-Key": key} if key else {})
    answer = http.post("/generate", json={"prompt": PROMPT, **fields}, headers=headers)
    assert answer.status_code == 202, answer.text
    return Job.model_validate_json(answer.content)


def events(http: httpx.Client, job_id: str) -> Iterator[Job]:
    with http.stream("GET", f"/jobs/{job_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield Job.model_validate_json(line.removeprefix("data: "))
