"""What the client does when the service, the network or the store misbehaves."""

import threading
from pathlib import Path

import httpx
import pytest
from scripted.script import Fault
from scripted.service import ScriptedService

from schemas.jobs import Job, JobState
from schemas.requests import GenerateRequest
from serve_graph.client import ApiProblem, ClientError, ClipDamaged, ServiceUnreachable, UnexpectedAnswer, WanClient
from serve_graph.client.events import event_data
from serve_graph.client.http import problem_of

REQUEST = GenerateRequest(prompt="a red circle\u2028moving left")


def client_of(scripted: ScriptedService, **options: object) -> WanClient:
    return WanClient(scripted.base, **options)  # type: ignore[arg-type]  # options of several types


def test_busy_answers_are_waited_out_and_told(scripted: ScriptedService) -> None:
    scripted.script.faults = [Fault("/generate", 429), Fault("/generate", 503)]
    told: list[ClientError] = []
    with client_of(scripted, on_trouble=lambda error, pause_s: told.append(error)) as client:
        client.submit(REQUEST)

    assert [error.problem.status for error in told if isinstance(error, ApiProblem)] == [429, 503]
    assert scripted.script.count("POST", "/generate") == 3
    assert len(scripted.script.jobs) == 1


def test_retry_after_beyond_the_patience_is_an_error_at_once(scripted: ScriptedService) -> None:
    scripted.script.faults = [Fault("/generate", 429, retry_after="60")]
    with client_of(scripted, patience_s=5) as client, pytest.raises(ApiProblem) as caught:
        client.submit(REQUEST)

    assert caught.value.problem.retry_after_s == 60
    assert scripted.script.count("POST", "/generate") == 1


def test_refusals_are_not_repeated(scripted: ScriptedService) -> None:
    scripted.script.faults = [Fault("/generate", 500)]
    with client_of(scripted) as client, pytest.raises(ApiProblem):
        client.submit(REQUEST)

    assert scripted.script.count("POST", "/generate") == 1


def test_submission_whose_answer_was_lost_makes_one_job(scripted: ScriptedService) -> None:
    class LosesTheFirstAnswer(httpx.HTTPTransport):
        lost = False

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            answer = super().handle_request(request)
            if not self.lost:
                self.lost = True
                answer.close()
                raise httpx.ReadError("connection reset")
            return answer

    with client_of(scripted, transport=LosesTheFirstAnswer()) as client:
        job = client.submit(REQUEST)

    assert list(scripted.script.jobs) == [job.job_id]
    assert scripted.script.count("POST", "/generate") == 2


def test_service_that_is_away_is_unreachable_after_the_patience(scripted: ScriptedService) -> None:
    scripted.stop()
    with client_of(scripted, patience_s=0.5) as client, pytest.raises(ServiceUnreachable, match=scripted.base):
        client.models()


def test_service_that_comes_back_is_waited_for(scripted: ScriptedService) -> None:
    scripted.stop()
    back = threading.Event()

    def bring_back(error: ClientError, pause_s: float) -> None:
        if not back.is_set():
            back.set()
            scripted.start()

    with client_of(scripted, on_trouble=bring_back) as client:
        assert client.models()[0].name == "wan-random"


@pytest.mark.parametrize("cut_after", [1, 2])
def test_wait_goes_on_after_event_streams_that_break(scripted: ScriptedService, cut_after: int) -> None:
    scripted.script.cut_events_after = cut_after
    seen: list[Job] = []
    with client_of(scripted) as client:
        ended = client.wait(client.submit(REQUEST).job_id, seen.append)

    assert ended.state is JobState.SUCCEEDED
    assert seen[-1] == ended
    assert ended.parameters.prompt == REQUEST.prompt


@pytest.mark.parametrize(
    "fault",
    [
        Fault(
            "/jobs/.*/events",
            404,
            body=b'{"type":"urn:wan-serve:problem:route-not-found","title":"","status":404,"detail":""}',
        ),
        Fault("/jobs/.*/events", 200, body=b"<html>", media_type="text/html", times=9),
        Fault("/jobs/.*/events", 503, times=9),
    ],
    ids=["no such route", "another media type", "busy"],
)
def test_wait_polls_where_there_are_no_events(scripted: ScriptedService, fault: Fault) -> None:
    scripted.script.faults = [fault]
    with client_of(scripted) as client:
        assert client.wait(client.submit(REQUEST).job_id).state is JobState.SUCCEEDED

    assert scripted.script.count("GET", "/jobs/job_[0-9a-f]*") >= 1


