"""What a process does once to its model: the same results but for rounding, and the bytes and calls that it claims."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_runs import BOUND, bytes_of, distance, run

from schemas.errors import ModelNotReady
from schemas.presets import NO_LEVERS, Levers
from serve_graph.engine.checkpoint import GeneratorParts, load_generator_parts
from serve_graph.engine.decode import Decoding
from serve_graph.engine.denoise import Denoising
from serve_graph.engine.text_checkpoint import load_text_parts
from serve_graph.engine.tuning import tune

RunSteps = Callable[[GeneratorParts, Levers], torch.Tensor]


@pytest.fixture
def own_parts(tiny_folder: Path) -> GeneratorParts:
    """Parts that this test may change."""
    return load_generator_parts(tiny_folder, torch.device("cpu"), "float32", "float32")


@pytest.fixture
def run_steps(make_denoising: Callable[..., Denoising]) -> RunSteps:
    return lambda parts, levers: run(parts, make_denoising(levers, parts=parts))


@pytest.mark.parametrize("levers", [NO_LEVERS, Levers(one_key_padding=True)], ids=["plain", "one-key"])
def test_fused_projections_hold_no_byte_more_and_give_the_same_latents(
    levers: Levers, generator_parts: GeneratorParts, own_parts: GeneratorParts, run_steps: RunSteps
) -> None:
    before = bytes_of(own_parts.transformer)
    tune(own_parts, fuse_qkv=True)

    names = [name for name, _ in own_parts.transformer.named_modules()]
    assert bytes_of(own_parts.transformer) == before
    assert sum(name.endswith((".to_qkv", ".to_kv")) for name in names) == 2 * len(own_parts.transformer.blocks)
    assert not any(name.endswith((".to_k", ".to_v", "attn1.to_q")) for name in names)
    assert distance(run_steps(own_parts, levers), run_steps(generator_parts, levers)) <= BOUND


def test_a_vae_with_channels_last_decodes_to_the_same_frames(
    generator_parts: GeneratorParts, own_parts: GeneratorParts
) -> None:
    latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    own_parts.vae.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as it is loaded for a GPU
    tune(own_parts, vae_channels_last=True)

    weights = [p for p in own_parts.vae.decoder.parameters() if p.ndim == 5]
    assert all(weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights)
    actual, expected = (Decoding(parts.vae, latents).next_chunk() for parts in (own_parts, generator_parts))
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["no-such", "sage"])
def test_an_attention_backend_that_is_not_there_is_refused(backend: str, own_parts: GeneratorParts) -> None:
    with pytest.raises(ModelNotReady, match=f"engine.attention_backend {backend} can't be had here"):
        tune(own_parts, attention_backend=backend)


def test_an_attention_backend_is_every_blocks(
    generator_parts: GeneratorParts, own_parts: GeneratorParts, run_steps: RunSteps
) -> None:
    tune(own_parts, attention_backend="native")

    for block in own_parts.transformer.blocks:
        assert {str(a.processor._attention_backend.value) for a in (block.attn1, block.attn2)} == {"native"}
    assert torch.equal(run_steps(own_parts, NO_LEVERS), run_steps(generator_parts, NO_LEVERS))


@pytest.mark.parametrize(
    ("levers", "num_graphs"),
    [
        pytest.param(NO_LEVERS, 1, id="plain"),
        pytest.param(Levers(one_key_padding=True), 2, id="one-key"),  # the second is for texts of any length
    ],
)
def test_regional_compilation_traces_a_block_whole_and_gives_the_same_latents(
    levers: Levers,
    num_graphs: int,
    generator_parts: GeneratorParts,
    own_parts: GeneratorParts,
    run_steps: RunSteps,
) -> None:
    """Traced and run as traced: building the kernels takes a compiler and most of a minute."""
    compiled = 0

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal compiled
        compiled += 1
        return graph

    tune(own_parts, compile_mode="regional", compile_backend=count)

    latents = run_steps(own_parts, levers)
    assert compiled == num_graphs  # for all blocks and steps
    assert distance(latents, run_steps(generator_parts, levers)) <= BOUND


def test_int8_weights_say_what_to_install_where_torchao_is_missing(
    own_parts: GeneratorParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)

    with pytest.raises(ModelNotReady, match=r"pip install -e '.\[int8\]'"):
        tune(own_parts, int8_weights=True)


def test_int8_weights_hold_a_quarter_of_the_blocks_bytes_and_give_nearly_the_same_latents(
    generator_parts: GeneratorParts, own_parts: GeneratorParts, run_steps: RunSteps
) -> None:
    pytest.importorskip("torchao", reason="an optional extra, which need not be installed")
    before = held_bytes(own_parts.transformer.blocks[0].ffn)
    tune(own_parts, int8_weights=True)

    assert held_bytes(own_parts.transformer.blocks[0].ffn) < 0.45 * before  # scales and biases stay float32
    assert BOUND < distance(run_steps(own_parts, NO_LEVERS), run_steps(generator_parts, NO_LEVERS)) < 0.2


def test_an_int8_text_encoder_says_what_to_install_where_torchao_is_missing(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)

    with pytest.raises(ModelNotReady, match=r"text.int8_weights needs torchao: pip install -e '.\[int8\]'"):
        load_text_parts(tiny_folder, torch.device("cpu"), "float32", int8_weights=True)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.45), ("bfloat16", 0.75)])
def test_an_int8_text_encoder_holds_fewer_bytes_in_its_layers_and_gives_nearly_the_same_embeddings(
    dtype: str, share: float, tiny_folder: Path
) -> None:
    pytest.importorskip("torchao", reason="an optional extra, which need not be installed")
    exact = load_text_parts(tiny_folder, torch.device("cpu"), dtype)
    small = load_text_parts(tiny_folder, torch.device("cpu"), dtype, int8_weights=True)
    ids = exact.tokenizer("a red circle moving left", return_tensors="pt")
    with torch.inference_mode():
        found, expected = (
            parts.text_encoder(ids.input_ids, ids.attention_mask).last_hidden_state for parts in (small, exact)
        )

    assert held_bytes(small.text_encoder.encoder.block) < share * held_bytes(exact.text_encoder.encoder.block)
    assert held_bytes(small.text_encoder.shared) == held_bytes(exact.text_encoder.shared)
    assert found.dtype == expected.dtype
    assert BOUND < distance(found, expected) < 0.2


def held_bytes(module: torch.nn.Module) -> int:
    """Those of a quantised weight's parts, too."""
    return sum(
        sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])
        if hasattr(weight, "__tensor_flatten__")
        else weight.nbytes
        for weight in module.parameters()
    )
