"""The commands on one job: exit codes, one-line errors, JSON on stdout and nothing else there."""

import json
import signal
from pathlib import Path

import pytest
from command_line import Run, Start, error_of
from scripted.script import Fault, clip_bytes
from scripted.service import ScriptedService

from schemas.jobs import JobState
from schemas.requests import GenerateRequest
from serve_graph.cli_generate import generate

OPTIONS_BESIDE_THE_REQUEST = {"output", "force", "patience", "url", "as_json"}


def test_generate_saves_the_clip_and_says_where(wan_serve: Run, tmp_path: Path, scripted: ScriptedService) -> None:
    done = wan_serve("generate", "a red circle", "-o", "clip.mp4", "--seed", "7", "--num-frames", "9")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("clip.mp4  (64x64, 9 frames, seed 7")
    assert "\x1b" not in done.stdout + done.stderr
    (job_id,) = scripted.script.jobs
    assert (tmp_path / "clip.mp4").read_bytes() == clip_bytes(job_id)


def test_generate_names_the_file_after_the_job_and_prints_json(wan_serve: Run, tmp_path: Path) -> None:
    done = wan_serve("generate", "a red circle", "--json")

    printed = json.loads(done.stdout)
    assert printed["path"] == f"{printed['clip']['job_id']}.mp4"
    assert (tmp_path / printed["path"]).stat().st_size == printed["clip"]["size_bytes"]


def test_generate_writes_the_clip_to_stdout(start: Start) -> None:
    process = start("generate", "a red circle", "-o", "-")
    assert process.stdout is not None
    written = process.stdout.buffer.read()

    assert process.wait(30) == 0
    assert written.startswith(b"\0\0\0\x20ftyp")


def test_generate_refuses_to_replace_a_file_before_it_asks_for_anything(
    wan_serve: Run, tmp_path: Path, scripted: ScriptedService
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"precious")

    assert "--force" in error_of(wan_serve("generate", "a red circle", "-o", "clip.mp4"), 2)
    assert scripted.script.asked == []
    assert wan_serve("generate", "a red circle", "-o", "clip.mp4", "--force").returncode == 0
    assert (tmp_path / "clip.mp4").read_bytes() != b"precious"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["  "], "prompt: "),
        (["x", "--duration", "1", "--num-frames", "9"], "give duration or num_frames, not both"),
        (["x", "-o", "no/such/folder.mp4"], "folder is missing"),
        (["x", "-o", "-", "--json"], "both want stdout"),
        (["x", "--lora", "style=much"], "loras: 0: weight: "),
        (["x", "--lora", "style", "--lora", "style=2"], "names an adapter twice"),
    ],
)
def test_generate_tells_wrong_usage_in_one_line(wan_serve: Run, arguments: list[str], says: str) -> None:
    assert says in error_of(wan_serve("generate", *arguments), 2)


def test_generate_asks_for_the_adapters_that_it_is_given(wan_serve: Run) -> None:
    """The scripted service's profile has none, and its refusal tells what came."""
    message = error_of(wan_serve("generate", "x", "--lora", "style=0.5", "--lora", "motion"), 2)

    assert "has no 'style'" in message
    assert "has no 'motion'" in message


def test_generate_has_an_option_for_every_field_of_a_request() -> None:
    assert set(generate.__annotations__) - OPTIONS_BESIDE_THE_REQUEST - {"return"} >= set(GenerateRequest.model_fields)


def test_generate_fails_with_the_job(wan_serve: Run) -> None:
    done = wan_serve("generate", "fail, please", "--json")

    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"].endswith("render-failed")
    assert done.stderr.splitlines()[-1] == "wan-serve: the model failed (request id request-1)"


def test_ctrl_c_cancels_the_job_and_waits_for_the_answer(start: Start, scripted: ScriptedService) -> None:
    scripted.script.auto = False
    process = start("generate", "a long one")
    assert process.stderr is not None
    first = process.stderr.readline()  # its state is told once the job is followed
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)

    (job,) = scripted.script.jobs.values()
    assert first == f"{job.job_id} queued\n"
    assert (process.returncode, job.state) == (130, JobState.CANCELLED)
    assert errors == f"wan-serve: interrupted: {job.job_id} is cancelled\n"


def test_ctrl_c_before_the_submission_is_answered_cancels_it_too(start: Start, scripted: ScriptedService) -> None:
    scripted.script.auto = False
    scripted.script.faults = [Fault("/generate", 503, retry_after="60")]
    process = start("generate", "a long one")
    assert process.stderr is not None
    assert "trying again" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)

    assert process.returncode == 130
    assert [job.state for job in scripted.script.jobs.values()] == [JobState.CANCELLED]
    assert errors.endswith(" is cancelled\n")


@pytest.mark.parametrize("arguments", [["status", "job_1", "--watch"], ["jobs"]])
def test_ctrl_c_elsewhere_ends_with_130_and_no_traceback(
    start: Start, scripted: ScriptedService, arguments: list[str]
) -> None:
    scripted.script.auto = False
    scripted.script.make(GenerateRequest(prompt="x"), "job_1")
    scripted.script.faults = [Fault("/jobs", delay_s=5)]
    process = start(*arguments)
    while not [path for _, path in scripted.script.asked if path in {"/jobs", "/jobs/job_1/events"}]:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)

    assert (process.returncode, errors) == (130, "")


