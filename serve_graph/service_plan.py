"""The plan of a running service: its own profile and placement, on the GPU that its generator reports.

Knows no torch: who reads the device hands over its name and its memory.
"""

from collections.abc import Callable

from schemas.errors import FieldError, InvalidRequest, ModelNotReady
from schemas.estimates import DeviceEstimate, EstimatedWork
from schemas.health import GpuHealth
from schemas.model_profile import unique
from schemas.requests import GenerationParameters
from serve_graph.plan import EFFICIENCY, Clip, ModelPlan, Placement, card_named, lora_bytes, needs_bfloat16_vae, plan_of
from serve_graph.settings import ModelSettings, Settings

_GIB = 2**30
_TERA = 10**12


def placement_of(model: ModelSettings) -> Placement:
    """Where a service with these settings has its parts, on a machine with a GPU.

    `auto` for the text encoder is the GPU: Ray 2.60 hides none from a replica that asked for none.
    """
    text_on_gpu, vae_dtype = model.text_device != "cpu", _resolved(model.vae_dtype, on_gpu=True)
    return Placement(
        dtype=_resolved(model.dtype, on_gpu=True),
        vae_dtype=vae_dtype,
        text_dtype=_resolved(model.text_dtype, on_gpu=text_on_gpu),
        text_on_gpu=text_on_gpu,
        has_bfloat16_vae=needs_bfloat16_vae(model.profile, vae_dtype),
        lora_bytes=lora_bytes(model.served),
    )


def plan_for(settings: Settings) -> ModelPlan | None:
    """None where the plan's bytes are not the service's: a profile of one's own, or weights in int8 on the GPU."""
    placement = placement_of(settings.model)
    in_int8 = settings.engine.int8_weights or (settings.text.int8_weights and placement.text_on_gpu)
    return None if in_int8 else plan_of(settings.model.profile, placement)


def check_start(settings: Settings, name: str, memory_bytes: int) -> None:
    """Raises ModelNotReady where not even the profile's smallest clip fits on this GPU, with what would.

    `engine.max_clip_pixels` takes the plan's place, here as for each request.
    """
    model, plan = settings.model, plan_for(settings)
    if plan is None or settings.engine.max_clip_pixels is not None or plan.fits_at_all(memory_bytes):
        return
    clip = plan.smallest_clip()
    needed = plan.footprint(clip).peak / _GIB
    nearest = plan.nearest(clip, memory_bytes)
    raise ModelNotReady(
        f"{model.profile.name} does not fit on {name}: it needs {needed:.1f} GiB for its smallest clip, "
        f"and there are {memory_bytes / _GIB:.1f}; "
        + (f"it would with {', or '.join(nearest)}" if nearest else "it fits on no card that is known here")
    )


class ServicePlan:
    """plan: see `plan_for`. gpu: what the generator last said of its GPU; None where it has none, or is not up yet."""

    def __init__(self, plan: ModelPlan | None, gpu: Callable[[], GpuHealth | None]) -> None:
        self._plan = plan
        self._gpu = gpu

    def refuse_what_does_not_fit(self, parameters: GenerationParameters) -> None:
        """Raises InvalidRequest for a clip that is too large for the GPU's memory, with the nearest that fits."""
        plan, gpu, clip = self._plan, self._gpu(), _clip(parameters)
        if plan is None or gpu is None or plan.fits(clip, gpu.memory_total_bytes):
            return
        frames = plan.most_frames(clip, gpu.memory_total_bytes)
        if frames is not None:
            legal = f"at most {frames} frames of {clip.width}x{clip.height} fit into this device"
            error = FieldError(field="num_frames", message=f"too many; {legal}", legal=legal, nearest=(frames,))
            raise InvalidRequest([error])
        sizes = plan.fitting_sizes(clip, gpu.memory_total_bytes)
        names = tuple(unique(size.name for size in sizes))
        legal = f"of this device's memory: {', '.join(names)}" if names else "nothing of so many frames"
        message = f"{clip.width}x{clip.height} does not fit into this device; legal: {legal}"
        raise InvalidRequest([FieldError(field="resolution", message=message, legal=legal, nearest=names or None)])

    def work(self, parameters: GenerationParameters) -> EstimatedWork:
        """What there is to compute."""
        clip = _clip(parameters)
        return EstimatedWork(
            steps=clip.steps,
            forwards=clip.forwards,
            tokens=clip.tokens,
            teraflop=None if self._plan is None else self._plan.flop(clip).total / _TERA,
        )

    def device(self, parameters: GenerationParameters) -> DeviceEstimate | None:
        """What the GPU would need for it."""
        plan, gpu, clip = self._plan, self._gpu(), _clip(parameters)
        if plan is None or gpu is None:
            return None
        card = card_named(gpu.name, gpu.memory_total_bytes)
        floor_s = None if card is None else plan.floor_s(clip, card)
        return DeviceEstimate(
            gpu=gpu.name,
            memory_total_bytes=gpu.memory_total_bytes,
            peak_memory_bytes=plan.footprint(clip).peak,
            floor_s=floor_s,
            expected_s=None if floor_s is None else floor_s / EFFICIENCY,
            efficiency=EFFICIENCY,
        )


def _clip(parameters: GenerationParameters) -> Clip:
    return Clip(
        parameters.width,
        parameters.height,
        parameters.num_frames,
        parameters.num_inference_steps,
        parameters.guided_steps,
    )


def _resolved(dtype: str, *, on_gpu: bool) -> str:
    if dtype != "auto":
        return dtype
    return "bfloat16" if on_gpu else "float32"
