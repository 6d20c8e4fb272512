"""A checkpoint in diffusers' layout, made on the spot: the real classes, random weights, one seed; the suite's own.

Smaller than the shipped tiny Wan, so that a clip takes milliseconds. It renders texture, not what the prompt says.
"""

import os
import shutil
import string
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

BUILD = "wan-random-1"
"""Names the folder; change it with anything below, so that no stale checkpoint is picked up."""

_SEED = 2_110
_LATENT_CHANNELS = 16
_TEXT_DIM = 32
_WORDS = (
    "a an the of in on over under and with to from into by at is are no not very two three many red green blue "
    "yellow white black orange purple pink brown grey gray cyan magenta navy crimson golden circle square "
    "triangle ball box star ring cube shape dot line cat dog bird fish horse man woman person child car train "
    "boat tree flower house city street river sea ocean mountain sky cloud sun moon rain snow fire water small "
    "big large tiny huge bright dark slow slowly fast quickly left right up down upward downward still moving "
    "moves move drifting drifts flying flies running runs walking walks rolling spins spinning standing "
    "background foreground scene video clip camera shot style light night day cinematic realistic anime"
)


def build_random_checkpoint(parent: Path) -> Path:
    """Make the checkpoint under `parent` unless it is there; safe when several processes start at once.

    Returns the folder in diffusers' layout. Raises OSError when `parent` can't be written.
    """
    folder = parent / BUILD
    if folder.exists():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{BUILD}-", dir=parent))
    try:
        _pipeline().save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            os.rename(scratch, folder)  # noqa: PTH104  # os.rename fails when another process was first; so must this
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _pipeline() -> WanPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        return WanPipeline(
            tokenizer=_tokenizer(),
            text_encoder=_text_encoder(),
            vae=_vae(),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            transformer=_transformer(),
        )


def _tokenizer() -> T5TokenizerFast:
    """Whole words for the commonest, single characters for the rest; a longer piece always wins."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [("▁" + word, -2.0) for word in _WORDS.split()]
    characters = string.ascii_letters + string.digits + string.punctuation
    vocab += [("▁", -6.0), *((character, -8.0) for character in characters)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0)


def _text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=512, d_model=_TEXT_DIM, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def _transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        text_dim=_TEXT_DIM,
        freq_dim=64,
        ffn_dim=48,
        num_layers=2,
    ).eval()


def _vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=_LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * _LATENT_CHANNELS,
        latents_std=[1.0] * _LATENT_CHANNELS,
    ).eval()
