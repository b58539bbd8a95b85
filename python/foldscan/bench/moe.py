"""Cases of the Mixture-of-Experts layer."""

from __future__ import annotations

from typing import Any

import torch

from foldscan import ops
from foldscan.bench.case import OURS, Case, Peer
from foldscan.reference import eager_moe


def _inputs(t: int, h: int, f: int, e: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    probs, experts = torch.randn(t, e).softmax(-1).topk(k)
    return {
        "tokens": torch.randn(t, h).to(dtype),
        "probs": probs,
        "experts": experts.int(),
        "w_up": (torch.randn(e, f, h) * h**-0.5).to(dtype),
        "w_gate": (torch.randn(e, f, h) * h**-0.5).to(dtype),
        "w_down": (torch.randn(e, h, f) * f**-0.5).to(dtype),
    }


def _implementations(*_: int) -> dict[str, Peer]:
    def ours(tokens: Any, probs: Any, experts: Any, w_up: Any, w_gate: Any, w_down: Any) -> torch.Tensor:
        return ops.moe_mlp(tokens, probs, experts, w_up, w_down, w_gate=w_gate, activation="silu")

    def loop(tokens: Any, probs: Any, experts: Any, w_up: Any, w_gate: Any, w_down: Any) -> torch.Tensor:
        return eager_moe.moe_mlp(tokens, probs, experts, w_up, w_down, w_gate=w_gate, activation="silu")

    return {OURS: ours, "torch expert loop": loop}


CASES = [
    Case(
        "moe_mlp",
        ("T", "H", "F", "E", "k"),
        [(2048, 1024, 384, 64, 8), (1, 1024, 384, 64, 8)],
        _inputs,
        _implementations,
        lambda t, h, f, e, k: 6 * t * k * h * f,
        lambda t, h, f, e, k, element: element * (2 * t * h + 3 * min(e, t * k) * h * f),
        headline=2,
    )
]
