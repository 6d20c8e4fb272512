"""What schemathesis can't know of this service; it imports this module by its name (`SCHEMATHESIS_HOOKS`)."""

import json
import os
import time
from functools import cache
from itertools import count, cycle
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import schemathesis

BASE_URL = "WAN_FUZZ_BASE_URL"
READ = ("GET /jobs/{job_id}/events", "POST /jobs/{job_id}/cancel", "GET /v1/videos/{video_id}")
CONTENT, DELETES = "GET /v1/videos/{video_id}/content", ("DELETE /jobs/{job_id}", "DELETE /v1/videos/{video_id}")
JOB, CLIP, CLIP_FILE = "GET /jobs/{job_id}", "GET /outputs/{clip_id}", "GET /outputs/{clip_id}/{name}"
CONDITIONS = (
    {},
    {"Range": "bytes=0-9"},
    {"Range": "bytes=999999999-"},
    {"Range": "bytes=9-0, x"},
    {"If-None-Match": "*"},
)

_cases = count()
_conditions = cycle(CONDITIONS)


def new_clip() -> dict[str, Any]:
    """A clip as `POST /generate` answered it."""
    url = f"{os.environ[BASE_URL]}/generate"
    while (answer := httpx.post(url, json={"prompt": "a red circle"}, timeout=60, trust_env=False)).status_code == 429:
        time.sleep(int(answer.headers["retry-after"]))  # what was generated before still runs
    clip: dict[str, Any] = answer.raise_for_status().json()
    return clip


@cache
def real_clip() -> dict[str, Any]:
    """One that nobody deletes."""
    return new_clip()


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Ask for what exists, and for parts of it, in every second case that has an id in its path."""
    label = case.operation.label
    known = (JOB, CLIP, CLIP_FILE, CONTENT, *READ, *DELETES)
    if label not in known or case.method != label.split()[0]:
        return
    spared = label in DELETES and real_clip()["job_id"] in (case.path_parameters or {}).values()  # it learns ids
    if next(_cases) % 2 and not spared:
        return
    clip = new_clip() if label in DELETES else real_clip()
    signed = urlsplit(clip["output_url"])
    real = {
        "job_id": clip["job_id"],
        "video_id": clip["job_id"],
        "clip_id": clip["clip_id"],
        "name": signed.path.split("/")[-1],
    }
    case.path_parameters = {name: real[name] for name in case.path_parameters or {}}
    if label == CLIP_FILE:
        case.query = dict(parse_qsl(signed.query))
        case.headers = {**(case.headers or {}), **next(_conditions)}


@schemathesis.serializer("application/x-ndjson")
def json_lines(context: schemathesis.SerializationContext, value: Any) -> bytes:
    """A text as it is; what is none, as one line of JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", errors="surrogatepass")


@schemathesis.check
def fails_only_as_documented(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """No 5xx but a documented 503 that says when to come back, and the 504 of a deadline that the request set."""
    documented = case.operation.definition.raw["responses"]
    may_retry = response.status_code == 503 and "503" in documented and "retry-after" in response.headers
    in_time = response.status_code != 504 or "deadline_s" not in str(case.body)
    assert response.status_code < 500 or may_retry or not in_time, f"{response.status_code} from {case.operation.label}"
