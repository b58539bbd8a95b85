"""Packed batches that are hard to divide, and the comparison of what ranks compute with one rank that has it all."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from foldscan.parallel.context import ContextLayout
from foldscan.parallel.groups import Group
from simulated import run_ranks


def random_batches(number: int, seed: int) -> list[tuple[int, ...]]:
    """Cumulative lengths of a few documents, some of them empty."""
    draw = random.Random(seed)
    totals = [draw.choice([7, 23, 64, 100]) for _ in range(number)]
    return [(0, *sorted(draw.choices(range(total + 1), k=draw.randrange(6))), total) for total in totals]


# Cumulative lengths: one document, several of odd lengths with empty ones, boundaries on those of segments, of one
# token each, fewer tokens than segments, one token, none.
BATCHES: tuple[tuple[int, ...], ...] = (
    (0, 37),
    (0, 0, 5, 5, 5, 16, 17, 29, 37, 37),
    (0, 8, 16, 24, 32),
    (0, 4, 32),
    (0, *range(1, 13)),
    (0, 3, 5),
    (0, 1),
    (0, 0, 0),
    *random_batches(4, 3),
)
SIZES = (1, 2, 3, 4, 8)
Local = Callable[[list[torch.Tensor], list[torch.Tensor], ContextLayout, Group], torch.Tensor]
Whole = Callable[[list[torch.Tensor], list[torch.Tensor], torch.Tensor], torch.Tensor]


def leaves(tensors: Sequence[torch.Tensor], index: torch.Tensor | None = None) -> list[torch.Tensor]:
    return [(t if index is None else t[index]).detach().clone().requires_grad_() for t in tensors]


def on_one(
    whole: Whole,
    rows: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    cu: Sequence[int],
    upstream: torch.Tensor,
) -> list[torch.Tensor]:
    """The output, and the gradients of rows and weights (zero where nothing is computed)."""
    mine, theirs = leaves(rows), leaves(weights)
    out = whole(mine, theirs, torch.tensor(cu, dtype=torch.int32))
    if out.requires_grad:
        out.backward(upstream.to(out.dtype))
    return [out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (*mine, *theirs))]


def on_ranks(
    local: Local,
    rows: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    layout: ContextLayout,
    upstream: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> list[torch.Tensor]:
    """As `on_one`, by the ranks of the layout: rows are put back in place, gradients of weights summed."""

    def worker(group: Group) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        index = layout.indices(group.index)
        mine, theirs = leaves(rows, index), leaves(weights)
        out = local(mine, theirs, layout, group)
        out.backward(upstream[index].to(out.dtype))
        grads = [t.grad for t in (*mine, *theirs)]
        assert all(g is not None for g in grads), "a rank without a gradient"
        return out.detach(), grads[: len(mine)], grads[len(mine) :]  # type: ignore[return-value]

    found = run_ranks(layout.size, worker, monkeypatch)
    order = torch.cat([layout.indices(rank) for rank in range(layout.size)])

    def joined(parts: list[torch.Tensor]) -> torch.Tensor:
        together = torch.cat(parts)
        return torch.empty_like(together).index_copy_(0, order, together)

    return [
        joined([out for out, _, _ in found]),
        *(joined([mine[i] for _, mine, _ in found]) for i in range(len(rows))),
        *(torch.stack([theirs[i].double() for _, _, theirs in found]).sum(0) for i in range(len(weights))),
    ]


def assert_equal_to(want: list[torch.Tensor], got: list[torch.Tensor], tolerance: float, what: object) -> None:
    """Every tensor within ``tolerance`` of the largest value of its kind, and of the same shape."""
    for i, (w, g) in enumerate(zip(want, got, strict=True)):
        assert w.shape == g.shape, (what, i, w.shape, g.shape)
        if w.numel():
            scale = max(float(w.abs().max()), 1e-3)
            error = float((g.double() - w.double()).abs().max()) / scale
            assert error <= tolerance, f"{what}, tensor {i}: off by {error:.1e}, want {tolerance:.0e}"
