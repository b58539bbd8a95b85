"""What a benchmark case is: an op, its shapes, inputs, implementations, FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Implementation = Callable[..., Any]
# A peer may be a dictionary of ways to write it (layouts, chunk lengths): the fastest of them is timed and named.
Peer = Implementation | dict[str, Implementation]

OURS = "foldscan"


@dataclass(frozen=True)
class Case:
    """One op.

    Attributes:
        op: name of the rows.
        dims: names of the sizes of a shape.
        shapes: what ``foldscan bench`` runs without ``--shape``.
        inputs: (sizes, dtype=) -> keyword arguments of the implementations.
        implementations: (sizes) -> by name; "foldscan" is ours, the first tensor that one returns is compared.
        flops, bytes: (sizes) and (sizes, element=) of the forward pass; bytes are the compulsory ones.
        modes: "fwd" and "fwd+bwd" (gradients of all floating-point inputs for an upstream gradient of ones).
        dtypes: dtypes it runs in.
        backward_flops, backward_bytes: both passes over the forward pass alone.
        headline: how many of the shapes go into the README's table.
        updates_inputs: implementations write into their inputs, so each gets its own copy.
        work: (implementation, sizes) -> work of this implementation over ours, where they differ.
    """

    op: str
    dims: tuple[str, ...]
    shapes: list[tuple[int, ...]]
    inputs: Callable[..., dict[str, Any]]
    implementations: Callable[..., dict[str, Peer]]
    flops: Callable[..., float]
    bytes: Callable[..., float]
    modes: tuple[str, ...] = ("fwd", "fwd+bwd")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    backward_flops: float = 3.0
    backward_bytes: float = 3.0
    headline: int = 1
    updates_inputs: bool = False
    work: Callable[..., float] | None = None


def compiled(fn: Implementation) -> Implementation:
    """``fn`` under ``torch.compile`` for exactly the shapes it gets; compiled at the first call."""
    return torch.compile(fn, dynamic=False)


def variants(peer: Peer) -> dict[str, Implementation]:
    """The ways to write a peer."""
    return peer if isinstance(peer, dict) else {"": peer}
