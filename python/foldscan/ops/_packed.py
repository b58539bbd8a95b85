"""Packed weights that inference keeps: one cache for all ops that multiply by weights.

An entry is good while its weight is alive, unchanged (version counter, storage) and no optimizer has stepped: PyTorch's
fused optimizers change parameters without raising the version counter. What bypasses both (``weight.data`` edited in
place, NumPy views) needs `clear_packed_weights`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

from foldscan.ops._backend import current_backend
from foldscan.ops._library import is_recording, wants_grad

PLAIN = (torch.Tensor, torch.nn.Parameter)

_cache: dict[tuple[Any, ...], tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = {}
# The same entries of tensors that are no views, under a key that costs nothing to build: what a decode step looks up.
_quick: dict[tuple[str, int, torch.dtype], tuple[Any, ...]] = {}


def clear_packed_weights(*_: object) -> None:
    """Forget all packed weights; the next call without gradients packs anew."""
    _cache.clear()
    _quick.clear()


register_optimizer_step_post_hook(clear_packed_weights)


def find_pack(kind: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """What `cached_pack` gave for this very tensor, if it is still good; only where no gradient can be wanted."""
    hit = _quick.get((kind, id(weight), dtype))
    if (
        hit is None
        or hit[0]() is not weight
        or hit[1] != weight._version
        or hit[2] != weight.data_ptr()
        or hit[3] != weight.shape
        or hit[4] != weight.stride()
        or hit[5] is not weight.dtype
    ):
        return None
    return hit[6]


def may_find(*inputs: torch.Tensor) -> bool:
    """True for a plain call of a decode step: contiguous CPU tensors, no gradient, nothing that changes what is called.

    All that an op would check about weights was then checked when `cached_pack` packed them.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
    ):
        return False
    for t in inputs:
        if type(t) is not torch.Tensor or not t.is_cpu or not t.is_contiguous():
            return False
    return current_backend() == "native"


def cached_pack(
    kind: str, weight: torch.Tensor, dtype: torch.dtype, pack: Callable[[torch.Tensor, bool], torch.Tensor]
) -> torch.Tensor:
    """``pack(weight, dtype is bf16)``, kept until the weight changes.

    Args:
        kind: which layout ``pack`` writes. weight: a plain tensor or a view; see `may_cache`.
    """
    owner = weight if weight._base is None else weight._base
    # A view is a new object every time; the tensor that it looks at, with the window, is not.
    key = (kind, id(owner), weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, dtype)
    hit = _cache.get(key)
    if hit is not None and hit[0]() is owner and hit[1] == weight._version:
        return hit[2]
    packed = pack(weight, dtype == torch.bfloat16)
    quick = (kind, id(owner), dtype)

    def forget(_: object) -> None:
        _cache.pop(key, None)
        _quick.pop(quick, None)

    reference = weakref.ref(owner, forget)
    _cache[key] = (reference, weight._version, packed)
    if weight is owner:
        _quick[quick] = (reference, weight._version, *key[2:6], packed)
    return packed


def may_cache(weights: tuple[torch.Tensor, ...], others: tuple[torch.Tensor | None, ...]) -> bool:
    """True where packed weights may be used: no gradient is wanted, nothing is traced, every change can be noticed."""
    if is_recording() or wants_grad(*weights, *others):
        return False
    for weight in weights:
        for t in (weight, weight._base):
            # An inference tensor has no version counter, a subclass may not be what it seems: do not guess.
            if t is not None and (type(t) not in PLAIN or t.is_inference()):
                return False
    return weights[0].device.type == "cpu"
