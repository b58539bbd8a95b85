"""Cases of the fused losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from foldscan import ops
from foldscan.bench.case import OURS, Case, Peer


def _inputs(n: int, h: int, v: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden": torch.randn(n, h).to(dtype),
        "weight": (torch.randn(v, h) * h**-0.5).to(dtype),
        "targets": torch.randint(v, (n,)),
    }


def _implementations(*_: int) -> dict[str, Peer]:
    return {
        OURS: lambda hidden, weight, targets: ops.linear_cross_entropy(hidden, weight, targets),
        "torch cross_entropy(linear)": lambda hidden, weight, targets: F.cross_entropy(
            F.linear(hidden, weight).float(), targets
        ),
    }


CASES = [
    Case(
        "linear_cross_entropy",
        ("N", "H", "V"),
        [(2048, 512, 32000)],
        _inputs,
        _implementations,
        lambda n, h, v: 2 * n * h * v,
        lambda n, h, v, element: element * (n * h + v * h),
        backward_flops=4.0,
    )
]
