"""Cases of the Mixture-of-Experts layer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from foldscan import ops
from foldscan.bench.case import OURS, Case, Peer
from foldscan.reference import eager_moe
from foldscan.reference.moe import activate


def _inputs(t: int, h: int, f: int, e: int, k: int, gated: bool, dtype: torch.dtype) -> dict[str, Any]:
    probs, experts = torch.randn(t, e).softmax(-1).topk(k)
    weights = {
        "w_up": (torch.randn(e, f, h) * h**-0.5).to(dtype),
        "w_down": (torch.randn(e, h, f) * f**-0.5).to(dtype),
    }
    if gated:
        weights["w_gate"] = (torch.randn(e, f, h) * h**-0.5).to(dtype)
    return {"tokens": torch.randn(t, h).to(dtype), "probs": probs, "experts": experts, **weights}


def _grouped(tokens: Any, probs: Any, experts: Any, w_up: Any, w_down: Any, w_gate: Any, activation: str) -> Any:
    """Rows sorted by expert, three ``F.grouped_mm``, rows back in token order, summed over the slots."""
    k = experts.shape[1]
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    offs = torch.bincount(flat, minlength=w_up.shape[0]).cumsum(0).int()
    x = tokens[order // k]
    up = F.grouped_mm(x, w_up.transpose(1, 2), offs=offs)
    if w_gate is None:
        hidden = activate(up, activation)
    else:
        hidden = activate(F.grouped_mm(x, w_gate.transpose(1, 2), offs=offs), activation) * up
    y = F.grouped_mm(hidden, w_down.transpose(1, 2), offs=offs) * probs.reshape(-1)[order, None].to(x.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel())
    return y[back].view(tokens.shape[0], k, -1).sum(1)


def _transformers() -> Callable[..., torch.Tensor]:
    """The expert loop of Hugging Face's Qwen3-MoE, on gate and up weights that lie together; forward only."""
    fused: dict[int, torch.Tensor] = {}

    def run(tokens: Any, probs: Any, experts: Any, w_up: Any, w_down: Any, w_gate: Any) -> torch.Tensor:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        if torch.is_grad_enabled():
            raise NotImplementedError("its gate and up weights are one parameter: the torch expert loop is its twin")
        if id(w_up) not in fused:
            fused[id(w_up)] = torch.cat([w_gate, w_up], 1)
        layer: Any = SimpleNamespace(
            num_experts=w_up.shape[0], gate_up_proj=fused[id(w_up)], down_proj=w_down, act_fn=F.silu
        )
        forward = getattr(Qwen3MoeExperts.forward, "__wrapped__", Qwen3MoeExperts.forward)
        return forward(layer, tokens, experts, probs.to(tokens.dtype))

    return run


def _implementations(activation: str) -> Callable[..., dict[str, Peer]]:
    def implementations(*_: int) -> dict[str, Peer]:
        def bind(fn: Callable[..., Any]) -> Callable[..., Any]:
            def call(tokens: Any, probs: Any, experts: Any, w_up: Any, w_down: Any, w_gate: Any = None) -> Any:
                return fn(tokens, probs, experts, w_up, w_down, w_gate=w_gate, activation=activation)

            return call

        peers: dict[str, Peer] = {
            OURS: bind(ops.moe_mlp),
            "torch expert loop": bind(eager_moe.moe_mlp),
            "torch grouped_mm": bind(_grouped),
        }
        if activation == "silu":
            peers["transformers eager"] = _transformers()
        return peers

    return implementations


def _case(op: str, shapes: list[tuple[int, ...]], activation: str, modes: tuple[str, ...]) -> Case:
    gated = activation == "silu"
    matrices = 3 if gated else 2

    def inputs(t: int, h: int, f: int, e: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
        return _inputs(t, h, f, e, k, gated, dtype)

    def moved(t: int, h: int, f: int, e: int, k: int, element: int) -> float:
        hit = e * (1 - (1 - k / e) ** t)  # experts that a token reaches, on average
        return element * (2 * t * h + matrices * hit * h * f)

    return Case(
        op,
        ("T", "H", "F", "E", "k"),
        shapes,
        inputs,
        _implementations(activation),
        lambda t, h, f, e, k: 2 * matrices * t * k * h * f,
        moved,
        modes=modes,
        headline=2,
    )


# Qwen3-30B-A3B, Nemotron-3-Nano and Mixtral-8x7B layers. Training and the last two at reduced size: a quarter of the
# experts, with as many rows each, or a quarter of the hidden width, so that a step of all peers fits 16 GB.
BOTH = ("fwd", "fwd+bwd")
CASES = [
    _case("moe_mlp", [(2048, 2048, 768, 32, 2), (16, 2048, 768, 32, 8), (1, 2048, 768, 32, 8)], "silu", BOTH),
    _case(
        "moe_mlp_128", [(2048, 2048, 768, 128, 8), (16, 2048, 768, 128, 8), (1, 2048, 768, 128, 8)], "silu", ("fwd",)
    ),
    _case("moe_mlp_relu2", [(2048, 2688, 1856, 16, 2), (16, 2688, 1856, 32, 6), (1, 2688, 1856, 32, 6)], "relu2", BOTH),
    _case("moe_mlp_mixtral", [(2048, 4096, 3584, 8, 2), (16, 4096, 3584, 8, 2), (1, 4096, 3584, 8, 2)], "silu", BOTH),
]
