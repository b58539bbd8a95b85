"""Linear and RMSNorm modules on the foldscan ops."""

from __future__ import annotations

import torch
from torch import nn

from foldscan import ops


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose rows do not depend on how many rows there are (`foldscan.ops.linear`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out); bfloat16 out under bfloat16 autocast, else the dtype of ``x``."""
        return ops.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467), statistics in fp32, output in the dtype of the input."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) to the same shape."""
        return ops.rmsnorm_fn(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"
