"""`wan-serve doctor`: what it finds, what it advises, and that it leaves everything as it was."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_graph import doctor
from serve_graph.doctor import examine
from serve_graph.findings import Check, Mark
from serve_graph.open_ports import refused_port, worker_ports
from serve_graph.store_checks import clock_check
from storage.local import LocalStore


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def config_in(folder: Path, port: int, **args: Any) -> Path:
    path = folder / "serve.yaml"
    store = {"kind": "local", "folder": str(folder / "store")}
    application = {
        "import_path": "serve_graph.app:build_app",
        "args": {"data_dir": str(folder / "data"), "storage": store, **args},
    }
    path.write_text(yaml.safe_dump({"http_options": {"port": port}, "applications": [application]}))
    return path


def found(checks: list[Check], name: str) -> Check:
    (one,) = [check for check in checks if check.name == name]
    return one


def test_doctor_is_content_with_a_laptop_and_changes_nothing(tmp_path: Path, free_port: int) -> None:
    checks = examine(config_in(tmp_path, free_port))

    assert [check for check in checks if check.mark is Mark.FAIL] == []
    assert {"configuration", "API keys", "secret", "model", "GPU", "disk", "store", "clock", "port", "open ports"} == {
        check.name for check in checks
    }
    assert [path.name for path in tmp_path.iterdir()] == ["serve.yaml"]


def test_doctor_tells_a_wrong_configuration_and_stops_there(tmp_path: Path, free_port: int) -> None:
    (check,) = examine(config_in(tmp_path, free_port, modle={}))

    assert (check.name, check.mark) == ("configuration", Mark.FAIL)
    assert "modle" in check.found


def test_doctor_tells_a_secret_that_is_too_short(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAN_SIGNING_SECRET", "short")

    assert found(examine(config_in(tmp_path, free_port)), "secret").mark is Mark.FAIL


def test_doctor_tells_a_model_that_is_not_there(tmp_path: Path, free_port: int) -> None:
    checks = examine(config_in(tmp_path, free_port, model={"path": str(tmp_path / "no")}))

    assert found(checks, "model").mark is Mark.FAIL


def test_doctor_looks_for_the_loras_that_lie_here(tmp_path: Path, free_port: int) -> None:
    (tmp_path / "style.safetensors").touch()
    loras = {"style": {"path": str(tmp_path)}, "gone": {"path": str(tmp_path / "gone.safetensors")}}
    examined = examine(config_in(tmp_path, free_port, model={"loras": loras}))

    gone, style = [check for check in examined if check.name == "LoRA"]  # YAML's order
    assert (gone.mark, style.mark) == (Mark.FAIL, Mark.OK)
    assert "no LoRA gone" in gone.found
    assert "style.safetensors" in style.found


def test_doctor_tells_a_gpu_that_is_missing(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    wanted = {"profile": "wan2.1-t2v-1.3b", "device": "cuda"}

    assert found(examine(config_in(tmp_path, free_port, model=wanted)), "GPU").mark is Mark.FAIL
    assert found(examine(config_in(tmp_path, free_port, model={**wanted, "device": "auto"})), "GPU").mark is Mark.WARN


@pytest.mark.parametrize(("free", "mark"), [(2**20, Mark.FAIL), (2 * 2**30, Mark.WARN), (2**40, Mark.OK)])
def test_doctor_tells_a_full_disk(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch, free: int, mark: Mark
) -> None:
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=free))
    disks = [check for check in examine(config_in(tmp_path, free_port)) if check.name == "disk"]

    assert [check.mark for check in disks] == [mark, mark]


def test_doctor_tells_a_file_system_without_conditional_writes(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LocalStore.put
    monkeypatch.setattr(LocalStore, "put", lambda self, key, body, **condition: put(self, key, body))

    assert found(examine(config_in(tmp_path, free_port)), "store").mark is Mark.FAIL
    assert [path.name for path in tmp_path.iterdir()] == ["serve.yaml"]


@pytest.mark.parametrize("off_s", [-3600, 3600])
def test_doctor_tells_a_clock_that_is_off(off_s: float) -> None:
    assert clock_check("the store's", off_s).mark is Mark.FAIL
    assert clock_check("the store's", off_s / 3600).mark is Mark.OK


@pytest.fixture
def foreign_server() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign, assignment]  # silent
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_doctor_tells_a_taken_port(tmp_path: Path, foreign_server: int) -> None:
    check = found(examine(config_in(tmp_path, foreign_server)), "port")

    assert (check.mark, "--port" in check.advice) == (Mark.FAIL, True)
    assert refused_port("127.0.0.1", foreign_server) == "is taken"


def test_doctor_tells_an_address_without_keys_or_tls(tmp_path: Path, free_port: int) -> None:
    config = config_in(tmp_path, free_port, auth="none", public_url="http://wan.example.com")
    checks = examine(config, host="0.0.0.0")  # noqa: S104  # looked at, not listened on

    assert found(checks, "API keys").mark is Mark.WARN
    assert [check.mark for check in checks if check.name == "port"] == [Mark.OK, Mark.WARN]


def test_worker_ports_are_those_beyond_loopback_of_serves_replicas() -> None:
    code = (
        "import socket, sys\n"
        "open_to_all, loopback = socket.create_server(('0.0.0.0', 0)), socket.create_server(('127.0.0.1', 0))\n"
        "print(open_to_all.getsockname()[1], flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "ray::ServeReplica:wan:Ingress"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        ports = worker_ports()
        process.communicate()

    assert port in ports


def test_doctor_tells_a_bucket_that_does_not_answer(tmp_path: Path, free_port: int) -> None:
    s3 = {"endpoint": f"http://127.0.0.1:{free_port}", "bucket": "clips", "retries": 0}
    checks = examine(config_in(tmp_path, free_port, storage={"kind": "s3", "s3": s3}))

    assert found(checks, "store").mark is Mark.FAIL


def test_command_prints_json_and_ends_with_1_when_something_is_wrong(tmp_path: Path, foreign_server: int) -> None:
    command = [sys.executable, "-m", "serve_graph.cli", "doctor", "--config", str(config_in(tmp_path, foreign_server))]
    environment = {**os.environ, "WAN_URL": "http://x", "WAN_API_KEY": "wan_x"}
    for_people = subprocess.run(command, capture_output=True, text=True, env=environment)
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment)

    assert (for_people.returncode, as_json.returncode) == (1, 1)
    assert "fail  port" in for_people.stdout
    printed = json.loads(as_json.stdout)
    assert printed["ok"] is False
    assert {"name", "mark", "found", "advice"} == set(printed["checks"][0])
