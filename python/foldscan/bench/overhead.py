"""What a call costs before its kernel begins: ops on a few numbers, beside ``torch.add``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from foldscan import ops
from foldscan.bench.case import OURS, Case, Peer

CALLS = 100  # a sample: one call is too short for the clock


def _repeat(call: Callable[[], Any], recording: bool) -> Callable[..., Any]:
    def run(calls: int) -> Any:
        with torch.set_grad_enabled(recording):
            for _ in range(calls - 1):
                call()
            return call()

    return run


def _tiny(op: str, dtype: torch.dtype, recording: bool) -> Callable[[], Any]:
    """A call of one op that has next to nothing to do."""

    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        x = torch.randn(*shape).to(dtype)
        return x.requires_grad_() if recording else x

    if op == "linear":
        x, weight = make(1, 16), make(16, 16)
        return lambda: ops.linear(x, weight)
    if op == "rmsnorm_fn":
        x, z, scale = make(1, 16), make(1, 16), make(16, dtype=torch.float32)
        return lambda: ops.rmsnorm_fn(x, scale, None, z, 1e-5, 16, False)
    if op == "topk_route":
        logits = make(1, 8)
        return lambda: ops.topk_route(logits, 2)
    if op == "moe_mlp":
        tokens, up, down = make(1, 16), make(2, 16, 16), make(2, 16, 16)
        probs, experts = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
        return lambda: ops.moe_mlp(tokens, probs, experts, up, down, activation="relu2")
    if op == "selective_state_update":
        state, x, dt, A = torch.randn(1, 1, 8, 16), make(1, 1, 8), torch.randn(1, 1, 8), -torch.rand(1, 8, 16)
        B, C = make(1, 1, 16), make(1, 1, 16)
        return lambda: ops.selective_state_update(state, x, dt, A, B, C)
    q, k, v = make(1, 1, 1, 16), make(1, 1, 1, 16), make(1, 1, 1, 16)
    if op == "flash_attn_func":
        return lambda: ops.flash_attn_func(q, k, v, causal=True)
    return lambda: ops.flash_attn_with_kvcache(q, k, v)


def _case(op: str, recording: bool = False) -> Case:
    """``recording``: autograd records the call (its backward pass is not run)."""

    def implementations(calls: int) -> dict[str, Peer]:
        a, b = torch.randn(16), torch.randn(16)
        if recording:
            a.requires_grad_()
        return {
            OURS: _repeat(_tiny(op, torch.float32, recording), recording),
            "torch.add": _repeat(lambda: torch.add(a, b), recording),
        }

    return Case(
        f"overhead_{op}{'_recorded' if recording else ''}",
        ("calls",),
        [(CALLS,)],
        lambda calls, dtype: {"calls": calls},
        implementations,
        lambda calls: float(calls),
        lambda calls, element: float(calls),
        modes=("fwd",),
        dtypes=("float32",),
        headline=0,
        work=lambda *_: 1.0,
    )


CASES = [
    *map(
        _case,
        ("linear", "rmsnorm_fn", "topk_route", "moe_mlp", "selective_state_update", "flash_attn_with_kvcache"),
    ),
    _case("linear", True),
    _case("rmsnorm_fn", True),
    _case("flash_attn_func", True),
]
