"""`wan-serve plan`."""

import json
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from serve_graph.cli import app
from serve_graph.plan import EFFICIENCY, GPUS

SMALL = ("--gpu", "L4", "--profile", "wan2.1-t2v-1.3b")
LARGE = ("--gpu", "L4", "--profile", "wan2.1-t2v-14b")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def document(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return found


def test_plan_shows_what_is_where_and_that_it_is_an_estimate() -> None:
    done = run(*SMALL, "--price-per-hour", "0.8")

    assert done.exit_code == 0, done.output
    assert "on the GPU   transformer bfloat16 2.6 GiB, VAE float32 0.5 GiB" in done.stdout
    assert "on the host  text encoder float32 21.2 GiB" in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("480p 16:9 (832x480)")]
    assert " ".join(row.split()[3:]) == "81 3.4 GiB 1.5 GiB 7.2 GiB 11.9 GiB yes 236 s 590 s 0.131"
    assert "An estimate, not a measurement." in done.stdout


def test_plan_without_a_price_names_no_cost() -> None:
    assert [clip["cost"] for clip in document(*SMALL)["clips"]] == [None, None]


def test_plan_as_json_has_the_same_in_bytes_and_seconds() -> None:
    found = document(*SMALL, "--price-per-hour", "0.8")

    assert (found["fits"], found["measured"], found["efficiency"]) == (True, False, EFFICIENCY)
    assert found["gpu"] == {"name": "L4", "memory_bytes": GPUS["L4"].memory_bytes, "peak_flops": 121e12}
    assert found["placement"]["text_on_gpu"] is False
    clip = found["clips"][0]
    assert clip["bytes"]["transformer"] == 2_844_248_192
    assert clip["flop"]["denoise"] == 100 * 283_001_787_777_024
    assert clip["cost"] == pytest.approx(clip["expected_s"] * 0.8 / 3_600)
    assert clip["nearest"] == []


def test_plan_where_nothing_fits_names_the_nearest_and_fails() -> None:
    done = run(*LARGE)

    assert done.exit_code == 1
    assert "480p 16:9, 81 frames: fits with an A100-40GB" in done.stdout
    assert "720p 16:9, 81 frames: fits with an A100-80GB" in done.stdout
    assert document(*LARGE)["fits"] is False


def test_plan_with_the_text_encoder_on_the_gpu_says_to_move_it() -> None:
    done = run(*SMALL, "--text-device", "cuda")

    assert done.exit_code == 1
    assert "on the host  nothing" in done.stdout
    assert "fits with the text encoder on the CPU (model.text_device: cpu), or an A100-40GB" in done.stdout


def test_plan_succeeds_where_some_of_it_fits() -> None:
    found = document("--gpu", "A100-40GB", "--profile", "wan2.1-t2v-14b")

    assert found["fits"] is True
    assert [clip["fits"] for clip in found["clips"]] == [True, True, False, False]


def test_plan_takes_steps_and_guidance() -> None:
    few = document(*SMALL, "--steps", "4", "--guidance-scale", "1")["clips"][0]

    assert few["flop"]["denoise"] == 4 * 283_001_787_777_024


@pytest.mark.parametrize(
    "arguments",
    [
        ("--gpu", "L5", "--profile", "wan2.1-t2v-1.3b"),
        ("--gpu", "L4", "--profile", "wan9"),
        ("--gpu", "L4"),
        (*SMALL, "--dtype", "int8"),
        (*SMALL, "--price-per-hour", "-1"),
        (*SMALL, "--steps", "0"),
    ],
)
def test_plan_refuses_what_it_does_not_know(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)

    assert done.exit_code == 2
    assert done.stdout == ""
