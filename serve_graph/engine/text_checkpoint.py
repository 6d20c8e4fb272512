"""Loading the text parts of a checkpoint in diffusers' layout. Imports no diffusers, which takes seconds."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from serve_graph.engine.devices import DTYPES


@dataclass(frozen=True)
class TextParts:
    """What text encoding needs."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: UMT5EncoderModel
    device: torch.device


def load_text_parts(folder: Path, device: torch.device, dtype: str) -> TextParts:
    """Load the tokeniser and the text encoder."""
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=DTYPES[dtype])
    return TextParts(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=text_encoder.to(device).eval().requires_grad_(False),
        device=device,
    )
