"""Mixture-of-Experts layers: an experts implementation for transformers' registry, and the routers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

from foldscan import ops
from foldscan.integrations.transformers.layers import activation_of
from foldscan.integrations.transformers.swap import fallback, runs_here


def covers(module: Any) -> str | None:
    """None where `experts_forward` computes an experts module itself, else why it leaves it to ``grouped_mm``."""
    if module.has_bias or module.is_transposed or not module.is_concatenated or module.has_post_expert_norm:
        return "experts with biases, transposed or interleaved weights, or a norm of their own"
    if module._is_expert_parallel:
        return "experts spread over processes"
    if module.has_gate and type(module)._apply_gate is not _default_apply_gate:
        return "a gate of its own"
    if activation_of(module.act_fn) is None:
        return f"activation {type(module.act_fn).__name__}"
    if not runs_here(module.down_proj):
        return f"weights of dtype {module.down_proj.dtype} on {module.down_proj.device}"
    return None


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """All experts of a layer in one fused op: (T, d), (T, k), (T, k) to (T, d)."""
    if covers(self) is not None or hidden_states.dtype != self.down_proj.dtype or not runs_here(hidden_states):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    gate = None
    if self.has_gate:
        width = self.gate_up_proj.shape[1] // 2
        gate, up = self.gate_up_proj[:, :width], self.gate_up_proj[:, width:]
    else:
        up = self.up_proj
    activation = activation_of(self.act_fn)
    assert activation is not None  # `covers` has looked
    return ops.moe_mlp(
        hidden_states, top_k_weights, top_k_index, up, self.down_proj, w_gate=gate, activation=activation
    )


def softmax_router(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over all experts, then the best k (Mixtral, Qwen2-MoE, Qwen3-MoE): logits, weights, experts."""
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    if not runs_here(hidden_states, self.weight) or hidden_states.dtype != self.weight.dtype:
        return fallback(self, hidden_states)
    logits = ops.linear(hidden_states, self.weight)
    weights, experts = ops.topk_route(
        logits, self.top_k, pre_softmax=True, normalize=getattr(self, "norm_topk_prob", True)
    )
    # Mixtral keeps its weights in fp32, the Qwens round them to the dtype of the logits.
    return logits, weights.to(logits.dtype) if hasattr(self, "norm_topk_prob") else weights, experts


def chosen_softmax_router(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best k, then softmax over them (GraniteMoeHybrid)."""
    if not runs_here(hidden_states, self.weight) or hidden_states.dtype != self.weight.dtype:
        return fallback(self, hidden_states)
    logits = ops.linear(hidden_states, self.weight).float()
    weights, experts = ops.topk_route(logits, self.top_k)
    return logits, weights.type_as(hidden_states), experts


def sigmoid_router(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sigmoid scores with a correction that steers the choice, optionally within groups (NemotronH)."""
    groups, best = self.num_group, self.topk_group
    # A group is scored by its best two experts there, by its best k / topk_group here.
    if not runs_here(hidden_states, self.weight) or (groups > 1 and max(1, self.top_k // best) != 2):
        return fallback(self, hidden_states)
    with torch.autocast("cpu", enabled=False):
        logits = ops.linear(hidden_states.reshape(-1, self.hidden_dim).float(), self.weight.float())
    weights, experts = ops.topk_route(
        logits,
        self.top_k,
        score="sigmoid",
        bias=self.e_score_correction_bias.float(),
        num_groups=groups if groups > 1 else None,
        groups_topk=best if groups > 1 else None,
        scaling=self.routed_scaling_factor,
        normalize=self.norm_topk_prob,
    )
    return logits, weights, experts
