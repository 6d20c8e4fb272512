"""The loopback Modal itself: the real CLI deploys to it, and Modal's real container entry point runs in it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import modal
import pytest
from modal.mount import ROOT_DIR
from modal_loopback import Loopback
from modal_loopback.clock import Clock
from modal_loopback.records import VolumeMount

SAMPLE = Path(__file__).parents[1] / "modal_loopback" / "sample_app.py"
SECRETS = {"sample-secret": {"KEY": "value", "OTHER": "unused"}}


@pytest.fixture(scope="module")
def deployed() -> Iterator[Loopback]:
    """The sample app, deployed once."""
    with Loopback(secrets=SECRETS) as loopback:
        done = loopback.cli("deploy", str(SAMPLE))
        assert done.exit_code == 0, done.output
        yield loopback


@pytest.fixture
def loopback(deployed: Loopback) -> Iterator[Loopback]:
    """The deployed sample app with no calls and no containers, before the test and after it."""
    yield deployed
    deployed.abandon("sample")


class Gate:
    """A FIFO that a function waits at, as `hold_at` does."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(path)

    def open(self, text: str) -> None:
        """Wait until someone waits at it, and let it go on."""
        Path(self.path).write_text(text)

    @contextmanager
    def held(self) -> Iterator[Callable[[str], object]]:
        """Wait until someone waits at it; it waits on until the block ends, and gets what is written in it."""
        with Path(self.path).open("w") as file:
            yield file.write


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def painter(loopback: Loopback) -> Any:
    return modal.Cls.from_name("sample", "Painter", client=loopback.client)()


def function(loopback: Loopback, name: str) -> "modal.Function[Any, Any, Any]":
    return modal.Function.from_name("sample", name, client=loopback.client)


class TestLayout:
    def test_deploy_records_a_class_as_it_is_defined(self, deployed: Loopback) -> None:
        layout = deployed.layout("sample")["Painter"]

        assert (layout.is_class, layout.methods) == (True, ("env", "hold", "slept", "wait_forever"))
        assert (layout.gpu, layout.snapshot) == ("L4", True)
        assert layout.experimental_options == {"enable_gpu_snapshot": "True"}
        assert (layout.max_inputs, layout.target_inputs) == (3, 2)
        assert (layout.min_containers, layout.max_containers, layout.buffer_containers) == (0, 1, None)
        assert (layout.timeout_s, layout.startup_timeout_s, layout.scaledown_window_s) == (600, 120, 60)
        assert layout.volumes == {
            "/weights": VolumeMount("sample-weights", read_only=True),
            "/outputs": VolumeMount("sample-outputs", read_only=False),
        }
        assert layout.secrets == {"sample-secret": frozenset({"KEY"})}

    def test_deploy_records_schedule_web_endpoint_retries_and_tags(self, deployed: Loopback) -> None:
        layout = deployed.layout("sample")

        assert deployed.app("sample").tags == {"made-for": "tests"}
        assert layout.keys() == {"Painter", "sweep", "double", "fail_first", "web"}
        assert layout["sweep"].schedule == "period: hours=1"
        assert layout["web"].web == {"": "asgi_app"}
        assert layout["fail_first"].retries == 1

    def test_deploy_records_image_layers_and_mounted_files(self, deployed: Loopback) -> None:
        layout = deployed.layout("sample")["sweep"]

        assert "ENV GREETING='hello there'" in layout.image.all_commands
        assert any("numpy==2.0.0" in command for command in layout.image.layers[-1])
        assert layout.image.all_commands[0].startswith("FROM python:3.11")
        assert layout.files[f"{ROOT_DIR}/sample_files/settings.yaml"] == b"greeting: hello\n"
        assert layout.files[f"{ROOT_DIR}/sample_files/nested/empty.txt"] == b""
        assert f"{ROOT_DIR}/sample_app.py" in layout.files


class TestRefusals:
    @pytest.mark.parametrize(
        ("env", "reason"),
        [
            ({"SAMPLE_GPU": "L5"}, "Invalid GPU type 'L5'"),
            ({"SAMPLE_GPU": "H100:9"}, "9 GPUs"),
            ({"SAMPLE_TIMEOUT": "86401"}, "timeout of Painter.* is 86401 s"),
            ({"SAMPLE_MIN": "2"}, "cannot be greater than `max_containers` (1)"),  # by the client
        ],
    )
    def test_deploy_is_refused_and_changes_nothing(self, deployed: Loopback, env: dict[str, str], reason: str) -> None:
        before = deployed.layout("sample")

        done = deployed.cli("deploy", str(SAMPLE), env=env)

        assert done.exit_code != 0
        assert reason in done.output
        assert deployed.layout("sample") == before

    @pytest.mark.parametrize(
        ("secrets", "reason"),
        [
            ({}, "Secret 'sample-secret' not found"),
            ({"sample-secret": {"OTHER": ""}}, "missing the required keys ['KEY']"),
        ],
    )
    def test_deploy_is_refused_without_its_secret(self, secrets: dict[str, dict[str, str]], reason: str) -> None:
        with Loopback(secrets=secrets) as loopback:
            done = loopback.cli("deploy", str(SAMPLE))

            assert done.exit_code != 0
            assert reason in done.output

    def test_an_unknown_rpc_is_unimplemented_by_name(self, deployed: Loopback) -> None:
        with pytest.raises(modal.exception.UnimplementedError, match="QueueGetOrCreate"):
            modal.Queue.from_name("queue", create_if_missing=True, client=deployed.client).hydrate()


