"""Ways of rows from where tokens live to where their experts are, and back.

A link has two directions. ``out`` copies: a token becomes its rows. ``back`` adds: a token's rows become one. Each is
the adjoint of the other, so dispatch is ``out`` with ``back`` as its gradient, and combine is ``back`` with ``out`` as
its gradient: one code for both, the same bytes and the same order of sums in forward and in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from foldscan import ops
from foldscan.ops import Permutation
from foldscan.parallel import collectives
from foldscan.parallel.groups import Group


class Link(Protocol):
    """``label`` names the rows in the count of bytes."""

    def out(self, x: torch.Tensor, label: str) -> torch.Tensor: ...

    def back(self, y: torch.Tensor, label: str) -> torch.Tensor: ...


def add_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Row n is the sum of the rows ``x[index[n, j]]`` from the first j to the last, in fp32 (fp64), rounded once.

    Args:
        x: (R, H). index: (N, s) int64; -1 adds nothing.
    """
    # Of how x was sorted only the inverse matters to the sum.
    unused = index.new_empty(x.shape[0])
    return ops.unpermute(x, Permutation(unused, index, unused, unused, None))


def take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x[index]``, zeros where the index is -1.

    Args:
        x: (R, H). index: (N,) int64.
    """
    if x.shape[0] == 0 or not x.is_cuda:
        return add_rows(x, index[:, None])
    return x.index_select(0, index.clamp(min=0)).masked_fill_((index < 0)[:, None], 0)


def sort_rows(keys: torch.Tensor, groups: int, capacity: int | None = None) -> Permutation:
    """Stable counting sort of the assignments of (N, s) ``keys`` in [-1, groups), padded where there is a capacity."""
    nothing = torch.empty(keys.shape[0], 0, device=keys.device)
    padded = capacity is not None
    return ops.permute(nothing, keys, groups, capacity=capacity, drop_policy="position", pad_to_capacity=padded)[1]


@dataclass(frozen=True)
class Copies:
    """Rows that are copies of local tokens.

    Attributes:
        source: (R,) the token of every row, -1 for a row of zeros.
        sums: indices for `add_rows`, applied one after the other, that bring rows back to tokens.
    """

    source: torch.Tensor
    sums: tuple[torch.Tensor, ...]

    def out(self, x: torch.Tensor, label: str) -> torch.Tensor:
        return take_rows(x, self.source)

    def back(self, y: torch.Tensor, label: str) -> torch.Tensor:
        for index in self.sums:
            y = add_rows(y, index)
        return y


@dataclass(frozen=True)
class Exchanged:
    """Every row goes to one member of the group: ``send[i]`` rows to member i, ``receive[i]`` from it."""

    group: Group
    send: Sequence[int]
    receive: Sequence[int]

    def out(self, x: torch.Tensor, label: str) -> torch.Tensor:
        if self.group.size == 1:
            return x
        return collectives.all_to_all(x, self.send, self.receive, self.group, label=label)

    def back(self, y: torch.Tensor, label: str) -> torch.Tensor:
        if self.group.size == 1:
            return y
        return collectives.all_to_all(y, self.receive, self.send, self.group, label=label)


@dataclass(frozen=True)
class Gathered:
    """Every row goes to all members of the group, ``counts[i]`` rows from member i; back, they are added by rank."""

    group: Group
    counts: Sequence[int]

    def out(self, x: torch.Tensor, label: str) -> torch.Tensor:
        return x if self.group.size == 1 else collectives.all_gather(x, self.counts, self.group, label=label)

    def back(self, y: torch.Tensor, label: str) -> torch.Tensor:
        return y if self.group.size == 1 else collectives.reduce_scatter(y, self.counts, self.group, label=label)


@dataclass(frozen=True)
class Shared:
    """What arrived on each ETP member goes to all of them and becomes rows of experts.

    The members hold slices of the same experts, so a row's result is the sum over the members. It is made before rows
    of one token are added: the sum over ETP then knows nothing of how a token came here.

    Attributes:
        arrivals: to gather what arrived, by members.
        rows: rows of each member's arrivals.
        copies: from the gathered arrivals to rows, and from this member's rows to its arrivals. None where every
            arrival is one row.
    """

    arrivals: Gathered
    rows: Gathered
    copies: Copies | None

    def out(self, x: torch.Tensor, label: str) -> torch.Tensor:
        x = self.arrivals.out(x, label)
        return x if self.copies is None else self.copies.out(x, label)

    def back(self, y: torch.Tensor, label: str) -> torch.Tensor:
        y = self.rows.back(y, label)
        return y if self.copies is None else self.copies.back(y, label)


@dataclass(frozen=True)
class Chain:
    """One link after the other."""

    links: tuple[Link, ...]

    def out(self, x: torch.Tensor, label: str) -> torch.Tensor:
        for link in self.links:
            x = link.out(x, label)
        return x

    def back(self, y: torch.Tensor, label: str) -> torch.Tensor:
        for link in reversed(self.links):
            y = link.back(y, label)
        return y


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, link: Link) -> torch.Tensor:
        ctx.link = link
        return link.out(x, "rows")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.link.back(grads[0].contiguous(), "rows"), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, anchor: torch.Tensor | None, link: Link) -> torch.Tensor:
        ctx.link = link
        return link.back(y, "tokens")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.link.out(grads[0].contiguous(), "tokens"), None, None


class _Dispatch(torch.autograd.Function):
    """Tokens and probabilities in one node: their ways back begin together, in one order on every rank."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, probs: torch.Tensor, link: Link, prob_link: Link) -> Any:
        ctx.links = link, prob_link
        return link.out(tokens, "tokens"), prob_link.out(probs, "probs")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        link, prob_link = ctx.links
        return link.back(grads[0].contiguous(), "tokens"), prob_link.back(grads[1].contiguous(), "probs"), None, None


def copy_out(x: torch.Tensor, link: Link) -> torch.Tensor:
    """``link.out``, local and differentiable."""
    return _Out.apply(x, link)


def bring_back(y: torch.Tensor, link: Link, anchor: torch.Tensor | None = None) -> torch.Tensor:
    """``link.back``, differentiable.

    Args:
        anchor: where it needs a gradient, the backward of this call runs (and talks to the other ranks) even if y, say
            of no rows, has been cut off from the graph.
    """
    return _Back.apply(y, anchor, link)


def dispatch(
    tokens: torch.Tensor, probs: torch.Tensor, link: Link, prob_link: Link
) -> tuple[torch.Tensor, torch.Tensor]:
    """``link.out`` of the tokens and ``prob_link.out`` of the probabilities, differentiable."""
    return _Dispatch.apply(tokens, probs, link, prob_link)
