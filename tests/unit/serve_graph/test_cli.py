"""The command line's `key new`; `serve` and `demo` are tried with the real service in tests/integration."""

import inspect
import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from serve_graph.api_keys import ApiKeys, Principal, Role
from serve_graph.cli import app


def test_key_new_prints_the_key_and_its_line() -> None:
    done = CliRunner().invoke(app, ["key", "new", "alice", "--role", "monitor", "--requests-per-minute", "60"])

    assert done.exit_code == 0
    key, line = done.stdout.splitlines()
    assert ApiKeys(line).principal_of(key) == Principal("alice", Role.MONITOR, None, 60)
    assert "Authorization: Bearer" in done.stderr
    assert key not in done.stderr


def test_key_new_prints_json() -> None:
    printed = json.loads(CliRunner().invoke(app, ["key", "new", "alice", "--json"]).stdout)

    assert ApiKeys(printed["line"]).principal_of(printed["key"]) is not None


@pytest.mark.parametrize("command", [c.callback for c in app.registered_commands], ids=lambda c: c.__name__)
def test_every_command_takes_json(command: Callable[..., None]) -> None:
    assert "as_json" in inspect.signature(command).parameters


@pytest.mark.parametrize("arguments", [["Alice"], ["anonymous"], ["alice", "--role", "admin"], [], ["a:b"]])
def test_key_new_refuses_what_makes_no_key(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["key", "new", *arguments])

    assert done.exit_code == 2
    assert done.stdout == ""
