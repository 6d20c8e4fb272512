"""Loading the generator's parts of a checkpoint in diffusers' layout; the text's are in `text_checkpoint`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanTransformer3DModel

from schemas.errors import RenderFailed
from schemas.loras import AppliedLora
from schemas.presets import Levers, Preset
from serve_graph.engine.channel_norm import quicken_norms
from serve_graph.engine.devices import DTYPES
from serve_graph.engine.lora import Adapter, Parts, adapter_on, load_adapter, parts_of
from serve_graph.engine.malloc import keep_freed_memory
from serve_graph.engine.quick_conv import quicken_convolutions
from serve_graph.engine.text_keys import take_text_keys


@dataclass(frozen=True)
class GeneratorParts:
    """What denoising and decoding need. `scheduler` is a template: each job gets one of its own.

    quick_vae: the VAE in bfloat16, where a preset decodes with it; the very same one where the VAE is that already.
    loras: those that jobs may name.
    """

    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan
    scheduler: SchedulerMixin
    device: torch.device
    quick_vae: AutoencoderKLWan | None = None
    loras: Mapping[str, Adapter] = field(default_factory=dict)

    def vae_for(self, levers: Levers) -> AutoencoderKLWan:
        """The one to decode with: itself too for a job that another version of the profile admitted, with a copy."""
        return self.quick_vae or self.vae if levers.bfloat16_decode else self.vae

    def parts_of(self, loras: Sequence[AppliedLora]) -> Parts:
        """What these add to the transformer. Raises RenderFailed for one that only another configuration allowed."""
        gone = [lora.name for lora in loras if lora.name not in self.loras]
        if gone:
            raise RenderFailed(f"the LoRA {gone[0]} is not served any more")
        return parts_of(self.transformer, [(self.loras[lora.name], lora.weight) for lora in loras])


def load_generator_parts(
    folder: Path,
    device: torch.device,
    dtype: str,
    vae_dtype: str,
    runs_on: torch.device | None = None,
    *,
    presets: Iterable[Preset] = (),
    loras: Mapping[str, Path] | None = None,
    scheduler: str | None = None,
) -> GeneratorParts:
    """Load the transformer, the VAE and the scheduler's configuration.

    runs_on: where `moved` will take them. presets: those that jobs may have. loras: safetensors files by name.
    scheduler: the profile's, see `load_scheduler`. Raises ModelNotReady for a LoRA that can't be had.
    """
    transformer = WanTransformer3DModel.from_pretrained(
        folder / "transformer", torch_dtype=DTYPES[dtype], **_mapping(device)
    )
    transformer = transformer.to(device).eval().requires_grad_(False)
    take_text_keys(transformer)
    adapters = {name: load_adapter(file, transformer) for name, file in (loras or {}).items()}
    runs_on = runs_on or device
    if runs_on.type == "cpu":
        keep_freed_memory()
    vae = quick_vae = _load_vae(folder, device, vae_dtype, runs_on)
    if not any(preset.levers.bfloat16_decode for preset in presets):
        quick_vae = None
    elif vae_dtype != "bfloat16":
        quick_vae = _load_vae(folder, device, "bfloat16", runs_on)
    return GeneratorParts(
        transformer=transformer,
        vae=vae,
        scheduler=load_scheduler(folder, scheduler),
        device=device,
        quick_vae=quick_vae,
        loras=adapters,
    )


def _load_vae(folder: Path, device: torch.device, dtype: str, runs_on: torch.device) -> AutoencoderKLWan:
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=DTYPES[dtype], **_mapping(device))
    if runs_on.type == "cpu":
        quicken_norms(vae)
        quicken_convolutions(vae)
    return vae.to(device).eval().requires_grad_(False)


def load_scheduler(folder: Path, name: str | None = None) -> SchedulerMixin:
    """The scheduler that the checkpoint names, or `euler`.

    `euler` takes the times that UniPC takes, n even ones from 1 to 0, then shifted, and between two of them goes
    straight on: DPM-Solver++ of first order, which is Euler's step along Wan's flow.
    """
    if name == "euler":
        return diffusers.DPMSolverMultistepScheduler(
            solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True
        )
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler_class: Any = getattr(diffusers, config["_class_name"])
    return scheduler_class.from_config(config)


def moved(parts: GeneratorParts, device: torch.device) -> GeneratorParts:
    """The same parts on another device."""
    parts.transformer.to(device)
    for vae in (parts.vae, parts.quick_vae):
        if vae is not None:
            vae.to(device)
    loras = {name: adapter_on(adapter, device) for name, adapter in parts.loras.items()}
    return replace(parts, device=device, loras=loras)


def _mapping(device: torch.device) -> dict[str, bool]:
    """On the CPU, weights read through a memory map are less aligned, which moves results by about 1e-7."""
    return {"disable_mmap": device.type == "cpu"}
