"""`wan-serve batch`: what it sends, what it leaves in the folder, and how it goes on after an interruption."""

import json
import os
import signal
from pathlib import Path

import pytest
from command_line import Run, Start, error_of
from scripted.script import Fault, clip_bytes
from scripted.service import ScriptedService

from schemas.jobs import JobState

PROMPTS = "a red circle\n\n  a blue square  \r\na [bold]\u2028line\n"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS)
    return path


def clips_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.mp4"))


def test_batch_fills_the_folder_and_sums_up(
    wan_serve: Run, prompts: Path, tmp_path: Path, scripted: ScriptedService
) -> None:
    done = wan_serve("batch", "prompts.txt", "-o", "out")

    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 clips in out/; all about them: out/results.jsonl\n"
    assert "3 of 3 ended, 0 failed, 3 fetched" in done.stderr
    assert "\x1b" not in done.stderr
    ((batch_id, jobs),) = scripted.script.batches.items()
    assert [(tmp_path / "out" / f"{i:05d}.mp4").read_bytes() for i in range(3)] == [clip_bytes(j) for j in jobs]
    results = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_bytes().splitlines()]
    assert [(r["index"], r["job_id"], r["file"]) for r in results] == [
        (i, j, f"{i:05d}.mp4") for i, j in enumerate(jobs)
    ]
    assert [r["prompt"] for r in results] == ["a red circle", "a blue square", "a [bold]\u2028line"]
    assert json.loads((tmp_path / "out/batch.json").read_bytes())["batch_id"] == batch_id


def test_finished_batch_runs_again_without_asking_the_service(
    wan_serve: Run, prompts: Path, scripted: ScriptedService
) -> None:
    first = wan_serve("batch", "prompts.txt", "-o", "out", "--json")
    scripted.stop()
    again = wan_serve("batch", "prompts.txt", "-o", "out", "--json")

    assert json.loads(first.stdout) == json.loads(again.stdout)
    assert json.loads(first.stdout)["clips"] == 3
    assert again.returncode == 0


def test_failed_prompts_are_told_and_make_exit_code_1(wan_serve: Run, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine", "seed": 1}\n{"prompt": "fail"}\n')
    done = wan_serve("batch", "p.jsonl", "-o", "out")

    assert done.returncode == 1
    assert '"fail": the model failed' in done.stdout
    assert "1 clips in out/, 1 without a clip" in done.stdout
    assert clips_in(tmp_path / "out") == ["00000.mp4"]
    assert json.loads(wan_serve("batch", "p.jsonl", "-o", "out", "--json").stdout)["failed"][0]["index"] == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", b"\n  \n", "has 0 prompts"),
        ("p.txt", b"x\n\n" + b"y" * 2001, "line 3: prompt: "),
        ("p.txt", b"\xff", "is not UTF-8"),
        ("p.jsonl", b'{"prompt": "x"}\n\n{"prompt": "y", "size": 1}\n{"prompt"\n', "line 3: size is not a field"),
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt"\n', "line 2: is not a JSON object"),
        ("p.jsonl", b'{"prompt": "x", "num_frames": "9"}', "line 1: num_frames: "),
        ("p.jsonl", b"{}\n" * 9, "(and 4 more)"),
        ("p.txt", b"x\n" * 10_001, "a batch has 1 to 10000"),
        ("p.csv", b"x", "ends with .txt"),
    ],
)
def test_mistakes_in_the_file_are_told_by_line_before_anything_is_sent(
    wan_serve: Run, tmp_path: Path, scripted: ScriptedService, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)

    assert says in error_of(wan_serve("batch", name, "-o", "out"), 2)
    assert scripted.script.asked == []
    assert not (tmp_path / "out").exists()


