"""Linear layers, norms and MLPs of transformers models on foldscan's ops."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers.activations import GELUActivation, ReLUSquaredActivation, SiLUActivation

from foldscan import ops
from foldscan.integrations.transformers.swap import fallback, is_plain, runs_here

Activation = Literal["silu", "relu2", "gelu"]


def activation_of(function: Any) -> Activation | None:
    """The name that `foldscan.ops.moe_mlp` has for an activation module; None where it has none."""
    if isinstance(function, (SiLUActivation, nn.SiLU)):
        return "silu"
    if isinstance(function, ReLUSquaredActivation):
        return "relu2"
    if isinstance(function, GELUActivation) and function.act is nn.functional.gelu:
        return "gelu"
    if isinstance(function, nn.GELU) and function.approximate == "none":
        return "gelu"
    return None


def linear(self: Any, input: torch.Tensor) -> torch.Tensor:
    """``nn.Linear`` on `foldscan.ops.linear`."""
    if not runs_here(input, self.weight, self.bias) or (
        input.dtype != self.weight.dtype and not torch.is_autocast_enabled("cpu")
    ):
        return fallback(self, input)
    return ops.linear(input, self.weight, self.bias)


def rmsnorm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """RMSNorm; where the weight has another dtype the original decides what comes out."""
    if not runs_here(hidden_states) or hidden_states.dtype != self.weight.dtype:
        return fallback(self, hidden_states)
    return ops.rmsnorm_fn(hidden_states, self.weight, eps=self.variance_epsilon)


def gated_rmsnorm(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """RMSNorm of ``hidden * silu(gate)`` over groups; FalconH1 may gate after the norm."""
    if (
        not runs_here(hidden_states)
        or hidden_states.dtype != self.weight.dtype
        or (gate is not None and gate.dtype != hidden_states.dtype)
    ):
        return fallback(self, hidden_states, gate)
    size = self.group_size if hasattr(self, "group_size") else self.weight.numel() // self.n_groups
    before = getattr(self, "norm_before_gate", False)
    return ops.rmsnorm_fn(
        hidden_states, self.weight, z=gate, eps=self.variance_epsilon, group_size=size, norm_before_gate=before
    )


def _one_expert(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    """A dense MLP is an expert layer with one expert that takes every token, and the fused kernel that of experts."""
    rows = x.reshape(-1, x.shape[-1])
    probs = torch.ones(rows.shape[0], 1, device=x.device)
    experts = torch.zeros(rows.shape[0], 1, dtype=torch.int64, device=x.device)
    out = ops.moe_mlp(
        rows, probs, experts, up[None], down[None], w_gate=None if gate is None else gate[None], activation=activation
    )
    return out.view(*x.shape[:-1], down.shape[0])


def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where there is no gate."""
    gate = getattr(self, "gate_proj", None)
    layers = [m for m in (self.up_proj, self.down_proj, gate) if m is not None]
    activation = activation_of(self.act_fn)
    if activation is None or not all(is_plain(m) and m.bias is None and m.weight.dtype == x.dtype for m in layers):
        return fallback(self, x)
    weight = None if gate is None else gate.weight
    return _one_expert(x, self.up_proj.weight, self.down_proj.weight, weight, activation)


def fused_gate_mlp(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The same with gate and up in one matrix (GraniteMoeHybrid's shared expert)."""
    activation = activation_of(self.activation)
    layers = (self.input_linear, self.output_linear)
    if activation is None or not all(
        is_plain(m) and m.bias is None and m.weight.dtype == hidden_states.dtype for m in layers
    ):
        return fallback(self, hidden_states)
    gate, up = self.input_linear.weight.chunk(2)
    return _one_expert(hidden_states, up, self.output_linear.weight, gate, activation)
