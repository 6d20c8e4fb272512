"""What a process does once to its model, before the first job: other ways of computing the same.

All but `int8_weights`, and attention backends that quantise, change results by rounding only.
"""

from collections.abc import Callable
from typing import Any, Literal

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from schemas.errors import ModelNotReady
from serve_graph.engine.checkpoint import GeneratorParts
from serve_graph.engine.int8 import hold_in_int8
from serve_graph.engine.lora import FUSED
from serve_graph.engine.quick_conv import convolutions_channels_last

Compile = Literal["off", "regional"]


def tune(
    parts: GeneratorParts,
    *,
    fuse_qkv: bool = False,
    vae_channels_last: bool = False,
    attention_backend: str | None = None,
    int8_weights: bool = False,
    compile_mode: Compile = "off",
    compile_backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Apply what the configuration asks for. Raises ModelNotReady for what can't be had here.

    int8_weights: of the blocks. Measured on the tiny Wan: 0.36 of the bytes in float32 and 0.59 in bfloat16; on a CPU
    it is slower.
    Compiling comes last, since it takes the modules as they are; the first forward of a shape then takes a while.
    """
    if attention_backend is not None:
        choose_attention(parts.transformer, attention_backend)
    if fuse_qkv:
        for block in parts.transformer.blocks:
            fuse_projections(block)
    if vae_channels_last:
        for vae in {id(vae): vae for vae in (parts.vae, parts.quick_vae) if vae is not None}.values():
            convolutions_channels_last(vae)
    if int8_weights:
        hold_in_int8(parts.transformer.blocks, "engine.int8_weights")
    if compile_mode == "regional":
        parts.transformer.compile_repeated_blocks(fullgraph=True, backend=compile_backend)


def fuse_projections(block: WanTransformerBlock) -> None:
    """One projection in place of three, or two in cross-attention, and without the old weights.

    diffusers' `fuse_qkv_projections` keeps both, which is a third more of the transformer's bytes.
    """
    for path, (_, old) in FUSED.items():
        attention = getattr(block, path)
        attention.fuse_projections()
        for name in old:
            delattr(attention, name)


def choose_attention(transformer: WanTransformer3DModel, backend: str) -> None:
    """One of diffusers' attention backends. Once per process: diffusers makes it the default of all that follows."""
    try:
        transformer.set_attention_backend(backend)
    except (ValueError, ImportError, RuntimeError) as error:
        raise ModelNotReady(f"engine.attention_backend {backend} can't be had here: {error}") from error