def test_mistakes_that_only_the_service_knows_are_told_by_line(wan_serve: Run, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n\n{"prompt": "y", "num_frames": 80}\n')

    assert "p.jsonl: line 3: num_frames: 80 is odd" in error_of(wan_serve("batch", "p.jsonl", "-o", "out"), 2)


def test_changed_file_is_refused_in_the_same_folder(wan_serve: Run, prompts: Path, scripted: ScriptedService) -> None:
    wan_serve("batch", "prompts.txt", "-o", "out")
    prompts.write_text(PROMPTS + "one more\n")

    assert "another folder" in error_of(wan_serve("batch", "prompts.txt", "-o", "out"), 2)
    assert wan_serve("batch", "prompts.txt", "-o", "out2").returncode == 0
    assert len(scripted.script.batches) == 2


def test_folder_with_clips_of_unknown_origin_is_refused(wan_serve: Run, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/00000.mp4").write_bytes(b"precious")

    assert "use another folder" in error_of(wan_serve("batch", "prompts.txt", "-o", "out"), 2)
    assert (tmp_path / "out/00000.mp4").read_bytes() == b"precious"


def test_batch_that_the_service_does_not_know_is_told(
    wan_serve: Run, prompts: Path, tmp_path: Path, scripted: ScriptedService
) -> None:
    wan_serve("batch", "prompts.txt", "-o", "out")
    (tmp_path / "out/00001.mp4").unlink()
    scripted.script.batches.clear()

    assert "does not know batch_" in error_of(wan_serve("batch", "prompts.txt", "-o", "out"), 1)


def test_missing_and_broken_clips_are_fetched_again_and_no_others(
    wan_serve: Run, prompts: Path, tmp_path: Path, scripted: ScriptedService
) -> None:
    wan_serve("batch", "prompts.txt", "-o", "out")
    scripted.script.downloads.clear()
    (tmp_path / "out/00000.mp4").unlink()
    (tmp_path / "out/00002.mp4").write_bytes(b"broken")
    (tmp_path / "out/.00002.mp4.0a0a0a0a.part").write_bytes(b"half")
    done = wan_serve("batch", "prompts.txt", "-o", "out")

    assert done.returncode == 0
    assert sum(scripted.script.downloads.values()) == 2
    assert scripted.script.count("POST", "/batches") == 1
    assert list((tmp_path / "out").glob(".*")) == []


def test_results_of_another_version_are_written_again(wan_serve: Run, prompts: Path, tmp_path: Path) -> None:
    wan_serve("batch", "prompts.txt", "-o", "out")
    written = (tmp_path / "out/results.jsonl").read_bytes()
    (tmp_path / "out/results.jsonl").write_text('{"novelty": 1}\n')

    assert wan_serve("batch", "prompts.txt", "-o", "out").returncode == 0
    assert len((tmp_path / "out/results.jsonl").read_bytes()) == len(written)


def test_clip_that_can_not_be_fetched_is_told_and_tried_again(
    wan_serve: Run, prompts: Path, scripted: ScriptedService
) -> None:
    scripted.script.faults = [Fault("/outputs/.*/.*", 410)]
    first = wan_serve("batch", "prompts.txt", "-o", "out")

    assert first.returncode == 1
    assert "2 clips in out/, 1 without a clip" in first.stdout
    assert wan_serve("batch", "prompts.txt", "-o", "out").returncode == 0


def test_killed_before_it_knew_its_batch_it_submits_the_same_again(
    wan_serve: Run, prompts: Path, tmp_path: Path, scripted: ScriptedService
) -> None:
    wan_serve("batch", "prompts.txt", "-o", "out")
    record = json.loads((tmp_path / "out/batch.json").read_bytes())
    (tmp_path / "out/batch.json").write_text(json.dumps({**record, "batch_id": None}))
    (tmp_path / "out/results.jsonl").unlink()

    assert "--url" in error_of(wan_serve("batch", "prompts.txt", "-o", "out", "--url", "http://127.0.0.1:1"), 2)
    assert wan_serve("batch", "prompts.txt", "-o", "out").returncode == 0
    assert json.loads((tmp_path / "out/batch.json").read_bytes()) == record
    assert len(scripted.script.batches) == 1
    assert scripted.script.count("POST", "/batches") == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_client_goes_on_where_it_was(
    wan_serve: Run, start: Start, prompts: Path, tmp_path: Path, scripted: ScriptedService, number: signal.Signals
) -> None:
    scripted.script.auto = False
    process = start("batch", "prompts.txt", "-o", "out")
    assert process.stderr is not None
    assert "0 of 3 ended" in process.stderr.readline()
    ((batch_id, jobs),) = scripted.script.batches.items()
    scripted.script.end(jobs[1])
    while clips_in(tmp_path / "out") != ["00001.mp4"]:
        assert process.poll() is None
    assert "another wan-serve batch" in error_of(wan_serve("batch", "prompts.txt", "-o", "out"), 2)
    process.send_signal(number)
    told = process.communicate(timeout=30)[1]
    for job_id in (jobs[0], jobs[2]):
        scripted.script.end(job_id)

    done = wan_serve("batch", "prompts.txt", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert len(clips_in(tmp_path / "out")) == 3
    assert list(scripted.script.batches) == [batch_id]
    assert list(scripted.script.downloads.values()) == [1, 1, 1]
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "wan-serve batch prompts.txt -o out" in told
        assert f"wan-serve cancel {batch_id}" in told


def test_service_that_restarts_is_waited_for(
    start: Start, prompts: Path, tmp_path: Path, scripted: ScriptedService
) -> None:
    scripted.script.auto = False
    process = start("batch", "prompts.txt", "-o", "out", "--json")
    assert process.stderr is not None
    assert "0 of 3 ended" in process.stderr.readline()
    scripted.stop()
    assert "does not answer" in process.stderr.readline()
    for jobs in scripted.script.batches.values():
        for job_id in jobs:
            scripted.script.end(job_id)
    scripted.start()
    printed, _ = process.communicate(timeout=30)

    assert process.returncode == 0
    assert json.loads(printed)["clips"] == 3


def test_patience_ends(wan_serve: Run, prompts: Path, scripted: ScriptedService) -> None:
    scripted.stop()
    done = wan_serve("batch", "prompts.txt", "-o", "out", "--patience", "0.5")

    assert done.returncode == 1
    assert "make serve" in done.stderr.splitlines()[-1]


def test_folder_that_can_not_be_made_is_told(wan_serve: Run, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")

    assert os.strerror(17) in error_of(wan_serve("batch", "prompts.txt", "-o", "out"), 1)


def test_cancelled_batch_ends_with_what_there_is(
    wan_serve: Run, start: Start, prompts: Path, scripted: ScriptedService
) -> None:
    scripted.script.auto = False
    process = start("batch", "prompts.txt", "-o", "out", "--json")
    assert process.stderr is not None
    process.stderr.readline()
    ((batch_id, jobs),) = scripted.script.batches.items()
    scripted.script.end(jobs[0])
    wan_serve("cancel", batch_id)
    printed, _ = process.communicate(timeout=30)

    assert process.returncode == 1
    assert [item["state"] for item in json.loads(printed)["failed"]] == [JobState.CANCELLED] * 2
