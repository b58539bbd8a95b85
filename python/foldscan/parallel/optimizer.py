"""A distributed optimizer: each element of the model has one owner, which sums its gradient and updates it (ZeRO-1).

Gradients are summed over a parameter's replica group (`Placement.replicas`) by a reduce-scatter that leaves each rank
the sum of what it owns; the owner updates; an all-gather brings the new values back (arXiv:1910.02054). As every
element of the model, dense or expert, has exactly one owner in the world, the gradient's norm is the root of the sum of
all owned squares: there are no duplicates to filter and no group to choose (Megatron-LM left out expert gradients for
years, its issue 5916).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foldscan.parallel import collectives
from foldscan.parallel.groups import Group, shares
from foldscan.parallel.placement import Placement


@dataclass
class Shard:
    """What a rank owns of a parameter: ``length`` rows from ``start`` along ``dim`` of the local tensor.

    Attributes:
        value: the owned part, fp32 at least; the optimizer's own copy where the replica group has more than one rank or
            the parameter is narrower, else the parameter itself.
    """

    parameter: nn.Parameter
    dim: int
    lengths: list[int]
    start: int
    value: nn.Parameter

    def piece(self, tensor: torch.Tensor, member: int) -> torch.Tensor:
        """The part of a local tensor that a member of the replica group owns."""
        return tensor.narrow(self.dim, sum(self.lengths[:member]), self.lengths[member])


def _dim_to_cut(shape: tuple[int, ...], parts: int) -> int:
    """The first dimension with a row for everyone, else the longest: a lone expert is cut inside."""
    return next(
        (dim for dim, size in enumerate(shape) if size >= parts), max(range(len(shape)), key=lambda d: shape[d])
    )


class DistributedOptimizer:
    """An optimizer whose state, and work, is divided over the ranks that hold the same parameters.

    Args:
        named: this rank's parameters by their names in the whole model.
        placements: where those lie (`foldscan.parallel.placement.placements`).
        group: this rank's `Group` along some axes (`ProcessGroups.group`).
        make: the optimizer for named parameters: AdamW with its groups, for instance.
        ema: decay of an exponential moving average of the owned values, None for none.

    Attributes:
        shards: what this rank owns, by name. inner: the optimizer over it. averages: the moving averages, by name.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        placements: Mapping[str, Placement],
        group: Callable[[str], Group],
        make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
        *,
        ema: float | None = None,
    ) -> None:
        self.world = group("tp-cp-dp-pp")
        self.shards: dict[str, Shard] = {}
        self._groups: dict[str, tuple[Group, list[str]]] = {}
        for name, parameter in named:
            axes = placements[name].replicas
            replicas = self._groups.setdefault(axes, (group(axes), []))
            replicas[1].append(name)
            self.shards[name] = _shard(parameter, replicas[0])
        self.inner = make([(name, shard.value) for name, shard in self.shards.items()])
        self.ema = ema
        self.averages = {} if ema is None else {n: s.value.detach().clone() for n, s in self.shards.items()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the inner optimizer, to set the learning rate in."""
        return self.inner.param_groups

    def zero_grad(self) -> None:
        for shard in self.shards.values():
            shard.parameter.grad = None
            shard.value.grad = None

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Give every owner the sum of its gradients over the replicas; where there is no gradient it is zero."""
        for group, names in self._groups.values():
            for dtype, some in self._by_dtype(names).items():
                self._reduce(group, some, dtype)

    def _by_dtype(self, names: list[str]) -> dict[torch.dtype, list[str]]:
        found: dict[torch.dtype, list[str]] = {}
        for name in names:
            found.setdefault(self.shards[name].parameter.dtype, []).append(name)
        return found

    def _reduce(self, group: Group, names: list[str], dtype: torch.dtype) -> None:
        shards = [self.shards[name] for name in names]
        grads = [s.parameter.grad if s.parameter.grad is not None else torch.zeros_like(s.parameter) for s in shards]
        wide = torch.promote_types(dtype, torch.float32)
        if group.size == 1:
            for shard, grad in zip(shards, grads):
                shard.value.grad = grad.to(wide)
            return
        pieces = [[s.piece(g, member).reshape(-1) for s, g in zip(shards, grads)] for member in range(group.size)]
        counts = [sum(p.numel() for p in member) for member in pieces]
        flat = torch.cat([p.to(wide) for member in pieces for p in member])
        own = collectives.reduce_scatter(flat, counts, group, label="gradients")
        sizes = [s.value.numel() for s in shards]
        for shard, part in zip(shards, own.split(sizes)):
            shard.value.grad = part.view(shard.value.shape)

    @torch.no_grad()
    def norm(self) -> float:
        """The norm of the whole model's gradient, the same bits on every rank."""
        grads = [s.value.grad for s in self.shards.values() if s.value.grad is not None]
        squares = torch.zeros(1, dtype=torch.float64)
        for grad in grads:
            squares += grad.double().square().sum()
        return float(collectives.all_sum(squares, self.world, label="norm").sqrt())

    @torch.no_grad()
    def clip(self, norm: float, limit: float) -> None:
        """Scale all gradients so that their norm, which is ``norm``, is at most ``limit``."""
        factor = min(1.0, limit / (norm + 1e-6))
        if factor < 1.0:
            for shard in self.shards.values():
                if shard.value.grad is not None:
                    shard.value.grad *= factor

    @torch.no_grad()
    def step(self) -> None:
        """Update what this rank owns, and bring in what the others updated."""
        self.inner.step()
        for name, average in self.averages.items():
            average.lerp_(self.shards[name].value, 1 - (self.ema or 0.0))
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Bring every parameter up to its owners' values."""
        for group, names in self._groups.values():
            for some in self._by_dtype(names).values():
                self._publish(group, some)

    def _publish(self, group: Group, names: list[str]) -> None:
        shards = [self.shards[name] for name in names]
        if group.size == 1:
            for shard in shards:
                if shard.value is not shard.parameter:
                    shard.parameter.copy_(shard.value)
            return
        flat = torch.cat([s.value.to(s.parameter.dtype).reshape(-1) for s in shards])
        counts = [
            sum(s.lengths[member] * s.parameter.numel() // max(1, s.parameter.shape[s.dim]) for s in shards)
            for member in range(group.size)
        ]
        everything = collectives.all_gather(flat, counts, group, label="parameters")
        for member, part in enumerate(everything.split(counts)):
            at = 0
            for shard in shards:
                piece = shard.piece(shard.parameter, member)
                piece.copy_(part[at : at + piece.numel()].view(piece.shape))
                at += piece.numel()


def _shard(parameter: nn.Parameter, group: Group) -> Shard:
    shape = tuple(parameter.shape)
    dim = _dim_to_cut(shape, group.size)
    lengths = shares(shape[dim], group.size)
    start = sum(lengths[: group.index])
    wide = torch.promote_types(parameter.dtype, torch.float32)
    if group.size == 1 and parameter.dtype == wide:
        return Shard(parameter, dim, lengths, start, parameter)
    own = parameter.detach().narrow(dim, start, lengths[group.index]).to(wide, copy=True)
    return Shard(parameter, dim, lengths, start, nn.Parameter(own.contiguous()))
