"""Reading a Serve config file, and what is told before anything starts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

import serve_graph
from serve_graph import server
from serve_graph.api_keys import new_key
from serve_graph.server import IMPORT_PATH, StartFailed, load_config, serve_forever
from serve_graph.settings import ConfigError

PROJECT = Path(serve_graph.__file__).parents[1]
LOCAL = PROJECT / "configs/local.yaml"
SECRET = "correct horse battery staple"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A config file to write to."""
    return tmp_path / "config.yaml"


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_local_config_loads_and_serve_accepts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(LOCAL)

    schema = ServeDeploySchema.model_validate(config.serve)
    assert schema.http_options.host == config.host == "127.0.0.1"
    assert schema.http_options.port == config.port == 8000
    (application,) = schema.applications
    assert application.import_path == IMPORT_PATH
    assert application.name == config.app_name
    assert config.settings.profile.name == "wan-tiny"
    assert config.settings.public_url == "http://127.0.0.1:8000"
    assert config.settings.storage.folder == tmp_path / "data/store"


def test_load_config_writes_the_settings_that_hold_into_serves_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_URL_TTL_S", "77")
    config = load_config(LOCAL)

    (application,) = config.serve["applications"]
    assert application["args"] == config.settings.model_dump(mode="json")
    assert application["args"]["url_ttl_s"] == 77
    assert Path(application["args"]["storage"]["folder"]).is_absolute()
    assert Path(application["args"]["data_dir"]).is_absolute()


def test_load_config_takes_host_and_port_over_the_files() -> None:
    config = load_config(LOCAL, port=8123)

    assert config.port == config.serve["http_options"]["port"] == 8123
    assert config.settings.public_url == "http://127.0.0.1:8123"


def test_load_config_never_holds_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_SIGNING_SECRET", SECRET)

    assert SECRET not in str(load_config(LOCAL))


def test_load_config_names_a_missing_file(config_file: Path) -> None:
    assert refusal(config_file) == f"there is no config file {config_file}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("applications: [", "is not valid YAML"),
        ("\tapplications:", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("", "must hold a mapping"),
        ("- a\n- b", "must hold a mapping"),
        ("just text", "must hold a mapping"),
        ("{}", IMPORT_PATH),
        ("applications: []", IMPORT_PATH),
        ("applications: none", IMPORT_PATH),
        ("applications: 5", IMPORT_PATH),
        ("applications: {name: wan}", IMPORT_PATH),
        ("applications: [5]", IMPORT_PATH),
        ("applications: [{import_path: 'other:app'}]", IMPORT_PATH),
    ],
)
def test_load_config_says_what_is_wrong_with_a_file(config_file: Path, text: str, says: str) -> None:
    config_file.write_text(text)
    message = refusal(config_file)

    assert says in message
    assert str(config_file) in message


def test_load_config_refuses_bytes_that_are_no_text(config_file: Path) -> None:
    config_file.write_bytes(b"\xff\xfe\x00")

    assert str(config_file) in refusal(config_file)


def test_load_config_refuses_a_folder(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"modle": {}}, "unknown setting modle"),
        ({"model": {"profile": "wan3"}}, "wan3"),
        ({"queue": {"max_waiting_jobs": 0}}, "queue.max_waiting_jobs"),
        (["model"], "args must be a mapping"),
        ("wan-tiny", "args must be a mapping"),
    ],
)
def test_load_config_names_a_bad_setting(config_file: Path, args: object, named: str) -> None:
    config_file.write_text(yaml.safe_dump({"applications": [{"import_path": IMPORT_PATH, "args": args}]}))

    assert named in refusal(config_file)


@pytest.mark.parametrize("http_options", ["http_options: 5", "http_options: {port: http}", "http_options: {port: 0.5}"])
def test_load_config_refuses_http_options_that_are_none(config_file: Path, http_options: str) -> None:
    config_file.write_text(f"{http_options}\napplications: [{{import_path: '{IMPORT_PATH}'}}]")

    assert "http_options" in refusal(config_file)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])  # noqa: S104  # refused
def test_load_config_refuses_a_host_that_is_not_loopback(host: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        load_config(LOCAL, host=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])  # noqa: S104  # with keys
def test_load_config_takes_any_host_with_api_keys(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("WAN_API_KEYS", new_key("alice")[1])
    monkeypatch.setenv("WAN_PUBLIC_URL", "https://wan.example.com")

    assert load_config(LOCAL, host=host).host == host


def test_load_config_takes_any_host_without_keys_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_AUTH", "none")

    assert load_config(LOCAL, host="192.0.2.1").settings.public_url == "http://192.0.2.1:8000"


def test_load_config_asks_for_a_public_url_where_it_listens_on_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAN_AUTH", "none")

    with pytest.raises(ConfigError, match="public_url"):
        load_config(LOCAL, host="0.0.0.0")  # noqa: S104  # refused


@pytest.mark.parametrize(
    ("keys", "auth", "told"),
    [("alice:nonsense", "keys", "line 1"), (new_key("alice")[1], "none", "auth is none")],
    ids=["no key", "keys and none"],
)
def test_load_config_refuses_keys_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, keys: str, auth: str, told: str
) -> None:
    monkeypatch.setenv("WAN_API_KEYS", keys)
    monkeypatch.setenv("WAN_AUTH", auth)

    with pytest.raises(ConfigError, match=told):
        load_config(LOCAL)


def test_a_taken_port_is_told_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartFailed, match=f"port {port} on 127.0.0.1 is taken") as caught:
            serve_forever(load_config(LOCAL, port=port))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "exit_code", "says"), [("missing.yaml", 2, "missing.yaml"), (str(LOCAL), 1, "is taken")]
)
def test_command_tells_its_failure_in_one_line(tmp_path: Path, config: str, exit_code: int, says: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "serve_graph.cli", "serve", "--config", config, "--port", port]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            capture_output=True,
            text=True,
            check=False,
        )

    assert done.returncode == exit_code
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("wan-serve: ")
    assert says in line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"proxy_locatoin": "HeadOnly"}, "proxy_locatoin"),
        ({"http_options": {"prot": 9000}}, "http_options.prot"),
        ({"applications": [{"import_path": IMPORT_PATH, "arg": {}}]}, "applications.arg"),
    ],
)
def test_check_schema_refuses_a_key_that_serve_would_ignore(
    config_file: Path, change: dict[str, object], named: str
) -> None:
    config_file.write_text(yaml.safe_dump({"applications": [{"import_path": IMPORT_PATH}], **change}))

    config = load_config(config_file)

    with pytest.raises(ConfigError, match=f"unknown key {named} in"):
        server.check_schema(config.serve)


def test_token_file_is_a_start_s_own_and_private(tmp_path: Path) -> None:
    first, second = server._token_file(tmp_path), server._token_file(tmp_path)

    assert first != second
    assert first.read_text() != second.read_text()
    assert first.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("as_json", [False, True])
def test_ready_line_names_the_places(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    server._tell_ready("http://x:1", 2.34, as_json)

    (line,) = capsys.readouterr().out.splitlines()
    if as_json:
        told = json.loads(line)
        assert (told["ready"], told["docs"], told["start_s"]) == ("http://x:1", "http://x:1/docs", 2.3)
    else:
        assert line.startswith("ready in 2.3 s: http://x:1  docs http://x:1/docs  health ")
