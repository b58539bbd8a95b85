"""The best plain-PyTorch form of the MoE ops on a CPU: rows sorted by expert, one ``F.linear`` per expert hit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from foldscan.reference.moe import activate, grouped_mm

__all__ = ["grouped_mm", "moe_mlp"]


def moe_mlp(
    tokens: torch.Tensor,
    probs: torch.Tensor,
    experts: torch.Tensor,
    w_up: Any,
    w_down: Any,
    *,
    w_gate: Any = None,
    activation: str = "silu",
) -> torch.Tensor:
    """See `foldscan.ops.moe_mlp`."""
    k = experts.shape[1]
    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat[flat >= 0], minlength=w_up.shape[0]).tolist()
    out = tokens.new_zeros(tokens.shape[0], w_down.shape[1])
    begin = int((flat < 0).sum())
    # unbind once: indexing per expert would make a gradient of all experts for each of them.
    ups, downs, gates = w_up.unbind(0), w_down.unbind(0), None if w_gate is None else w_gate.unbind(0)
    for e, n in enumerate(counts):
        if n == 0:
            continue
        ids = order[begin : begin + n]
        begin += n
        token = ids // k
        x = tokens[token]
        up = F.linear(x, ups[e])
        hidden = activate(up, activation) if gates is None else activate(F.linear(x, gates[e]), activation) * up
        y = F.linear(hidden, downs[e]) * probs.reshape(-1)[ids, None].to(tokens.dtype)
        out = out.index_add(0, token, y)
    return out
