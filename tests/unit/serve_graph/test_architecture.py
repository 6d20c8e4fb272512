"""The arithmetic against the real thing: diffusers' and transformers' own modules at the official dimensions, on the
meta device, where they have shapes and no weights. What torch counts there is what the arithmetic has to give.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from live_bytes import peak_bytes
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from schemas.official_profiles import WAN_1_3B, WAN_14B, WAN_TINY
from serve_graph.architecture import ARCHITECTURES, TextEncoder, Transformer, Vae, num_latent_frames, num_tokens
from serve_graph.engine.checkpoint import load_generator_parts
from serve_graph.engine.checkpoint_folder import SHIPPED

if TYPE_CHECKING:
    from pathlib import Path

    from serve_graph.engine.checkpoint import GeneratorParts

OFFICIAL: dict[str, dict[str, Any]] = {
    WAN_1_3B.name: {"num_attention_heads": 12, "ffn_dim": 8_960, "num_layers": 30},
    WAN_14B.name: {},  # diffusers' defaults
}
"""What each checkpoint's `transformer/config.json` says beyond diffusers' defaults."""

KEPT_IN_FLOAT32 = ("time_embedder", "scale_shift_table", "norm2", "rope")
TEXT_ROWS = 512
LARGEST = 0.01
"""The peaks' tolerance: small tensors (the clip's time and text embeddings, the borders of padding) are left out."""


def transformer(name: str, dtype: torch.dtype = torch.bfloat16) -> WanTransformer3DModel:
    """Without weights, its dtypes as `from_pretrained` would leave them."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**OFFICIAL[name]).eval()
    for key, module in model.named_modules():
        if not any(kept in key for kept in KEPT_IN_FLOAT32):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    for key, parameter in model.named_parameters():
        if "scale_shift_table" in key:
            parameter.data = parameter.data.float()
    return model


