"""The collectives to autograd: the backward of each is its exact adjoint.

With <x, y> summed over the ranks, <collective(x), y> = <x, backward(y)>. A loss that is the sum of what the ranks
compute therefore has the right gradient on each rank with no scale to remember: all_to_all goes back the way it came,
all_gather and reduce_scatter are each other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foldscan.parallel import collectives
from foldscan.parallel.groups import Group


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, send: Any, receive: Any, group: Group, label: str) -> torch.Tensor:
        ctx.args = send, receive, group, label
        return collectives.all_to_all(x, send, receive, group, label=label)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        send, receive, group, label = ctx.args
        return collectives.all_to_all(grads[0], receive, send, group, label=label), None, None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: Any, group: Group, label: str) -> torch.Tensor:
        ctx.args = counts, group, label
        return collectives.all_gather(x, counts, group, label=label)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        counts, group, label = ctx.args
        return collectives.reduce_scatter(grads[0], counts, group, label=label), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, counts: Any, group: Group, label: str) -> torch.Tensor:
        ctx.args = counts, group, label
        return collectives.reduce_scatter(x, counts, group, label=label)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        counts, group, label = ctx.args
        return collectives.all_gather(grads[0], counts, group, label=label), None, None, None


class _Depend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.likes = [(other.new_empty(()), other.shape) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], *(torch.zeros_like(one).expand(shape) for one, shape in ctx.likes)


def depend(x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
    """x, which to autograd is a function of the others too, with derivative zero.

    A collective's backward is a collective: every rank has to come to it, also one that made nothing of what it got or
    had nothing to send.
    """
    return _Depend.apply(x, *(other for other in others if other is not None))


def all_to_all(
    x: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: Group, *, label: str = "rows"
) -> torch.Tensor:
    """`collectives.all_to_all`, differentiable."""
    return x if group.size == 1 else _AllToAll.apply(x, tuple(send), tuple(receive), group, label)


def all_gather(x: torch.Tensor, counts: Sequence[int], group: Group, *, label: str = "rows") -> torch.Tensor:
    """`collectives.all_gather`, differentiable; backward sums what all ranks did with the rows."""
    return x if group.size == 1 else _AllGather.apply(x, tuple(counts), group, label)


def reduce_scatter(x: torch.Tensor, counts: Sequence[int], group: Group, *, label: str = "rows") -> torch.Tensor:
    """`collectives.reduce_scatter`, differentiable; backward gathers."""
    return x if group.size == 1 else _ReduceScatter.apply(x, tuple(counts), group, label)
