"""Starting, breaking and stopping a real service; and what it says where it can't start.

The first tests follow one another on one service.
"""

import concurrent.futures
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from polling import until

from tests.integration.load import wait_running
from tests.integration.service import HASTY, RunningService, run_serve, write_config

JOB = {"prompt": "a blue square", "num_frames": 81, "num_inference_steps": 100}


def post(service: RunningService) -> httpx.Response:
    with service.client(timeout_s=120) as http:
        return http.post("/generate", json=JOB)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of 2 MiB, where this user may mount one."""
    folder = tmp_path_factory.mktemp("small")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def service(small_disk: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """With its store on the small disk. The last of the tests that take it stops it."""
    folder = tmp_path_factory.mktemp("lifecycle")
    storage = {"kind": "local", "folder": str(small_disk or folder / "store")}
    running = RunningService(folder, deployments=[HASTY], storage=storage).wait_ready()
    yield running
    running.stop()


def test_disk_full_is_507_and_nothing_partial_is_left(service: RunningService, small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("mounting a small file system takes root; the unit tests fill one by other means")
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        file.write(b"\0" * (free - 24 * 1024))  # room for the records, not for a clip of 81 frames
    answer = post(service)
    assert (answer.status_code, answer.json()["type"]) == (507, "urn:wan-serve:problem:store-full")
    job = service.wait_log("job")
    assert (job["state"], job["error"]) == ("failed", "store-full")
    assert list(small_disk.glob("clips/**/*.mp4")) == []
    assert list((service.folder / "data" / "spool").rglob("*.mp4")) == []
    filler.unlink()
    with service.client() as http:
        until(lambda: http.get("/health/ready").status_code == 200, "a store with room")
    assert post(service).status_code == 200


def test_two_services_share_a_data_folder(service: RunningService) -> None:
    """`make demo` beside `make serve`: each Ray keeps its own token, or the first could start no worker any more."""
    second = RunningService(service.folder, storage={"kind": "local", "folder": str(service.folder / "other")})
    try:
        second.wait_ready()
        with second.client() as http:
            assert http.post("/generate", json={"prompt": "beside"}).status_code == 200
    finally:
        assert second.stop() == 0
    before = len(service.log("model_loaded"))
    service.replica("Generator").kill()
    until(lambda: len(service.log("model_loaded")) > before, "another generator")
    with service.client() as http:
        until(lambda: http.get("/health/ready").status_code == 200, "a ready service")
        assert http.post("/generate", json={"prompt": "still here"}).status_code == 200


def test_an_interrupt_ends_what_runs_refuses_what_comes_and_leaves_no_process(service: RunningService) -> None:
    """Ctrl-C; the tests of restarts send SIGTERM."""
    family = service.family()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(post, service) for _ in range(4)]
        wait_running(service, len(running))
        service.process.send_signal(signal.SIGINT)
        with service.client() as http:
            while http.get("/health/ready").status_code == 200:
                pass
            refused = http.post("/generate", json=JOB)
        code = service.stop()
        answers = [answer.result() for answer in running]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:wan-serve:problem:shutting-down")
    assert int(refused.headers["retry-after"]) >= 1
    assert code == 0, service.output()
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert list((service.folder / "data" / "spool").rglob("job_*")) == []
    assert list((service.folder / "data" / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"model": {"profile": "wan-huge"}}, "there is no profile 'wan-huge'"),
        ({"modle": {}}, "unknown setting modle"),
        ({"engine": {"max_jobs_in_flight": 0}}, "engine.max_jobs_in_flight"),
    ],
)
def test_serve_refuses_a_wrong_configuration_in_one_line(tmp_path: Path, args: dict, told: str) -> None:
    ended = run_serve(write_config(tmp_path, **args))
    assert ended.returncode == 2
    assert told in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_serve_refuses_a_missing_checkpoint_in_one_line(tmp_path: Path) -> None:
    ended = run_serve(write_config(tmp_path, model={"profile": "wan2.1-t2v-1.3b", "path": str(tmp_path / "none")}))
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("wan-serve: ")
    assert "model.path must name a folder" in last


def test_serve_refuses_a_taken_port_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = run_serve(write_config(tmp_path), "--port", str(taken.getsockname()[1]))
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "is taken" in ended.stderr