def test_expired_url_is_renewed(scripted: ScriptedService, tmp_path: Path) -> None:
    with client_of(scripted, api_key="secret") as client:
        clip = client.generate(REQUEST)
        scripted.script.expired.add(clip.clip_id)
        client.download(clip, tmp_path / "clip.mp4")

    assert scripted.script.count("GET", f"/outputs/{clip.clip_id}") == 1


def test_download_that_breaks_is_tried_again(scripted: ScriptedService, tmp_path: Path) -> None:
    with client_of(scripted) as client:
        clip = client.generate(REQUEST)
        scripted.script.faults = [Fault(f"/outputs/{clip.clip_id}/.*", 500), Fault(f"/outputs/{clip.clip_id}/.*", 503)]
        client.download(clip, tmp_path / "clip.mp4")

    assert scripted.script.downloads[clip.clip_id] == 1


def test_damaged_bytes_never_reach_the_file(scripted: ScriptedService, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"what was there")
    with client_of(scripted) as client:
        clip = client.generate(REQUEST)
        scripted.script.damaged.add(clip.clip_id)
        with pytest.raises(ClipDamaged, match=clip.clip_id):
            client.download(clip, path)

    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_batch_results_go_on_behind_the_last_one_after_a_broken_connection(scripted: ScriptedService) -> None:
    with client_of(scripted) as client:
        batch = client.submit_batch([REQUEST] * 5)
        scripted.script.cut_results_after = 3
        assert [result.index for result in client.batch_results(batch.batch_id)] == [0, 1, 2, 3, 4]

    assert scripted.script.count("GET", ".*/results") == 2


def test_failed_job_is_its_problem(scripted: ScriptedService) -> None:
    with client_of(scripted) as client, pytest.raises(ApiProblem, match="the model failed") as caught:
        client.generate(GenerateRequest(prompt="fail"))

    assert caught.value.problem.name == "render-failed"


def test_interrupted_generate_cancels_the_job(scripted: ScriptedService) -> None:
    scripted.script.auto = False

    def interrupt(job: Job) -> None:
        raise KeyboardInterrupt

    with client_of(scripted) as client, pytest.raises(KeyboardInterrupt):
        client.generate(REQUEST, interrupt)

    (job,) = scripted.script.jobs.values()
    assert job.state is JobState.CANCELLED


def test_foreign_answer_is_unexpected_and_its_error_page_a_problem_of_its_status() -> None:
    def foreign(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.path == "/models" else 418, text="<html>")

    with WanClient(transport=httpx.MockTransport(foreign)) as client:
        with pytest.raises(UnexpectedAnswer, match=r"127\.0\.0\.1:8000 answered no ModelProfile"):
            client.models()
        with pytest.raises(ApiProblem, match="answered 418"):
            client.job("job_x")


def test_problem_of_a_newer_service_keeps_what_is_known() -> None:
    known = {"type": "t", "title": "a", "status": 429, "detail": "d"}
    headers = {"retry-after": "3"}
    answer = httpx.Response(
        429, json={**known, "novelty": 1}, headers=headers, request=httpx.Request("GET", "http://x")
    )

    assert (problem_of(answer).detail, problem_of(answer).retry_after_s) == ("d", 3)


@pytest.mark.parametrize("url", ["ftp://x", "127.0.0.1:8000", "http://", ""])
def test_client_refuses_what_is_no_http_url(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        WanClient(url)


@pytest.mark.parametrize("key", ["ключ", "a\nb", "", " "])
def test_client_refuses_what_is_no_key(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        WanClient(api_key=key)


def test_event_data_reads_what_the_standard_allows() -> None:
    lines = b": hello\nevent:job\ndata: 1\ndata:2\nid: 7\n\nretry: 5\n\ndata: x\n\nevent: job\ndata: cut off".split(
        b"\n"
    )

    assert list(event_data(lines)) == [("job", b"1\n2"), ("message", b"x")]