def test_service_that_is_not_there_is_told_at_once_with_what_to_do(wan_serve: Run, scripted: ScriptedService) -> None:
    scripted.stop()
    for command in (["generate", "x"], ["jobs"], ["status", "job_x"], ["cancel", "batch_x"], ["models"], ["health"]):
        told = error_of(wan_serve(*command), 1)
        assert scripted.base in told
        assert "make serve" in told
        assert "--url" in told


def test_missing_key_is_told_with_the_variable_and_a_right_one_is_sent(
    wan_serve: Run, scripted: ScriptedService
) -> None:
    scripted.script.api_key = "wan_key"

    assert "WAN_API_KEY" in error_of(wan_serve("jobs"), 2)
    assert "WAN_API_KEY" in error_of(wan_serve("generate", "x", WAN_API_KEY="wrong"), 2)
    assert wan_serve("generate", "x", WAN_API_KEY="wan_key").returncode == 0


@pytest.mark.parametrize("url", ["ftp://x", "nonsense"])
def test_url_that_is_none_is_wrong_usage(wan_serve: Run, url: str) -> None:
    assert "--url" in error_of(wan_serve("jobs", "--url", url), 2)


def test_busy_service_is_told_with_when_to_try_again(wan_serve: Run, scripted: ScriptedService) -> None:
    scripted.script.faults = [Fault("/jobs", 429, retry_after="7")]

    assert "try again in 7 s" in error_of(wan_serve("jobs"), 1)


def test_jobs_lists_state_age_and_prompt(wan_serve: Run, scripted: ScriptedService) -> None:
    prompts = ["first", "second [bold]\x1b[31m", "third " * 40]
    made = [wan_serve("generate", prompt, "--json") for prompt in prompts[:1]]
    for prompt in prompts[1:]:
        scripted.script.make(GenerateRequest(prompt=prompt), f"job_{len(prompt)}")

    done = wan_serve("jobs")
    assert done.returncode == 0, done.stderr
    header, third, second, first = done.stdout.splitlines()
    assert header.split() == ["job", "state", "age", "left", "prompt"]
    assert third.rstrip().endswith("…")
    assert "second [bold]�[31m" in second
    assert "succeeded" in first
    assert json.loads(made[0].stdout)["clip"]["job_id"] in first
    assert len(json.loads(wan_serve("jobs", "--json", "--limit", "2").stdout)["jobs"]) == 2
    assert len(json.loads(wan_serve("jobs", "--json", "--all", "--state", "queued").stdout)["jobs"]) == 2
    assert json.loads(wan_serve("jobs", "--json", "--batch", "batch_x").stdout) == {"jobs": []}


def test_status_shows_a_job_and_watches_it_to_its_end(wan_serve: Run, scripted: ScriptedService) -> None:
    scripted.script.make(GenerateRequest(prompt="x"), "job_1")
    scripted.script.make(GenerateRequest(prompt="fail"), "job_2")

    assert wan_serve("status", "job_1").stdout.startswith("job_1  running  denoise 1/2")
    watched = wan_serve("status", "job_1", "--watch", "--json")
    states = [json.loads(line)["state"] for line in watched.stdout.splitlines()]
    assert (watched.returncode, states[-1]) == (0, "succeeded")
    failed = wan_serve("status", "job_2", "--watch")
    assert failed.returncode == 1
    assert "the model failed" in failed.stdout.splitlines()[-1]


def test_status_and_cancel_show_a_batch(wan_serve: Run, scripted: ScriptedService) -> None:
    scripted.script.auto = False
    batch_id = "batch_" + "1" * 32
    scripted.script.batches[batch_id] = ["job_1", "job_2"]
    for job_id in ("job_1", "job_2"):
        scripted.script.make(GenerateRequest(prompt="x"), job_id, batch_id)

    assert wan_serve("status", batch_id).stdout == f"{batch_id}  running  2 prompts  2 queued  3 s left\n"
    assert json.loads(wan_serve("cancel", batch_id, "--json").stdout)["counts"]["cancelled"] == 2
    assert wan_serve("status", batch_id, "--watch").returncode == 1
    assert wan_serve("cancel", "job_1").stdout.startswith("job_1  cancelled")


@pytest.mark.parametrize("command", ["status", "cancel"])
def test_wrong_id_is_wrong_usage(wan_serve: Run, command: str) -> None:
    assert "job_ or batch_" in error_of(wan_serve(command, "clip_1"), 2)


def test_unknown_job_fails(wan_serve: Run) -> None:
    assert "no job" in error_of(wan_serve("status", "job_none"), 1)


def test_models_and_health_print_for_people_and_as_json(wan_serve: Run) -> None:
    assert "4k+1" in wan_serve("models").stdout
    assert json.loads(wan_serve("models", "--json").stdout)["models"][0]["name"] == "wan-random"
    assert "1 wait, 2 run; room for 3" in wan_serve("health").stdout
    assert json.loads(wan_serve("health", "--json").stdout)["status"] == "ok"
