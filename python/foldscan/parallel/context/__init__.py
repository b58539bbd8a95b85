"""Context parallelism: the tokens of a packed batch on several ranks, through attention, convolution and scan.

    layout = ContextLayout(total, cu_seqlens, group.size)
    context = ContextParallel(layout, group)
    packing = Packing(layout.cu_seqlens(group.index), longest, positions[layout.indices(group.index)], context=context)

Every rank gives the modules of `foldscan.nn` its own rows, ``batch[layout.indices(group.index)]``, and this packing.
"""

from __future__ import annotations

from typing import Literal

import torch

from foldscan import ops
from foldscan.nn.packing import Context
from foldscan.parallel.context.attention import gathered_attention, ring_attention
from foldscan.parallel.context.conv import context_conv
from foldscan.parallel.context.layout import ContextLayout, Segment
from foldscan.parallel.context.scan import context_scan
from foldscan.parallel.groups import Group

__all__ = [
    "ContextLayout",
    "ContextParallel",
    "Segment",
    "context_conv",
    "context_scan",
    "gathered_attention",
    "ring_attention",
]


class ContextParallel(Context):
    """What `foldscan.nn` asks of a packed batch that is divided over ranks.

    Args:
        layout: of this batch. group: the cp group, of ``layout.size`` ranks.
        method: how attention gets its keys; a layer with a sliding window gathers them in any case.
    """

    def __init__(self, layout: ContextLayout, group: Group, method: Literal["ring", "all_gather"] = "ring") -> None:
        if method not in ("ring", "all_gather"):
            raise ValueError(f"method: got {method!r}, want 'ring' or 'all_gather'")
        layout.check_group(group)
        self.layout, self.group, self.method = layout, group, method

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window_size: tuple[int, int]
    ) -> torch.Tensor:
        """Causal attention within documents: (T_loc, Hq, D), twice (T_loc, Hkv, .) to (T_loc, Hq, Dv)."""
        if self.group.size == 1:
            cu, longest = self.layout.cu_seqlens(0).to(q.device), self.layout.total
            return ops.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True, window_size=window_size)
        attend = ring_attention if self.method == "ring" and window_size[0] < 0 else gathered_attention
        return attend(q, k, v, self.layout, self.group, window_size=window_size)

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Causal convolution with SiLU within documents: (T_loc, C) to the same."""
        return context_conv(x, weight, bias, self.layout, self.group)

    def scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        dt_limit: tuple[float, float],
    ) -> torch.Tensor:
        """The Mamba-2 scan within documents, softplus on the time steps: (T_loc, H, P) to the same."""
        return context_scan(
            x, dt, A, B, C, self.layout, self.group, D=D, z=z, dt_bias=dt_bias, dt_softplus=True, dt_limit=dt_limit
        )
