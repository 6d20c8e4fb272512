"""What importing a module loads, which import-linter can't say: it sees statements and not what runs."""

import subprocess
import sys
from pathlib import Path

import pytest

import schemas

PROJECT = Path(schemas.__file__).parents[1]
HEAVY = ("ray", "torch", "diffusers", "transformers", "av", "modal")


def loaded_by(*modules: str, heavy: tuple[str, ...] = HEAVY) -> set[str]:
    """The heavy packages that a fresh process has loaded after importing `modules`."""
    code = f"import sys, {', '.join(modules)}; print(*(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def modules_of(folder: str) -> list[str]:
    files = sorted((PROJECT / folder).glob("*.py"))
    return [f"{folder.replace('/', '.')}.{file.stem}" for file in files if file.stem != "__init__"]


@pytest.mark.parametrize(
    "folder", ["schemas", "storage", "serve_graph/api", "serve_graph/webhooks", "serve_graph/client"]
)
def test_importing_all_of_a_package_loads_no_ray_and_no_model_library(folder: str) -> None:
    modules = modules_of(folder)

    assert len(modules) >= 3
    assert loaded_by(*modules) == set()


@pytest.mark.parametrize(
    "module",
    [
        *("serve_graph.jobs", "serve_graph.health", "serve_graph.settings", "serve_graph.stores", "serve_graph.logs"),
        *("serve_graph.metrics", "serve_graph.prompts", "serve_graph.proxy", "serve_graph.server", "serve_graph.cli"),
        *("serve_graph.doctor", "serve_graph.batch_run"),
    ],
)
def test_importing_a_ray_free_module_loads_no_ray_and_no_model_library(module: str) -> None:
    assert loaded_by(module) == set()


def test_importing_the_application_loads_ray_and_no_model_library() -> None:
    assert loaded_by("serve_graph.app") == {"ray"}


def test_importing_the_text_encoder_loads_no_diffusers_which_takes_seconds() -> None:
    assert loaded_by("serve_graph.text_encoding") == {"torch", "transformers"}


def test_importing_the_engine_loads_no_text_encoder_which_takes_seconds() -> None:
    heavy = ("diffusers", "transformers.models.umt5", "diffusers.pipelines.wan.pipeline_wan")
    assert loaded_by("serve_graph.engine.loop", heavy=heavy) == {"diffusers"}