class TestCli:
    def test_run_calls_functions_in_containers_and_shows_their_output(self) -> None:
        with Loopback(secrets=SECRETS) as loopback:
            done = loopback.cli("run", str(SAMPLE), "--number", "4")

            assert done.exit_code == 0, done.output
            assert "remote: 8, mapped: [0, 2, 4]" in done.output
            assert "doubling 4" in done.output

    def test_serve_answers_http_until_it_is_interrupted(self) -> None:
        with Loopback(secrets=SECRETS) as loopback:
            with loopback.serve(str(SAMPLE)) as app:
                answer = httpx.post(
                    f"{app.functions['web'].web_urls['']}/echo", headers={"x-sent": "1"}, content=b"abc"
                )

                assert (app.state, answer.text) == ("ephemeral", "3 bytes, ")

            assert app.state == "stopped"

    def test_volume_files_go_in_and_come_out(self, deployed: Loopback, tmp_path: Path) -> None:
        source, copy = tmp_path / "clip.bin", tmp_path / "copy.bin"
        source.write_bytes(os.urandom(5 * 2**20))  # large enough for a blob

        put = deployed.cli("volume", "put", "sample-outputs", str(source), "/clips/a.bin")
        listed = deployed.cli("volume", "ls", "sample-outputs", "/clips")
        got = deployed.cli("volume", "get", "sample-outputs", "/clips/a.bin", str(copy))

        assert [put.exit_code, listed.exit_code, got.exit_code] == [0, 0, 0], put.output + listed.output + got.output
        assert "clips/a.bin" in listed.output
        assert copy.read_bytes() == source.read_bytes()
        assert (deployed.volume("sample-outputs").folder / "clips" / "a.bin").stat().st_size == 5 * 2**20


