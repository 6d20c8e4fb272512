"""The profiles that ship: Wan 2.1's two text-to-video models with their official values, the larger one in few steps,
and the tiny one.

Sources: the Wan 2.1 release (`SUPPORTED_SIZES`, `sample_neg_prompt`, 50 steps, guidance 5 and shift 5; for the
1.3B model its README recommends guidance 6 and shift 8 to 12), and diffusers' `WanPipeline` (512 text tokens).
Of the few steps: lightx2v's model card `Wan2.1-T2V-14B-StepDistill-CfgDistill` (4 steps, shift 5, no guidance) and
LightX2V's `WanStepDistillScheduler` (Euler steps at 1000, 750, 500 and 250 of 1000, shifted).
"""

from schemas.loras import AppliedLora, Lora
from schemas.model_profile import Defaults, ModelProfile, Resolution
from schemas.presets import EXACT, Levers, Preset, PresetName

WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Wan 2.1's own default. Source: `sample_neg_prompt` in the release's shared configuration."""

FPS = (8, 12, 16, 24, 30)

_480P = (
    Resolution(name="480p", aspect_ratio="16:9", width=832, height=480),
    Resolution(name="480p", aspect_ratio="9:16", width=480, height=832),
)
_720P = (
    Resolution(name="720p", aspect_ratio="16:9", width=1280, height=720),
    Resolution(name="720p", aspect_ratio="9:16", width=720, height=1280),
)

_LARGE_PRESETS: dict[PresetName, Preset] = {
    "exact": EXACT,
    "balanced": Preset(
        num_inference_steps=30,
        levers=Levers(guidance_interval=(0.0, 0.8), one_key_padding=True, first_block_threshold=0.05),
    ),
    "fast": Preset(
        num_inference_steps=20,
        levers=Levers(
            guidance_interval=(0.0, 0.6), one_key_padding=True, first_block_threshold=0.1, bfloat16_decode=True
        ),
    ),
}
"""Counted and not seen: what they do to these models' clips was not measured, as no weights of theirs were at hand."""

_FEW_STEP_PRESETS: dict[PresetName, Preset] = {
    "exact": EXACT,
    "balanced": Preset(levers=Levers(one_key_padding=True)),
    "fast": Preset(num_inference_steps=3, levers=Levers(one_key_padding=True, bfloat16_decode=True)),
}
"""There is no guidance to leave out, and four steps differ too much for a first-block cache. Not seen either."""

_TINY_PRESETS: dict[PresetName, Preset] = {
    "exact": EXACT,
    "balanced": Preset(
        levers=Levers(
            guidance_interval=(0.0, 0.75),
            batched_guidance=True,
            one_key_padding=True,
            bfloat16_decode=True,
        )
    ),
    "fast": Preset(
        num_inference_steps=6,
        levers=Levers(
            guidance_interval=(0.0, 0.6),
            batched_guidance=True,
            one_key_padding=True,
            bfloat16_decode=True,
        ),
    ),
}
"""Measured by `python -m benchmarks.levers`: the guidance interval leads furthest away from `exact`. A first-block
cache never fires on this model at 0.1, and its comparison costs."""

WAN_1_3B = ModelProfile(
    name="wan2.1-t2v-1.3b",
    hub_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    max_sequence_length=512,
    resolutions=_480P,
    min_num_frames=5,
    max_num_frames=81,
    fps=FPS,
    max_num_inference_steps=100,
    max_guidance_scale=20.0,
    min_flow_shift=1.0,
    max_flow_shift=20.0,
    defaults=Defaults(
        resolution="480p",
        aspect_ratio="16:9",
        num_frames=81,
        fps=16,
        num_inference_steps=50,
        guidance_scale=6.0,
        flow_shift=8.0,
        negative_prompt=WAN_NEGATIVE_PROMPT,
    ),
    presets=_LARGE_PRESETS,
)

WAN_14B = WAN_1_3B.model_copy(
    update={
        "name": "wan2.1-t2v-14b",
        "hub_id": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "resolutions": _480P + _720P,
        "defaults": WAN_1_3B.defaults.model_copy(
            update={"resolution": "720p", "guidance_scale": 5.0, "flow_shift": 5.0}
        ),
    }
)

_DISTILLED = "lightx2v-4-steps"

WAN_14B_FEW_STEP = WAN_14B.model_copy(
    update={
        "name": "wan2.1-t2v-14b-few-step",
        "min_num_inference_steps": 3,
        "max_num_inference_steps": 8,
        "max_guidance_scale": 1.0,
        "scheduler": "euler",
        "defaults": WAN_14B.defaults.model_copy(
            update={
                "resolution": "480p",
                "num_inference_steps": 4,
                "guidance_scale": 1.0,
                "negative_prompt": "",  # without guidance nothing would read it
                "loras": (AppliedLora(name=_DISTILLED, weight=1.0),),
            }
        ),
        "loras": {
            _DISTILLED: Lora(
                description="Distilled to 4 steps without guidance; every clip has it.",
                hub_id="lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v",
                weight_name="loras/Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors",
                size_bytes=631_344_264,
            )
        },
        "presets": _FEW_STEP_PRESETS,
    }
)
"""The 14B model with a LoRA that makes a step do for twelve, and guidance needless: 4 forwards in place of 100. Not
verified against the real weights, for want of them: neither that the file loads nor how its clips look."""

WAN_TINY = WAN_1_3B.model_copy(
    update={
        "name": "wan-tiny",
        "hub_id": None,
        "max_sequence_length": 128,
        "resolutions": (Resolution(name="64p", aspect_ratio="1:1", width=64, height=64),),  # what it was trained on
        "min_num_frames": 17,
        "max_num_frames": 17,
        "defaults": Defaults(
            resolution="64p",
            aspect_ratio="1:1",
            num_frames=17,
            fps=16,
            num_inference_steps=12,
            guidance_scale=2.0,
            flow_shift=3.0,
            negative_prompt="",
        ),
        "presets": _TINY_PRESETS,
    }
)

PROFILES = {profile.name: profile for profile in (WAN_TINY, WAN_1_3B, WAN_14B, WAN_14B_FEW_STEP)}
