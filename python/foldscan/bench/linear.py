"""Cases of the linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from foldscan import ops
from foldscan.bench.case import OURS, Case, Peer


def _inputs(m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"x": torch.randn(m, k).to(dtype), "weight": torch.randn(n, k).to(dtype)}


def _implementations(*_: int) -> dict[str, Peer]:
    return {OURS: lambda x, weight: ops.linear(x, weight), "torch": lambda x, weight: F.linear(x, weight)}


CASES = [
    Case(
        "linear",
        ("M", "N", "K"),
        [(2048, 2048, 1024), (1, 4096, 4096)],
        _inputs,
        _implementations,
        lambda m, n, k: 2 * m * n * k,
        lambda m, n, k, element: element * (m * k + n * k + m * n),
        headline=2,
    )
]
