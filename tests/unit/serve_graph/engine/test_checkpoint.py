"""Finding and loading checkpoints: a folder in diffusers' layout, and the one that is shipped."""

import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from random_checkpoint import BUILD, build_random_checkpoint

from schemas.errors import ModelNotReady
from schemas.official_profiles import WAN_1_3B, WAN_TINY
from serve_graph.engine.checkpoint import (
    load_generator_parts,
    load_scheduler,
    load_text_parts,
    pick_device,
    resolve_dtype,
)
from serve_graph.engine.checkpoint_folder import SHIPPED, FoundCheckpoint, locate_checkpoint

CPU = torch.device("cpu")


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def test_random_checkpoint_has_the_same_bytes_when_built_by_two_processes_at_once(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        folders = list(processes.map(build_random_checkpoint, [tmp_path, tmp_path]))

    assert folders == [tmp_path / BUILD] * 2
    assert digests(folders[0]) == digests(tiny_folder)
    assert [path.name for path in tmp_path.iterdir()] == [BUILD]  # the loser's scratch is gone


def test_random_checkpoint_leaves_torchs_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()

    build_random_checkpoint(tmp_path)

    assert torch.equal(torch.get_rng_state(), before)


def test_random_checkpoint_is_not_built_again_when_it_is_there(tiny_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_folder.rglob("*")}

    build_random_checkpoint(tiny_folder.parent)

    assert {path: path.stat().st_mtime_ns for path in tiny_folder.rglob("*")} == before


def test_locate_checkpoint_takes_the_configured_folder(tiny_folder: Path) -> None:
    assert locate_checkpoint(WAN_1_3B, tiny_folder, "abc") == FoundCheckpoint(tiny_folder, "abc")


def test_locate_checkpoint_takes_the_shipped_one_when_the_profile_has_no_hub_id() -> None:
    found = locate_checkpoint(WAN_TINY, None, None)

    assert found.folder == SHIPPED
    assert re.fullmatch("[0-9a-f]{12}", found.revision or "")


@pytest.mark.parametrize("part", ["vae", "model_index.json"])
def test_locate_checkpoint_names_what_is_missing(tiny_folder: Path, tmp_path: Path, part: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    shutil.rmtree(broken / part) if (broken / part).is_dir() else (broken / part).unlink()

    with pytest.raises(ModelNotReady, match=part) as refusal:
        locate_checkpoint(WAN_TINY, broken, None)

    assert str(tmp_path) not in refusal.value.detail


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_parts_come_in_the_asked_dtype_and_need_no_gradients(tiny_folder: Path, dtype: str) -> None:
    generator = load_generator_parts(tiny_folder, CPU, dtype, "float32")
    text = load_text_parts(tiny_folder, CPU, dtype)

    assert str(generator.transformer.dtype) == str(text.text_encoder.dtype) == f"torch.{dtype}"
    assert generator.vae.dtype == torch.float32
    for module in (generator.transformer, generator.vae, text.text_encoder):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_load_scheduler_takes_the_class_that_the_checkpoint_names(tiny_folder: Path, tmp_path: Path) -> None:
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(tmp_path / "scheduler")

    assert isinstance(load_scheduler(tiny_folder), UniPCMultistepScheduler)
    assert isinstance(load_scheduler(tmp_path), FlowMatchEulerDiscreteScheduler)
    assert load_scheduler(tmp_path).config.shift == 5.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_pick_device_refuses_a_gpu_that_is_not_there() -> None:
    assert pick_device("auto", "model.device") == CPU
    with pytest.raises(ModelNotReady, match="no GPU"):
        pick_device("cuda:0", "model.device")


def test_resolve_dtype_is_bfloat16_on_a_gpu_only() -> None:
    assert resolve_dtype("auto", torch.device("cuda")) == "bfloat16"
    assert resolve_dtype("auto", CPU) == "float32"
    assert resolve_dtype("float16", CPU) == "float16"
