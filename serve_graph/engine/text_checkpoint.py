"""Loading the text parts of a checkpoint in diffusers' layout. Imports no diffusers, which takes seconds."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from serve_graph.engine.devices import DTYPES
from serve_graph.engine.int8 import hold_in_int8


@dataclass(frozen=True)
class TextParts:
    """What text encoding needs."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: UMT5EncoderModel
    device: torch.device


def load_text_parts(folder: Path, device: torch.device, dtype: str, *, int8_weights: bool = False) -> TextParts:
    """Load the tokeniser and the text encoder.

    int8_weights: of its linear layers, before they are on the device; the table of token embeddings keeps its dtype.
    Raises ModelNotReady where torchao, which that needs, is missing.
    """
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=DTYPES[dtype])
    if int8_weights:
        hold_in_int8(text_encoder, "text.int8_weights", device)
    return TextParts(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=text_encoder.to(device).eval().requires_grad_(False),
        device=device,
    )
