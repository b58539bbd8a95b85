"""Cases of attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from foldscan import ops
from foldscan.bench.case import OURS, Case, Peer


def _inputs(t: int, hq: int, hk: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    return {k: torch.randn(1, t, h, d).to(dtype) for k, h in (("q", hq), ("k", hk), ("v", hk))}


def _implementations(*_: int) -> dict[str, Peer]:
    def sdpa(q: Any, k: Any, v: Any) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return {OURS: lambda q, k, v: ops.flash_attn_func(q, k, v, causal=True), "torch SDPA": sdpa}


CASES = [
    Case(
        "attention_causal",
        ("T", "Hq", "Hkv", "D"),
        [(2048, 8, 8, 64), (1024, 32, 8, 128)],
        _inputs,
        _implementations,
        lambda t, hq, hk, d: 2 * t * t * hq * d,
        lambda t, hq, hk, d, element: 2 * element * t * d * (hq + hk),
        backward_flops=3.5,
        headline=2,
    )
]
