"""Weights held in int8, for any part of the model. Imports torchao only when asked to, and no diffusers.

Installed, torchao is imported by transformers and diffusers in every process, asked for or not.
"""

import torch

from schemas.errors import ModelNotReady


def hold_in_int8(module: torch.nn.Module, setting: str, device: torch.device | None = None) -> None:
    """Keep the weights of the linear layers in `module` in int8, a scale per row; products stay in the weights' dtype.

    setting: who asks for it. device: each layer is moved there before, so that no whole model is; None: none is moved.
    Raises ModelNotReady where torchao is missing.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelNotReady(f"{setting} needs torchao: pip install -e '.[int8]'") from error
    quantize_(module, Int8WeightOnlyConfig(), device=device)
