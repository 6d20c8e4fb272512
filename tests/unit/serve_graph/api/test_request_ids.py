"""X-Request-ID: the client's own where it is one; on the answer, in the body and in the log."""

import re
import string

import pytest
from answers import problem_of
from api_under_test import Api
from hypothesis import example, given
from hypothesis import strategies as st

from serve_graph.api.request_id import request_id_of

LEGAL = string.ascii_letters + string.digits + "._-"
MADE = re.compile(r"[0-9a-f]{32}")


@pytest.mark.parametrize("sent", ["a", "request-1", "2026.11.05_x-Y", "x" * 128])
async def test_a_valid_request_id_is_kept_everywhere(api: Api, sent: str) -> None:
    answer = await api.http.post("/generate", json={"prompt": "a"}, headers={"x-request-id": sent})

    assert answer.headers.get_list("x-request-id") == [sent]
    assert answer.json()["request_id"] == sent
    assert [line["request_id"] for line in api.log.of("request") + api.log.of("job")] == [sent, sent]
    assert api.jobs.record(answer.json()["job_id"]).request_id == sent


@pytest.mark.parametrize(
    "sent", [None, "", " ", "a b", "x" * 129, "a/b", "<script>", 'a"b', "a,b", "é", "\x7f", "a\tb"]
)
async def test_a_request_id_that_is_none_is_replaced(api: Api, sent: str | None) -> None:
    headers = {} if sent is None else {b"x-request-id": sent.encode("latin-1")}
    answer = await api.http.get("/nothing", headers=headers)

    made = problem_of(answer, 404, "route-not-found").request_id
    assert made is not None
    assert MADE.fullmatch(made)
    assert [line["request_id"] for line in api.log.of("request")] == [made]


async def test_every_request_gets_an_id_of_its_own(api: Api) -> None:
    ids = {(await api.http.get("/health/live")).headers["x-request-id"] for _ in range(5)}

    assert len(ids) == 5


async def test_a_refusal_of_the_body_has_the_request_id(api: Api) -> None:
    answer = await api.http.post("/generate", content=b" " * 70_000, headers={"x-request-id": "request-1"})

    assert problem_of(answer, 413, "body-too-large").request_id == "request-1"
    assert [line["request_id"] for line in api.log.of("request")] == ["request-1"]


@given(st.text(st.sampled_from(LEGAL), min_size=1, max_size=128))
def test_any_legal_request_id_is_kept(sent: str) -> None:
    assert request_id_of(sent) == sent


@given(st.text(st.characters(exclude_categories=()) | st.sampled_from(LEGAL), max_size=140))
@example("a\n")
@example("\u0661")
def test_any_other_request_id_is_replaced(sent: str) -> None:
    is_legal = 1 <= len(sent) <= 128 and set(sent) <= set(LEGAL)
    kept = request_id_of(sent)
    assert (kept == sent) is is_legal
    assert is_legal or MADE.fullmatch(kept)
