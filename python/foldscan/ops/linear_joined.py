"""Several linear layers of one input as one product, where their weights are packed anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from foldscan.ops._backend import use_native
from foldscan.ops._library import compute_dtype, kernels
from foldscan.ops._packed import cached_pack, may_cache
from foldscan.ops.linear import linear


def linear_joined(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None] | None = None
) -> torch.Tensor:
    """``cat([linear(x, w, b) for w, b in zip(weights, biases)], -1)``, to the bit.

    Without gradients the weights are packed as one matrix and multiplied in one go, which a single token feels: three
    small products wait for memory three times. Their packed form is not shared with ``linear``'s of the same weights.

    Args:
        x: (..., in). weights: each (out_i, in), one dtype. biases: each (out_i) or None, all or none; None for none.

    Returns:
        (..., sum of out_i), in the dtype of the (cast) x.

    Raises:
        TypeError, ValueError: as ``linear``.
    """
    biases = [None] * len(weights) if biases is None else list(biases)
    dtype = compute_dtype(x)
    alike = all(w.dim() == 2 and w.shape[1] == x.shape[-1] and w.dtype in (dtype, torch.float32) for w in weights)
    whole = len({b is None for b in biases}) == 1
    if (
        not (alike and whole and dtype in (torch.float32, torch.bfloat16))
        or not use_native(x, *weights, *biases)
        or not may_cache(tuple(weights), (x, *biases))
    ):
        return torch.cat([linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)
    bias = None if biases[0] is None else torch.cat([b.float() for b in biases if b is not None])
    rows = x.to(dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out_features = sum(w.shape[0] for w in weights)
    packed = packed_joined(weights, dtype)
    out = kernels.linear_packed(rows.contiguous(), packed, out_features, x.shape[-1], bias)
    return out.view(*x.shape[:-1], out_features)


def packed_joined(weights: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The cached packed form of (out_i, in) weights one below the other, for products in ``dtype``."""
    first, *others = weights
    # A change of any of them must be noticed: cached_pack looks after the first, the kind names the others.
    kind = f"joined{[(id(w), w.data_ptr(), w._version) for w in others]}"
    return cached_pack(kind, first, dtype, lambda w, as_bf16: kernels.linear_pack(torch.cat([w, *others]), as_bf16))