class TestCalls:
    def test_remote_gives_files_and_image_environment_to_the_container(self, loopback: Loopback) -> None:
        assert function(loopback, "sweep").remote() == "greeting: hello\nhello there"

    def test_secrets_are_in_the_environment(self, loopback: Loopback) -> None:
        assert painter(loopback).env.remote("KEY") == "value"

    def test_spawned_call_is_polled_by_id(self, loopback: Loopback, gate: Gate) -> None:
        call = modal.FunctionCall.from_id(painter(loopback).hold.spawn(gate.path).object_id, client=loopback.client)

        with gate.held() as write:
            with pytest.raises(TimeoutError):
                call.get(timeout=0)
            write("painted")

        assert call.get() == "painted"
        (recorded,) = [made for made in loopback.calls if made.call_id == call.object_id]
        assert recorded.inputs[0].arguments == ((gate.path,), {})

    def test_spawned_map_is_read_by_index(self, loopback: Loopback) -> None:
        call = function(loopback, "double").experimental_spawn_map([1, 2])

        assert [call.get(index=index) for index in (1, 0)] == [4, 2]
        assert call.num_inputs() == 2

    def test_one_container_takes_inputs_up_to_its_maximum(self, loopback: Loopback, tmp_path: Path) -> None:
        gates = [Gate(tmp_path / str(number)) for number in range(4)]
        calls = [painter(loopback).hold.spawn(gate.path) for gate in gates]
        with gates[0].held(), gates[1].held(), gates[2].held():
            stats = painter(loopback).hold.get_current_stats()

            assert (stats.num_total_runners, stats.num_running_inputs, stats.backlog) == (1, 3, 1)
        gates[3].open("last")

        assert [call.get() for call in calls] == ["", "", "", "last"]

    def test_failed_input_is_retried_as_its_function_says(self, loopback: Loopback, tmp_path: Path) -> None:
        assert function(loopback, "fail_first").remote(str(tmp_path / "trace")) == "try 2"

    def test_cancelled_call_ends_and_its_container_goes_on(self, loopback: Loopback) -> None:
        call = painter(loopback).wait_forever.spawn()
        (container,) = loopback.wait_until(lambda: loopback.containers("sample", "Painter"))
        loopback.wait_until(lambda: "waiting" in container.log)

        call.cancel()

        with pytest.raises(modal.exception.RemoteError):
            call.get()
        assert painter(loopback).env.remote("MODAL_TASK_ID").startswith(container.task_id)

    def test_queued_call_is_cancelled_before_it_runs(self, loopback: Loopback, tmp_path: Path) -> None:
        gates = [Gate(tmp_path / str(number)) for number in range(4)]
        calls = [painter(loopback).hold.spawn(gate.path) for gate in gates]

        with gates[0].held(), gates[1].held(), gates[2].held():
            calls[3].cancel()
            with pytest.raises(modal.exception.RemoteError):
                calls[3].get(timeout=5)

    def test_killed_container_loses_no_input(self, loopback: Loopback, gate: Gate) -> None:
        call = painter(loopback).hold.spawn(gate.path)
        (first,) = loopback.wait_until(lambda: loopback.containers("sample", "Painter"))
        loopback.wait_until(lambda: "holding" in first.log)

        first.kill()
        gate.open("painted after all")

        assert call.get() == "painted after all"
        (second,) = loopback.containers("sample", "Painter")
        assert (first.exit_code, second.was_ready) == (-9, True)

    def test_preempted_container_leaves_its_input_to_the_next(self, loopback: Loopback, gate: Gate) -> None:
        call = painter(loopback).hold.spawn(gate.path)
        (first,) = loopback.wait_until(lambda: loopback.containers("sample", "Painter"))
        loopback.wait_until(lambda: "holding" in first.log)

        first.preempt()
        first.wait("gone")
        gate.open("painted after all")

        assert call.get() == "painted after all"
        assert first.log.splitlines()[-1] == "left"

    def test_redeploy_replaces_containers_and_keeps_ids(self, loopback: Loopback) -> None:
        first = painter(loopback).env.remote("MODAL_TASK_ID")
        function_id = loopback.function("sample", "Painter").function_id
        (container,) = loopback.containers("sample", "Painter")

        loopback.cli("deploy", str(SAMPLE))

        container.wait("gone")
        assert painter(loopback).env.remote("MODAL_TASK_ID") != first
        assert loopback.function("sample", "Painter").function_id == function_id

    def test_changed_secret_is_in_the_next_container(self, loopback: Loopback) -> None:
        loopback.set_secret("sample-secret", {"KEY": "rotated"})
        try:
            assert painter(loopback).env.remote("KEY") == "rotated"
        finally:
            loopback.set_secret("sample-secret", SECRETS["sample-secret"])

    def test_scale_to_zero_runs_exit_methods(self, loopback: Loopback) -> None:
        painter(loopback).env.remote("KEY")
        (container,) = loopback.containers("sample", "Painter")

        loopback.scale_to_zero("sample")

        assert loopback.containers("sample", "Painter") == []
        assert (container.exit_code, container.log.splitlines()[-1]) == (0, "left")

    def test_exception_in_enter_reaches_the_caller(self, loopback: Loopback) -> None:
        loopback.container_env["BREAK_ENTER"] = "1"
        try:
            with pytest.raises(RuntimeError, match="this enter is broken"):
                painter(loopback).env.remote("KEY")
        finally:
            del loopback.container_env["BREAK_ENTER"]


class TestWeb:
    @pytest.fixture
    def http(self, loopback: Loopback) -> Iterator[httpx.Client]:
        with httpx.Client(base_url=loopback.web_url("sample", "web"), trust_env=False, timeout=30) as client:
            yield client

    def test_request_and_answer_go_through_whole(self, http: httpx.Client) -> None:
        answer = http.post("/echo?a=b%20c", headers={"x-sent": "yes"}, content=bytes(3 * 2**20))

        assert (answer.status_code, answer.text) == (201, f"{3 * 2**20} bytes, a=b%20c")
        assert answer.headers["x-seen"] == "yes"

    def test_answer_is_streamed_as_it_is_made(self, http: httpx.Client, gate: Gate) -> None:
        with http.stream("GET", "/stream", params={"gate": gate.path}) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "first"
            gate.open("second")
            assert list(lines) == ["second"]

    def test_container_hears_that_the_client_went(self, loopback: Loopback, gate: Gate) -> None:
        with (
            httpx.Client(base_url=loopback.web_url("sample", "web"), trust_env=False) as client,
            pytest.raises(httpx.ReadTimeout),
        ):
            client.get("/until-disconnect", params={"told": gate.path}, timeout=0.2)

        assert Path(gate.path).read_text() == "gone"

    def test_container_spawns_and_polls_by_itself(self, http: httpx.Client, loopback: Loopback) -> None:
        call = http.get("/spawn", params={"number": 5}).json()["call"]
        modal.FunctionCall.from_id(call, client=loopback.client).get()

        answer = http.get(f"/poll/{call}")

        assert (answer.status_code, answer.json()) == (200, {"result": 10})

    def test_lost_container_answers_500_and_the_request_is_not_tried_again(
        self, http: httpx.Client, loopback: Loopback, gate: Gate
    ) -> None:
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(http.get, "/slow", params={"gate": gate.path})
            with gate.held():
                (container,) = loopback.containers("sample", "web")
                container.kill()

            assert answer.result().status_code == 500
        assert loopback.containers("sample", "web") == []

    def test_slow_request_is_sent_to_an_address_that_has_its_answer(self, gate: Gate) -> None:
        with Loopback(secrets=SECRETS, redirect_after_s=0.0) as loopback:
            loopback.cli("deploy", str(SAMPLE))
            url = loopback.web_url("sample", "web")

            answer = httpx.post(f"{url}/slow", params={"gate": gate.path})
            gate.open("at last")

            assert answer.status_code == 303
            follow = url + answer.headers["location"]
            loopback.wait_until(lambda: any(call.outputs for call in loopback.calls))
            assert httpx.get(follow).text == "at last"


