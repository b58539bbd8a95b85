"""Changing what a module computes and nothing else about it: its class becomes a subclass with another ``forward``.

Parameters, hooks, names and ``isinstance`` stay as they are; ``deepcopy`` and pickle keep the change, `original` undoes
it. A fast ``forward`` that meets a case it does not cover calls the one it replaced, `fallback`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_ORIGINAL = "_foldscan_original"


@functools.cache
def faster(original_class: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """The subclass of ``original_class`` whose forward is ``forward``."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # Pickle finds a class by its name, and this one has none in any module.
        return _rebuild, (original_class, forward), self.__dict__

    members = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__doc__": original_class.__doc__,
        "__module__": original_class.__module__,
        "__qualname__": original_class.__qualname__,
        _ORIGINAL: original_class,
    }
    return type(original_class.__name__, (original_class,), members)


def _rebuild(original_class: type[nn.Module], forward: Callable[..., Any]) -> nn.Module:
    cls = faster(original_class, forward)
    return cls.__new__(cls)


def original(module: nn.Module) -> type[nn.Module]:
    """The class a module had before it was swapped; its class where it was not."""
    return getattr(type(module), _ORIGINAL, type(module))


def is_swapped(module: nn.Module) -> bool:
    """True where the module runs one of our forwards."""
    return hasattr(type(module), _ORIGINAL)


def fallback(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module computed before it was swapped."""
    return original(module).forward(module, *args, **kwargs)


def runs_here(*tensors: torch.Tensor | None) -> bool:
    """True for what the kernels take: on the CPU (or traced), fp32 or bf16."""
    return all(
        t is None or (t.device.type in ("cpu", "meta") and t.dtype in (torch.float32, torch.bfloat16)) for t in tensors
    )


def is_plain(linear: nn.Module) -> bool:
    """True for a linear layer whose weight can be used without calling it: no adapter, no hook, no quantisation."""
    return (
        original(linear) is nn.Linear
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not linear._backward_hooks
        and "forward" not in linear.__dict__
        and runs_here(linear.weight)
    )


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """True where autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
