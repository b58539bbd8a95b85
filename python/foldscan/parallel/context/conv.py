"""Causal convolution over documents that several ranks hold: a halo of W - 1 tokens travels."""

from __future__ import annotations

import torch

from foldscan import ops
from foldscan.parallel import adjoint
from foldscan.parallel.context.layout import ContextLayout
from foldscan.parallel.groups import Group


def context_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layout: ContextLayout,
    group: Group,
    activation: str | None = "silu",
) -> torch.Tensor:
    """Causal depthwise convolution within documents, ``ops.causal_conv1d_fn`` on one rank's share of a packed batch.

    Args:
        x: (T_loc, C), this rank's rows as ``layout`` deals them; fp32, bf16, fp16 or fp64.
        weight: (C, W), W in 2..8. bias: (C) or None.
        group: as many ranks as the layout has.

    Returns:
        (T_loc, C), the same bits as on one rank. Differentiable in x, weight and bias. A rank sends each rank the rows
        that stand among the W - 1 before a segment of that rank, in the same document, and gets their gradients back.

    Raises:
        TypeError, ValueError: shapes or dtypes, or a group of another size.
    """
    layout.check_group(group)
    layout.check_rows("x", x, group.index, "channels")
    rank, past = group.index, weight.shape[1] - 1
    halo, cu = layout.halo(rank, past), layout.cu_seqlens(rank).to(x.device)
    states = None
    if not halo.is_empty:
        sent = x.index_select(0, halo.send.to(x.device))
        got = adjoint.all_to_all(sent, halo.send_counts, halo.receive_counts, group, label="halo")
        before = torch.cat([got, got.new_zeros(1, x.shape[1])])[halo.places.to(x.device)]  # (segments, W - 1, C)
        # The first piece of a segment continues what came before it; an empty segment has none.
        held = [(i, s) for i, s in enumerate(layout.segments(rank)) if s.rows]
        firsts = torch.searchsorted(cu, torch.tensor([s.row for _, s in held], dtype=cu.dtype, device=cu.device))
        states = x.new_zeros(cu.shape[0] - 1, x.shape[1], past)
        states = states.index_copy(0, firsts, before[[i for i, _ in held]].transpose(1, 2))
    out = ops.causal_conv1d_fn(
        x.t().unsqueeze(0), weight, bias, initial_states=states, activation=activation, cu_seqlens=cu
    )
    assert isinstance(out, torch.Tensor)  # no final states were asked for
    return out.squeeze(0).t()
