"""Feed-forward layers: squared ReLU without a gate (Nemotron) and SwiGLU (Llama)."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import nn

from foldscan import ops
from foldscan.nn.linear import Linear


class MLP(nn.Module):
    """``down(relu(up(x))^2)`` (arXiv:2109.08668) or ``down(silu(gate(x)) * up(x))`` (arXiv:2002.05202).

    Args:
        activation: ``"relu2"`` or ``"silu"``; the latter has a third matrix, ``gate_proj``, and no biases.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: str = "relu2", bias: bool = False
    ) -> None:
        super().__init__()
        if activation not in ("relu2", "silu"):
            raise ValueError(f"activation: got {activation!r}, want 'relu2' or 'silu'")
        if activation == "silu" and bias:
            raise ValueError("bias: got True with activation 'silu', want False")
        self.activation = cast(Literal["relu2", "silu"], activation)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False) if activation == "silu" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, d) to (T, d)."""
        if self.up_proj.bias is not None:
            return self.down_proj(torch.relu(self.up_proj(x)).square())
        # A dense MLP is an expert layer with one expert that takes every token. The fused kernel also keeps the
        # activation's bits independent of the row count, which an elementwise torch op does not promise.
        ones = torch.ones(x.shape[0], 1, dtype=torch.float32, device=x.device)
        first = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
        return ops.moe_mlp(
            x,
            ones,
            first,
            self.up_proj.weight[None],
            self.down_proj.weight[None],
            w_gate=None if self.gate_proj is None else self.gate_proj.weight[None],
            activation=self.activation,
        )
