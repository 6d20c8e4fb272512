"""Finding and loading checkpoints: a folder in diffusers' layout, and the one that is shipped."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from schemas.errors import ModelNotReady
from schemas.loras import Lora
from schemas.official_profiles import WAN_1_3B, WAN_TINY
from serve_graph.engine.checkpoint import load_generator_parts, load_scheduler
from serve_graph.engine.checkpoint_folder import SHIPPED, FoundCheckpoint, locate_checkpoint, locate_loras
from serve_graph.engine.devices import pick_device, resolve_dtype
from serve_graph.engine.text_checkpoint import load_text_parts

CPU = torch.device("cpu")


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


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A folder with one adapter, one with two, and a checkpoint's folder with one of the hub's."""
    names = ("one/a.safetensors", "two/a.safetensors", "two/b.safetensors", "checkpoint/loras/hub/sub/c.safetensors")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return {name: tmp_path / name for name in names}


HUB = Lora(hub_id="them/theirs", weight_name="sub/c.safetensors")


@pytest.mark.parametrize(
    ("lora", "path", "found"),
    [
        (Lora(), "one/a.safetensors", "one/a.safetensors"),
        (Lora(), "one", "one/a.safetensors"),
        (Lora(weight_name="b.safetensors"), "two", "two/b.safetensors"),
        (HUB, None, "checkpoint/loras/hub/sub/c.safetensors"),
        (HUB, "one/a.safetensors", "one/a.safetensors"),
    ],
)
def test_locate_loras_finds_the_file(
    files: dict[str, Path], tmp_path: Path, lora: Lora, path: str | None, found: str
) -> None:
    paths = {} if path is None else {"hub": tmp_path / path}

    assert locate_loras({"hub": lora}, paths, tmp_path / "checkpoint") == {"hub": files[found]}


@pytest.mark.parametrize(
    ("lora", "path", "says"),
    [
        (Lora(), "gone.safetensors", "there is no LoRA x: model.loras.x.path must name"),
        (Lora(weight_name="z.safetensors"), "two", "there is no LoRA x"),
        (Lora(), "two", "in a folder of 2 safetensors files: set model.loras.x.weight_name"),
        (Lora(), None, "the LoRA x lies nowhere: set model.loras.x.path"),
        (HUB, None, "them/theirs could not be fetched from the hub: download it elsewhere"),
    ],
)
def test_locate_loras_says_in_one_line_what_is_missing(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Lora, path: str | None, says: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    paths = {} if path is None else {"x": tmp_path / path}

    with pytest.raises(ModelNotReady, match=says) as refused:
        locate_loras({"x": lora}, paths, tmp_path / "two")

    assert "\n" not in refused.value.detail
    assert str(tmp_path) not in refused.value.detail


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