class TestSnapshot:
    def test_thaw_finds_time_gone_by_in_all_processes_and_changed_variables(self, loopback: Loopback) -> None:
        days = timedelta(days=3)
        container = loopback.start("sample", "Painter", asleep=days).wait("frozen")

        container.thaw(env={"KEY": "rotated"})
        wall, monotonic, child_wall, child_monotonic = painter(loopback).slept.remote()

        assert wall == pytest.approx(days.total_seconds(), abs=30)
        assert child_wall == pytest.approx(days.total_seconds(), abs=30)
        assert max(monotonic, child_monotonic) < 30
        assert painter(loopback).env.remote("KEY") == "rotated"
        assert loopback.containers("sample", "Painter") == [container]

    def test_frozen_container_does_nothing(self, loopback: Loopback) -> None:
        container = loopback.start("sample", "Painter", asleep=timedelta(0)).wait("frozen")
        used = container.cpu_seconds()
        call = painter(loopback).env.spawn("KEY")

        with pytest.raises(TimeoutError):
            call.get(timeout=0.5)
        assert container.cpu_seconds() == used

        container.thaw()
        assert call.get() == "value"

    def test_container_on_demand_goes_through_its_snapshot(self, loopback: Loopback) -> None:
        wall, monotonic, *_ = painter(loopback).slept.remote()
        (container,) = loopback.containers("sample", "Painter")

        assert container.log.startswith("loaded")
        assert wall == pytest.approx(monotonic, abs=0.1)
        assert painter(loopback).env.remote("MODAL_TASK_ID") == f"{container.task_id}-restored"

    def test_kill_while_frozen_ends_all_processes(self, loopback: Loopback) -> None:
        container = loopback.start("sample", "Painter", asleep=timedelta(0)).wait("frozen")
        assert len(container.pids()) == 2

        container.kill()

        assert container.pids() == []


WAITS = """
import ctypes, platform, sys, time

c = ctypes.CDLL(None, use_errno=True)
deadline = time.time() + 0.2
until = (ctypes.c_long * 2)(int(deadline), int(deadline % 1 * 1e9))
some, more = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
started = time.monotonic()
match sys.argv[1]:
    case "semaphore":
        c.sem_timedwait(some, until)
    case "condition":
        c.pthread_cond_timedwait(some, more, until)
    case "mutex":
        c.pthread_mutex_lock(some)
        c.pthread_mutex_timedlock(some, until)
    case "futex":
        number = {"x86_64": 202, "aarch64": 98}[platform.machine()]
        wait_bitset, clock_realtime = 9, 256
        flags, every_bit = ctypes.c_long(wait_bitset | clock_realtime), ctypes.c_long(-1)
        c.syscall(ctypes.c_long(number), some, flags, ctypes.c_long(0), until, None, every_bit)
print(time.monotonic() - started)
"""
"""Waits until a time of day, in one of the ways of C."""


@pytest.mark.parametrize("days", [3, -3])
@pytest.mark.parametrize("way", ["semaphore", "condition", "mutex", "futex"])
def test_deadlines_by_a_moved_clock_come_in_time(way: str, days: int, tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    clock.set(timedelta(days=days))

    done = subprocess.run([sys.executable, "-c", WAITS, way], env=clock.env, capture_output=True, text=True, timeout=20)

    assert 0.1 < float(done.stdout) < 5, done.stderr


def test_unforeseen_failure_of_an_rpc_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="AppHeartbeat"), Loopback() as loopback:
        loopback.crashes.append("AppHeartbeat: KeyError")
