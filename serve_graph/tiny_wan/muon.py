"""Muon: momentum whose update is made orthogonal, for matrices and convolutions. Source: Jordan et al., 2024.

The update's scale is that of Liu et al., 2025 (0.2 x sqrt of the longer side), so that AdamW's rates fit.
"""

from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration. Source: the reference implementation."""
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions or more; further ones are flattened into the second."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever given
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                ahead = parameter.grad.add(momentum, alpha=group["momentum"])  # Nesterov
                update = orthogonalize(ahead.reshape(len(ahead), -1))
                scale = 0.2 * max(update.shape) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """(m, n) to the nearest matrix, roughly, whose singular values are all one."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x: torch.Tensor = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
