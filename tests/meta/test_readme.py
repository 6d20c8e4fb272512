"""The README knows every setting, metric, problem and make target: who adds one has to say so there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard, get_args

import pytest
from pydantic import BaseModel
from pydantic_settings import NoDecode

import serve_graph
from schemas.errors import InvalidRequest, Unavailable
from schemas.official_profiles import WAN_TINY
from schemas.requests import GenerateRequest
from serve_graph.cli import app
from serve_graph.metrics import PROBLEMS, describe
from serve_graph.settings import CLIENT_NAMES, ENV_PREFIX, SECRET_NAMES, Settings

PROJECT = Path(serve_graph.__file__).parents[1]
TARGET = re.compile(r"^([a-z][a-z0-9-]*):", re.MULTILINE)


def is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def settings_of(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every setting: ("model", "profile")."""
    for name, field in model.model_fields.items():
        parts = () if NoDecode in field.metadata else (field.annotation, *get_args(field.annotation))
        section = next((part for part in parts if is_section(part)), None)
        if section is not None:
            yield from settings_of(section, (*path, name))
        else:
            yield (*path, name)


SETTINGS = list(settings_of(Settings))
METRICS = [name for name, *_ in describe()]
TARGETS = TARGET.findall((PROJECT / "Makefile").read_text())


@pytest.fixture(scope="module")
def words() -> set[str]:
    """The README's words; names may hold dots, hyphens and underscores."""
    text = (PROJECT / "README.md").read_text()
    return {word.strip(".-") for word in re.findall(r"[A-Za-z0-9_.-]+", text)}


def test_readme_tells_the_shipped_model_s_own_limits() -> None:
    with pytest.raises(InvalidRequest) as refused:
        WAN_TINY.resolve(GenerateRequest(prompt="a", num_frames=80))
    assert f"# num_frames: {refused.value.errors[0].message}\n" in (PROJECT / "README.md").read_text()


@pytest.mark.parametrize("path", SETTINGS, ids=".".join)
def test_readme_names_every_setting_and_its_variable(words: set[str], path: tuple[str, ...]) -> None:
    assert ".".join(path) in words
    assert ENV_PREFIX + "__".join(path).upper() in words


@pytest.mark.parametrize("name", sorted(SECRET_NAMES | CLIENT_NAMES))
def test_readme_names_every_secret_and_the_client_s_variables(words: set[str], name: str) -> None:
    assert name in words


@pytest.mark.parametrize("name", METRICS)
def test_readme_names_every_metric(words: set[str], name: str) -> None:
    assert name in words


@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - {Unavailable.name}))  # a base class: nothing answers it
def test_readme_names_every_problem(words: set[str], name: str) -> None:
    assert name in words


@pytest.mark.parametrize("target", TARGETS)
def test_readme_names_every_make_target(target: str) -> None:
    assert re.search(rf"\bmake {target}\b", (PROJECT / "README.md").read_text())


@pytest.mark.parametrize("command", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_readme_names_every_command(command: str) -> None:
    assert re.search(rf"`{command}\b|wan-serve {command}\b", (PROJECT / "README.md").read_text())


def test_there_are_settings_metrics_and_targets_to_look_for() -> None:
    assert ("model", "profile") in SETTINGS
    assert "wan_jobs_total" in METRICS
    assert {"demo", "test", "check"} <= set(TARGETS)
    assert "invalid-request" in PROBLEMS
