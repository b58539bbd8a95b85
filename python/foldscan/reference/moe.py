"""Mixture of Experts in plain PyTorch, token by token where that is the clearest: the definition of `foldscan.ops.moe`.

Any float dtype, any device, differentiable by autograd. Arguments are checked by the public functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Permutation(NamedTuple):
    """How `foldscan.ops.permute` sorted the assignments of tokens to experts; an assignment is ``token * k + slot``.

    Attributes:
        rows: (R,) int64, the assignment of every permuted row, -1 for padding.
        inverse: (T, k) int64, the permuted row of every assignment, -1 if it was dropped or its expert is -1.
        counts: (E,) int64, assignments that every expert got.
        offs: (E,) int32, end of every expert's rows, as `grouped_mm` wants them.
        probs: (R,) fp32, the probability of every permuted row (0 for padding, with gradient), or None.
    """

    rows: torch.Tensor
    inverse: torch.Tensor
    counts: torch.Tensor
    offs: torch.Tensor
    probs: torch.Tensor | None


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def topk_route(
    logits: torch.Tensor,
    k: int,
    *,
    score: str,
    pre_softmax: bool,
    bias: torch.Tensor | None,
    num_groups: int,
    groups_topk: int,
    scaling: float,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `foldscan.ops.topk_route`."""
    logits = _wide(logits)
    if score == "sigmoid":
        scores = torch.sigmoid(logits)
    else:
        scores = torch.softmax(logits, -1) if pre_softmax else logits
    value = scores.detach() if bias is None else scores.detach() + bias.detach().to(scores.dtype)
    T, E = value.shape
    if num_groups > 1:
        size = E // num_groups
        counted = min(size, max(1, k // groups_topk))
        grouped = value.view(T, num_groups, size)
        group_score = grouped.sort(-1, descending=True).values[..., :counted].sum(-1)
        best = group_score.sort(dim=-1, descending=True, stable=True).indices[:, :groups_topk]
        inside = torch.zeros(T, num_groups, dtype=torch.bool, device=value.device).scatter(1, best, True)
        # A key before the value, so that an expert of a chosen group at -inf still beats all outside.
        order = value.sort(dim=-1, descending=True, stable=True).indices
        kept = inside.repeat_interleave(size, 1).gather(1, order)
        experts = order.gather(1, kept.sort(dim=-1, descending=True, stable=True).indices)[:, :k]
    else:
        experts = value.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    probs = scores.gather(1, experts)
    if score == "softmax" and not pre_softmax:
        probs = torch.softmax(probs, -1)
    elif normalize:
        probs = probs / (probs.sum(-1, keepdim=True) + (1e-20 if score == "sigmoid" else 0.0))
    return probs * scaling, experts


def permute(
    tokens: torch.Tensor,
    experts: torch.Tensor,
    num_experts: int,
    capacity: int | None,
    drop_policy: str,
    probs: torch.Tensor | None,
    pad_to_capacity: bool,
) -> tuple[torch.Tensor, Permutation]:
    """See `foldscan.ops.permute`."""
    T, k = experts.shape
    flat = experts.reshape(-1).tolist()
    kept: list[list[int]] = [[] for _ in range(num_experts)]
    for i, e in enumerate(flat):
        if e >= 0:
            kept[e].append(i)
    if capacity is not None:
        for e, ids in enumerate(kept):
            if drop_policy == "probs" and len(ids) > capacity:
                assert probs is not None
                values = probs.detach().reshape(-1).tolist()
                ids = sorted(sorted(ids, key=lambda i: (-values[i], i))[:capacity])
            kept[e] = ids[:capacity]
    counts = [len(ids) for ids in kept]
    if pad_to_capacity:
        assert capacity is not None
        kept = [ids + [-1] * (capacity - len(ids)) for ids in kept]
    order = [i for ids in kept for i in ids]
    ends, total = [], 0
    for ids in kept:
        total += len(ids)
        ends.append(total)
    if not pad_to_capacity:
        size = T * k if capacity is None else min(T * k, num_experts * capacity)
        order += [-1] * (size - len(order))
    inverse = [-1] * (T * k)
    for row, i in enumerate(order):
        if i >= 0:
            inverse[i] = row
    device = tokens.device
    rows = torch.tensor(order, dtype=torch.int64, device=device)
    used = (rows >= 0).to(tokens.dtype)
    permuted = (
        tokens[rows.clamp(min=0) // k] * used[:, None] if T * k else tokens.new_zeros(len(order), tokens.shape[1])
    )
    row_probs = None
    if probs is not None:
        row_probs = _wide(probs).reshape(-1)[rows.clamp(min=0)] * used.to(_wide(probs).dtype) if T * k else used
    return permuted, Permutation(
        rows,
        torch.tensor(inverse, dtype=torch.int64, device=device).view(T, k),
        torch.tensor(counts, dtype=torch.int64, device=device),
        torch.tensor(ends, dtype=torch.int32, device=device),
        row_probs,
    )


def unpermute(permuted: torch.Tensor, permutation: Permutation, probs: torch.Tensor | None) -> torch.Tensor:
    """See `foldscan.ops.unpermute`."""
    T, k = permutation.inverse.shape
    wide = _wide(permuted)
    out = wide.new_zeros(T, permuted.shape[1])
    if permuted.shape[0] == 0:
        return out.to(permuted.dtype)
    for j in range(k):
        row = permutation.inverse[:, j]
        term = wide[row.clamp(min=0)] * (row >= 0).to(wide.dtype)[:, None]
        out = out + (term if probs is None else term * probs[:, j, None].to(wide.dtype))
    return out.to(permuted.dtype)


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `foldscan.ops.grouped_mm`."""
    parts, begin = [], 0
    for g, end in enumerate(offs.tolist()):
        part = a[begin:end] @ b[g]
        parts.append(part if bias is None else part + bias[g])
        begin = end
    parts.append(a.new_zeros(a.shape[0] - begin, b.shape[2]))
    return torch.cat(parts)


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """silu, squared ReLU or exact GELU."""
    if activation == "silu":
        return F.silu(x)
    return F.relu(x).square() if activation == "relu2" else F.gelu(x)


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
    """See `foldscan.ops.moe_mlp`: every expert over every token, masked. Slow on purpose."""
    out = tokens.new_zeros(tokens.shape[0], w_down.shape[1])
    for e in range(w_up.shape[0]):
        weight = (probs * (experts == e)).sum(1, keepdim=True).to(tokens.dtype)
        up = tokens @ w_up[e].T
        hidden = activate(up, activation) if w_gate is None else activate(tokens @ w_gate[e].T, activation) * up
        out = out + weight * (hidden @ w_down[e].T)
    return out


def load_balancing_loss(
    logits: torch.Tensor,
    experts: torch.Tensor,
    score: str,
    num_sequences: int,
    mask: torch.Tensor | None,
    tokens_per_expert: torch.Tensor | None,
) -> torch.Tensor:
    """See `foldscan.ops.load_balancing_loss`."""
    logits = _wide(logits)
    (T, E), k = logits.shape, experts.shape[1]
    p = torch.softmax(logits, -1)
    if score == "sigmoid":
        s = torch.sigmoid(logits)
        p = s / (s.sum(-1, keepdim=True) + 1e-20)
    weight = torch.ones(T, dtype=p.dtype, device=p.device) if mask is None else mask.to(p.dtype)
    B = num_sequences
    if T == 0:
        return p.sum()
    # One more column takes the empty slots.
    slots = torch.where(experts < 0, E, experts.long()).reshape(B, -1)
    votes = weight[:, None].expand(T, k).reshape(B, -1)
    load = torch.zeros(B, E + 1, dtype=p.dtype, device=p.device).scatter_add(1, slots, votes)[:, :E]
    if tokens_per_expert is not None:
        load = tokens_per_expert.detach().to(p.dtype)[None]
    mass = (p * weight[:, None]).view(B, -1, E).sum(1)
    tokens = weight.view(B, -1).sum(1).clamp(min=1)
    return ((load * mass).sum(1) * E / (k * tokens.square())).mean()


def router_z_loss(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """See `foldscan.ops.router_z_loss`."""
    square = torch.logsumexp(_wide(logits), -1).square()
    if mask is None:
        return square.sum() / max(1, square.shape[0])
    weight = mask.to(square.dtype)
    return (square * weight).sum() / weight.sum().clamp(min=1)