def forward(model: WanTransformer3DModel, width: int, height: int, num_frames: int) -> Callable[[], object]:
    """One forward of one clip, to be called; its inputs are there before."""
    dtype = model.proj_out.weight.dtype
    shape = (1, 16, num_latent_frames(num_frames), height // 8, width // 8)
    inputs = {
        "hidden_states": torch.empty(shape, dtype=dtype, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, TEXT_ROWS, model.config.text_dim, dtype=dtype, device="meta"),
    }
    return lambda: model(**inputs, return_dict=False)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    with torch.device("meta"):
        return AutoencoderKLWan().eval()


@pytest.fixture(scope="module")
def text_encoder() -> UMT5EncoderModel:
    """Wan 2.1's: google/umt5-xxl."""
    config = UMT5Config(vocab_size=256_384, d_model=4_096, d_kv=64, num_heads=64, d_ff=10_240, num_layers=24)
    with torch.device("meta"):
        return UMT5EncoderModel(config).eval()


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def counted(run: Callable[[], object]) -> int:
    """torch's count of FLOP."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# ---- parameters and weights: exact


@pytest.mark.parametrize("name", OFFICIAL)
def test_transformer_parameters_and_bytes_are_those_of_the_real_one(name: str) -> None:
    model, ours = transformer(name), ARCHITECTURES[name].transformer

    assert ours.num_parameters == num_parameters(model)
    assert ours.weight_bytes("bfloat16") == weight_bytes(model)
    assert ours.weight_bytes("float32") == 4 * num_parameters(model)


def test_vae_parameters_are_those_of_the_real_one(vae: AutoencoderKLWan) -> None:
    assert Vae().num_parameters == num_parameters(vae)


def test_text_encoder_parameters_are_those_of_the_real_one(text_encoder: UMT5EncoderModel) -> None:
    assert TextEncoder().num_parameters == num_parameters(text_encoder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_take_as_many_bytes_as_the_loader_holds(
    tiny_folder: "Path", generator_parts: "GeneratorParts", dtype: str
) -> None:
    """Loaded for real: what diffusers keeps in float32 is in the count."""
    loaded = load_generator_parts(tiny_folder, torch.device("cpu"), dtype, dtype)
    config, vae_config = loaded.transformer.config, loaded.vae.config
    ours = Transformer(
        **{name: config[name] for name in ("num_attention_heads", "ffn_dim", "num_layers", "attention_head_dim")},
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
    )
    our_vae = Vae(
        base_dim=vae_config["base_dim"],
        decoder_base_dim=vae_config["decoder_base_dim"] or vae_config["base_dim"],
        dim_mult=tuple(vae_config["dim_mult"]),
        num_res_blocks=vae_config["num_res_blocks"],
    )

    assert ours.weight_bytes(dtype) == weight_bytes(loaded.transformer)
    assert our_vae.weight_bytes(dtype) == weight_bytes(loaded.vae)


def test_the_tiny_model_has_the_dimensions_of_the_shipped_checkpoint() -> None:
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(SHIPPED / "transformer"))
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(SHIPPED / "vae"))
        text_encoder = UMT5EncoderModel(UMT5Config.from_pretrained(SHIPPED / "text_encoder"))
    ours = ARCHITECTURES[WAN_TINY.name]

    assert ours.transformer.num_parameters == num_parameters(transformer)
    assert ours.vae.num_parameters == num_parameters(vae)
    assert ours.text_encoder.num_parameters == num_parameters(text_encoder)


# ---- FLOP: exact


@pytest.mark.parametrize(
    ("name", "width", "height", "num_frames"), [(WAN_1_3B.name, 832, 480, 81), (WAN_14B.name, 720, 1280, 81)]
)
def test_forward_flop_are_what_torch_counts(name: str, width: int, height: int, num_frames: int) -> None:
    model = transformer(name)
    tokens = num_tokens(width, height, num_frames)

    assert ARCHITECTURES[name].transformer.forward_flop(tokens, TEXT_ROWS) == counted(
        forward(model, width, height, num_frames)
    )


@pytest.mark.parametrize(("width", "height", "num_frames"), [(832, 480, 9), (720, 1280, 5)])
def test_decode_flop_are_what_torch_counts(vae: AutoencoderKLWan, width: int, height: int, num_frames: int) -> None:
    latents = torch.empty(1, 16, num_latent_frames(num_frames), height // 8, width // 8, device="meta")

    assert Vae().decode_flop(width, height, num_frames) == counted(lambda: vae.decode(latents))


@pytest.mark.parametrize("num_text_tokens", [7, TEXT_ROWS])
def test_text_flop_are_what_torch_counts(text_encoder: UMT5EncoderModel, num_text_tokens: int) -> None:
    ids = torch.empty(1, num_text_tokens, dtype=torch.long, device="meta")

    assert TextEncoder().flop(num_text_tokens) == counted(lambda: text_encoder(ids))


# ---- what is alive at once: within 1%


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("name", "width", "height", "num_frames"),
    [(WAN_1_3B.name, 832, 480, 81), (WAN_1_3B.name, 480, 832, 33), (WAN_14B.name, 1280, 720, 81)],
)
def test_activations_of_a_forward_are_what_is_alive_at_its_peak(
    name: str, width: int, height: int, num_frames: int, dtype: str
) -> None:
    model = transformer(name, getattr(torch, dtype))
    model.blocks = model.blocks[:2]  # the peak is one block's
    ours = ARCHITECTURES[name].transformer.activation_bytes(num_tokens(width, height, num_frames), TEXT_ROWS, dtype)

    assert ours == pytest.approx(peak_bytes(forward(model, width, height, num_frames)), rel=LARGEST)


@pytest.mark.parametrize(("width", "height"), [(832, 480), (720, 1280)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_a_decode_are_what_is_alive_at_its_peak(width: int, height: int, dtype: str) -> None:
    with torch.device("meta"):
        decoder = AutoencoderKLWan().eval().decoder
    for parameter in decoder.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    features: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in decoder.modules())

    def decode() -> None:
        """Latent frame by latent frame, as the engine does; the third has full caches behind it."""
        for chunk in range(3):
            latents = torch.empty(1, 16, 1, height // 8, width // 8, dtype=getattr(torch, dtype), device="meta")
            decoder(latents, feat_cache=features, feat_idx=[0], first_chunk=chunk == 0)

    assert Vae().activation_bytes(width, height, dtype) == pytest.approx(peak_bytes(decode), rel=LARGEST)
    kept = sum(f.numel() * f.element_size() for f in features if isinstance(f, torch.Tensor))
    assert Vae().feature_bytes(width, height, dtype) == kept
