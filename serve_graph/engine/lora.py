"""LoRA adapters beside the transformer's weights: y = W x + the sum of weight * alpha / rank * B(A x).

Nothing is merged into W, and nothing stays on a module: the sums are hooks on the `Linear` layers for as long as one
forward of a job that has adapters takes. A forward without any is the transformer's own, bit by bit.

Source of the file formats: diffusers' `WanLoraLoaderMixin`, whose conversion needs no peft.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open

from schemas.errors import ModelNotReady
from serve_graph.logs import log_event

_PREFIX: Final = "transformer."
_METADATA: Final = "lora_adapter_metadata"
"""Where diffusers keeps alpha, as JSON in the file's header. Source: `LORA_ADAPTER_METADATA_KEY`."""

_KINDS: Final = {"A.weight", "B.weight", "B.bias"}
"""What a layer may have in a file; some have a bias alone."""

FUSED: Final = {"attn1": ("to_qkv", ("to_q", "to_k", "to_v")), "attn2": ("to_kv", ("to_k", "to_v"))}
"""By the attention's name: once `tuning.fuse_projections` has run, one layer in place of these, rows in this order."""


@dataclass(frozen=True)
class Delta:
    """What one adapter adds to one layer. down: (rank, in). up: (out, rank), times alpha / rank. bias: (out,)."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return torch.nn.functional.linear(torch.nn.functional.linear(x, self.down), self.up, self.bias)

    def fits(self, linear: torch.nn.Linear) -> bool:
        """Whether its sizes are that layer's."""
        size_in, size_out, rank = linear.in_features, linear.out_features, len(self.down)
        biased = self.bias is None or self.bias.shape == (size_out,)
        return self.down.shape == (rank, size_in) and self.up.shape == (size_out, rank) and biased

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Delta":
        """The same elsewhere."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return Delta(self.down.to(device, dtype), self.up.to(device, dtype), bias)


Adapter = Mapping[str, Delta]
"""By the layer's path in the transformer, such as `blocks.0.attn1.to_q`."""


@dataclass(frozen=True)
class Part:
    """What is added to a layer's outputs from `start` on."""

    delta: Delta
    weight: float
    start: int


Parts = Mapping[torch.nn.Module, Sequence[Part]]
"""By the layer: all that one job adds."""


def load_adapter(path: Path, transformer: WanTransformer3DModel) -> Adapter:
    """Read a safetensors file in diffusers', the original Wan's, or musubi-tuner's naming, for this transformer.

    To be called before the transformer is tuned. Changes of norms and of the first convolution, which some files have
    beside, are left out as diffusers leaves them out, with a warning in the log. Raises ModelNotReady for a file that
    is missing, can't be read, is no LoRA, or has a layer that this transformer lacks or has in another size.
    """
    layers, scaling = _read(path)
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    adapter: dict[str, Delta] = {}
    for layer, found in layers.items():
        linear = linears.get(layer)
        if linear is None or not found.keys() <= _KINDS or ("A.weight" in found) != ("B.weight" in found):
            raise ModelNotReady(f"the LoRA file {path.name} has {layer or 'a tensor'}, for which this model has no use")
        delta = _delta(found, linear.in_features, linear.out_features, scaling)
        if not delta.fits(linear):
            raise ModelNotReady(f"the LoRA file {path.name} is for a model of another size: {layer} differs")
        adapter[layer] = delta.to(linear.weight.device, linear.weight.dtype)
    if not adapter:
        raise ModelNotReady(f"the LoRA file {path.name} holds nothing for Wan's transformer")
    return adapter


def _read(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], Callable[[int], float]]:
    """Each layer's tensors by `_KINDS`, and what `_scaling` says."""
    from diffusers import WanPipeline  # it loads the text encoder's classes: 2 s that only whoever has adapters pays

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError) as error:
        raise ModelNotReady(f"the LoRA file {path.name} is missing or can't be read as safetensors") from error
    if any("dora_scale" in name for name in tensors):
        raise ModelNotReady(f"the LoRA file {path.name} is a DoRA, which is not supported")
    left_out = sum(name.endswith(".diff") and bool(tensor.any()) for name, tensor in tensors.items())
    if left_out:
        log_event("lora_tensors_left_out", level=logging.WARNING, file=path.name, tensors=left_out)
    try:
        named: dict[str, torch.Tensor] = WanPipeline.lora_state_dict(tensors)
        scaling = _scaling(json.loads(header.get(_METADATA, "{}")))
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # whatever the conversion trips over
        raise ModelNotReady(f"the LoRA file {path.name} is none of Wan's transformer") from error
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in named.items():
        layer, _, kind = name.removeprefix(_PREFIX).rpartition(".lora_")
        layers.setdefault(layer, {})[kind] = tensor
    return layers, scaling


def _delta(found: Mapping[str, torch.Tensor], size_in: int, size_out: int, scaling: Callable[[int], float]) -> Delta:
    """A bias alone has rank 0. peft scales a bias like the rest."""
    down, up = found.get("A.weight", torch.zeros(0, size_in)), found.get("B.weight", torch.zeros(size_out, 0))
    factor, bias = scaling(len(down)), found.get("B.bias")
    return Delta(down, up.float() * factor, None if bias is None else bias.float() * factor)


def _scaling(metadata: Mapping[str, Any]) -> Callable[[int], float]:
    """A layer's factor by its rank; 1 where the file says nothing, as peft has it. Raises ValueError."""
    alpha = metadata.get(_PREFIX + "lora_alpha")
    if metadata.get(_PREFIX + "use_dora") or metadata.get(_PREFIX + "alpha_pattern"):
        raise ValueError("a DoRA, or layers of different alphas")
    root = metadata.get(_PREFIX + "use_rslora")
    return lambda rank: 1.0 if alpha is None or not rank else alpha / (sqrt(rank) if root else rank)


def adapter_on(adapter: Adapter, device: torch.device) -> Adapter:
    """The same adapter on another device."""
    return {layer: delta.to(device) for layer, delta in adapter.items()}


def parts_of(transformer: WanTransformer3DModel, chosen: Sequence[tuple[Adapter, float]]) -> Parts:
    """What adapters add at these weights, by the transformer's layers as they are now, fused or not."""
    parts: dict[torch.nn.Module, list[Part]] = {}
    for adapter, weight in chosen:
        for path, delta in adapter.items():
            linear, start = _place(transformer, path, delta.up.shape[0])
            parts.setdefault(linear, []).append(Part(delta, weight, start))
    return parts


def _place(transformer: WanTransformer3DModel, path: str, size: int) -> tuple[torch.nn.Module, int]:
    """The layer that computes what the one of this path does, and from which of its outputs on."""
    owner, _, name = path.rpartition(".")
    module = transformer.get_submodule(owner)
    if hasattr(module, name):
        return module.get_submodule(name), 0
    fused, names = FUSED[owner.rpartition(".")[2]]
    return module.get_submodule(fused), names.index(name) * size


@contextmanager
def applied(parts: Parts) -> Iterator[None]:
    """Within it the layers add their parts. One thread runs all forwards, so nobody else's is within it."""
    with ExitStack() as stack:
        for linear, own in parts.items():
            stack.enter_context(linear.register_forward_hook(partial(_add, own)))
        yield


def _add(parts: Sequence[Part], linear: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    """Into the outputs, which are the layer's own and nobody else's yet."""
    for part in parts:
        added = part.delta.of(inputs[0])
        output.narrow(-1, part.start, added.shape[-1]).add_(added, alpha=part.weight)
