"""Cases of the linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from foldscan import ops
from foldscan.bench.case import OURS, Case, Peer

# (out, in) of the projections: Nemotron-H-8B's Mamba input and output, Mamba2-130M's input, Qwen3-30B-A3B's key.
_PROJECTIONS = [(18560, 4096), (4096, 8192), (3352, 768), (768, 2048)]


def _inputs(m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"x": torch.randn(m, k).to(dtype), "weight": torch.randn(n, k).to(dtype)}


def _implementations(*_: int) -> dict[str, Peer]:
    return {OURS: lambda x, weight: ops.linear(x, weight), "torch": lambda x, weight: F.linear(x, weight)}


def _case(op: str, shapes: list[tuple[int, ...]], modes: tuple[str, ...], headline: int) -> Case:
    return Case(
        op,
        ("M", "N", "K"),
        shapes,
        _inputs,
        _implementations,
        lambda m, n, k: 2 * m * n * k,
        lambda m, n, k, element: element * (m * k + n * k + m * n),
        modes=modes,
        headline=headline,
    )


CASES = [
    _case("linear", [(2048, 2048, 1024), (1, 4096, 4096)], ("fwd", "fwd+bwd"), 2),
    _case("linear_decode", [(m, n, k) for n, k in _PROJECTIONS for m in (1, 4, 16, 64)], ("fwd",), 1),
    _case("linear_prefill", [(m, n, k) for n, k in _PROJECTIONS for m in (512, 2048)], ("fwd",), 1),
]
