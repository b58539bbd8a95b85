"""Mixture of Experts: a router, the routed experts, and optionally a shared expert and a latent projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import nn

from foldscan import ops
from foldscan.nn.linear import Linear
from foldscan.nn.mlp import MLP
from foldscan.ops._library import wide


@dataclass
class RouterStats:
    """What a training step wants to know of one expert layer.

    Attributes:
        load_balancing: scalar loss, 1 when the load is even (arXiv:2101.03961).
        z: scalar loss, the mean squared log-sum-exp of the router logits (arXiv:2202.08906).
        counts: (experts,) tokens that each expert got, no gradient.
    """

    load_balancing: torch.Tensor
    z: torch.Tensor
    counts: torch.Tensor


Score = Literal["softmax", "sigmoid"]


class ExpertPeers(Protocol):
    """Other ranks that hold some of a layer's experts (`foldscan.parallel`): what `MoE` asks of them."""

    def drop(self, probs: torch.Tensor, experts: torch.Tensor, num_experts: int) -> torch.Tensor:
        """The choice (T, k) with -1 where an assignment is dropped."""

    def experts(self, compute: Experts, x: torch.Tensor, probs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The routed experts' sums for (T, size), wherever the experts are; ``compute`` is what is here of them."""

    def dense(self, layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """What a layer that is divided over ranks gives for (T, d)."""

    def stats(self, logits: torch.Tensor, experts: torch.Tensor, num_experts: int, score: Score) -> RouterStats:
        """Losses and loads over all ranks that share the batch."""


class Router(nn.Module):
    """Scores tokens against experts in fp32 (fp64 for fp64), whatever the autocast, and picks the best k."""

    e_score_correction_bias: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        pre_softmax: bool = False,
        bias: bool = False,
        num_groups: int | None = None,
        groups_topk: int | None = None,
        scaling: float = 1.0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score: got {score!r}, want 'softmax' or 'sigmoid'")
        self.top_k, self.pre_softmax = top_k, pre_softmax
        self.score = cast(Score, score)
        self.num_groups, self.groups_topk = num_groups, groups_topk
        self.scaling, self.normalize = scaling, normalize
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts) if bias else None)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(T, d) to logits (T, experts) and probabilities (T, k) in at least fp32, and experts (T, k)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = ops.linear(wide(x), wide(self.weight))
        bias = self.e_score_correction_bias
        probs, experts = ops.topk_route(
            logits,
            self.top_k,
            score=self.score,
            pre_softmax=self.pre_softmax,
            bias=None if bias is None else wide(bias),
            num_groups=self.num_groups,
            groups_topk=self.groups_topk,
            scaling=self.scaling,
            normalize=self.normalize,
        )
        return logits, probs, experts


class Experts(nn.Module):
    """The weights of all experts, (experts, out, in)."""

    def __init__(self, size: int, intermediate_size: int, num_experts: int, activation: str) -> None:
        super().__init__()
        if activation not in ("silu", "relu2"):
            raise ValueError(f"activation: got {activation!r}, want 'silu' or 'relu2'")
        self.activation = cast(Literal["silu", "relu2"], activation)
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, size, intermediate_size))
        self.gate_proj = (
            nn.Parameter(torch.empty(num_experts, intermediate_size, size)) if activation == "silu" else None
        )

    def forward(self, x: torch.Tensor, probs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """(T, size), (T, k), (T, k) to (T, size): the probability-weighted sum of the chosen experts."""
        return ops.moe_mlp(
            x, probs, experts, self.up_proj, self.down_proj, w_gate=self.gate_proj, activation=self.activation
        )


class MoE(nn.Module):
    """Sparse feed-forward layer, dropless.

    Args:
        router: the router.
        intermediate_size: width of an expert.
        shared_intermediate_size: width of the expert that sees every token; 0 for none.
        latent_size: routed experts work in this dimension, behind ``fc1_latent_proj`` and ``fc2_latent_proj``.
    """

    def __init__(
        self,
        hidden_size: int,
        router: Router,
        *,
        intermediate_size: int,
        activation: str = "relu2",
        shared_intermediate_size: int = 0,
        latent_size: int | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = router.weight.shape[0]
        self.gate = router
        width = hidden_size if latent_size is None else latent_size
        self.experts = Experts(width, intermediate_size, self.num_experts, activation)
        self.fc1_latent_proj = None if latent_size is None else Linear(hidden_size, latent_size, bias=False)
        self.fc2_latent_proj = None if latent_size is None else Linear(latent_size, hidden_size, bias=False)
        self.shared_experts = (
            MLP(hidden_size, shared_intermediate_size, activation=activation) if shared_intermediate_size else None
        )

    def forward(
        self, x: torch.Tensor, *, stats: bool = False, peers: ExpertPeers | None = None
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """(T, d) to (T, d), and with ``stats`` the losses and loads of the router.

        Args:
            peers: the ranks that share the experts; None when all of them are here.
        """
        logits, probs, experts = self.gate(x)
        inner = x if self.fc1_latent_proj is None else self.fc1_latent_proj(x)
        if peers is None:
            out = self.experts(inner, probs, experts)
        else:
            out = peers.experts(self.experts, inner, probs, peers.drop(probs, experts, self.num_experts))
        if self.fc2_latent_proj is not None:
            out = self.fc2_latent_proj(out)
        if self.shared_experts is not None:
            out = out + (self.shared_experts(x) if peers is None else peers.dense(self.shared_experts, x))
        if not stats:
            return out, None
        ask = self._stats if peers is None else peers.stats
        return out, ask(logits, experts, self.num_experts, self.gate.score)

    @staticmethod
    def _stats(logits: torch.Tensor, experts: torch.Tensor, num_experts: int, score: Score) -> RouterStats:
        counts = torch.bincount(experts.detach().reshape(-1).long(), minlength=num_experts)
        return RouterStats(
            ops.load_balancing_loss(logits, experts, num_experts, score=score),
            ops.router_z_loss(logits),
            counts,
        )

    @torch.no_grad()
    def shift_bias(self, counts: torch.Tensor, rate: float) -> None:
        """Move the score correction by ``rate`` towards experts below the mean load (arXiv:2408.15664)."""
        bias = self.gate.e_score_correction_bias
        if bias is None:
            raise ValueError("shift_bias: the router has no score correction (router_bias is false)")
        load = counts.to(torch.float32)
        bias.add_(torch.sign(load.mean() - load).to(bias.dtype), alpha=rate)
