"""Cases of pruned layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from foldscan import ops
from foldscan.bench.case import OURS, Case, Peer


def _inputs(m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    weight = torch.randn(n, k).to(dtype)
    mask = ops.sparsity_mask_2_4(weight)
    return {"x": torch.randn(m, k).to(dtype), "weight": weight * mask, "compressed": ops.compress_2_4(weight, mask)}


def _implementations(*_: int) -> dict[str, Peer]:
    return {
        OURS: lambda x, weight, compressed: ops.linear_2_4(x, compressed),
        "torch, dense": lambda x, weight, compressed: F.linear(x, weight),
        "foldscan, dense": lambda x, weight, compressed: ops.linear(x, weight),
    }


CASES: list[Case] = [
    Case(
        "linear_2_4",
        ("M", "N", "K"),
        [(m, n, k) for n, k in ((18560, 4096), (4096, 8192)) for m in (1, 4, 16)],
        _inputs,
        _implementations,
        lambda m, n, k: 2 * m * n * k,
        lambda m, n, k, element: element * (m * k + n * k / 2 + m * n) + n * k / 8,
        modes=("fwd",),
    )
]
