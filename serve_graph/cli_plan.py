"""`wan-serve plan`: what a profile needs on a GPU, before one is rented. Arithmetic alone; talks to nobody."""

from enum import Enum
from typing import Annotated, Any, Final, Literal

import typer

from schemas.official_profiles import PROFILES
from serve_graph.architecture import ARCHITECTURES
from serve_graph.cli_client import FAILED, WRONG_USAGE, AsJson, add_row, fail, print_json, stdout, table
from serve_graph.plan import (
    CONTEXT_BYTES,
    EFFICIENCY,
    GPUS,
    SLACK,
    Gpu,
    ModelPlan,
    Placement,
    Row,
    lora_bytes,
    needs_bfloat16_vae,
    rows,
)

_ESTIMATE: Final = (
    f"expected: the floor over {EFFICIENCY:g}, an assumed share of the card's peak. An estimate, not a measurement."
)
_PEAK: Final = (
    f"peak: weights, the larger of denoise and decode and {SLACK:.0%} of it, "
    f"{CONTEXT_BYTES / 2**30:.1f} GiB per process; one clip at a time."
)

Dtype = Literal["float32", "float16", "bfloat16"]
_GpuName = Enum("_GpuName", {name: name for name in GPUS}, type=str)  # type: ignore[misc]  # the names are a table's


def plan(
    gpu: Annotated[_GpuName, typer.Option(help="The card.")],
    profile: Annotated[str, typer.Option(help=f"The model: {', '.join(PROFILES)}.")],
    dtype: Annotated[Dtype, typer.Option(help="Of the transformer.")] = "bfloat16",
    vae_dtype: Annotated[Dtype, typer.Option(help="Of the VAE.")] = "float32",
    text_dtype: Annotated[
        Dtype | None, typer.Option(help="Of the text encoder; by default as the service has it there.")
    ] = None,
    text_device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the text encoder lies.")] = "cpu",
    vae: Annotated[
        Literal["resident", "moved"], typer.Option(help="`moved`: on the GPU only to decode (the service keeps it).")
    ] = "resident",
    steps: Annotated[int | None, typer.Option(min=1, help="By default the profile's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=1, help="By default the profile's; 1: none.")] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of the card, in any currency: look at your provider's list.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what fits on a GPU, how long a clip takes there and what it costs. Exit code 1 when nothing fits."""
    if profile not in PROFILES:
        fail(f"there is no profile {profile!r}; there are {', '.join(PROFILES)}", WRONG_USAGE, as_json)
    on_gpu = text_device == "cuda"
    placement = Placement(
        dtype,
        vae_dtype,
        text_dtype or ("bfloat16" if on_gpu else "float32"),
        on_gpu,
        vae_moves=vae == "moved",
        has_bfloat16_vae=needs_bfloat16_vae(PROFILES[profile], vae_dtype),
        lora_bytes=lora_bytes(PROFILES[profile]),
    )
    card, planned = GPUS[gpu.value], ModelPlan(PROFILES[profile], ARCHITECTURES[profile], placement)
    found = rows(planned, card, steps=steps, guidance_scale=guidance_scale, price_per_hour=price_per_hour)
    if as_json:
        print_json(_document(planned, card, found, price_per_hour))
    else:
        _show(planned, card, found)
    if not any(row.fits for row in found):
        raise typer.Exit(FAILED)


def _document(plan: ModelPlan, card: Gpu, found: list[Row], price_per_hour: float | None) -> dict[str, Any]:
    return {
        "profile": plan.profile.name,
        "gpu": {"name": card.name, "memory_bytes": card.memory_bytes, "peak_flops": card.flops},
        "placement": plan.placement,
        "efficiency": EFFICIENCY,
        "slack": SLACK,
        "context_bytes": CONTEXT_BYTES,
        "measured": False,
        "price_per_hour": price_per_hour,
        "fits": any(row.fits for row in found),
        "clips": found,
    }


def _show(plan: ModelPlan, card: Gpu, found: list[Row]) -> None:
    out, placed, parts = stdout(), plan.placement, found[0].bytes
    out.print(f"{plan.profile.name} on an {card.name}: {_gib(card.memory_bytes)}, {card.flops / 1e12:g} TFLOP/s")
    transformer = f"transformer {placed.dtype} {_gib(parts.transformer)}"
    vae = f"VAE {placed.vae_dtype} {_gib(parts.vae)}{' (to decode)' if placed.vae_moves else ''}"
    text = f"text encoder {placed.text_dtype} {_gib(parts.text_encoder)}"
    out.print(f"on the GPU   {', '.join([transformer, vae] + ([text] if placed.text_on_gpu else []))}")
    out.print(f"on the host  {'' if placed.text_on_gpu else text}{_idle_vae(plan, parts.vae)}")
    columns = ("resolution", "frames", "weights", "denoise", "decode", "peak", "fits", "floor", "expected", "cost")
    made = table(*columns)
    for row in found:
        held = row.bytes
        add_row(
            made,
            f"{row.resolution} ({row.width}x{row.height})",
            str(row.num_frames),
            *map(_gib, (held.resident, held.denoise_activations, held.decode_activations, held.peak)),
            "yes" if row.fits else "no",
            _seconds(row.floor_s),
            _seconds(row.expected_s),
            "" if row.cost is None else f"{row.cost:.3f}",
        )
    out.print(made)
    for row in found:
        if not row.fits:
            nearest = ", or ".join(row.nearest) or "nothing that is known here"
            out.print(f"{row.resolution}, {row.num_frames} frames: fits with {nearest}", soft_wrap=True)
    out.print(_PEAK, soft_wrap=True)
    out.print(_ESTIMATE, soft_wrap=True)


def _idle_vae(plan: ModelPlan, size_bytes: int) -> str:
    if not plan.placement.vae_moves:
        return "nothing" if plan.placement.text_on_gpu else ""
    return f"{'' if plan.placement.text_on_gpu else ', '}VAE {plan.placement.vae_dtype} {_gib(size_bytes)} (else)"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 1 else f"{value:.1g} s"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
