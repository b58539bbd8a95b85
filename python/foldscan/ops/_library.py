"""Loads the compiled operators and holds the few patterns that every op family registers with.

An op is one dispatcher entry in C++ (schema and CPU kernel), a fake kernel and an autograd formula in Python:

    torch.ops.foldscan.NAME         what the public function calls
    register(NAME, fake, ...)       shapes for torch.compile, and which op computes the gradient
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

_library = Path(__file__).resolve().parent.parent / "_ops.so"
if not _library.exists():
    raise ImportError(
        f"foldscan: the compiled operators are missing ({_library}). Run `make setup` in a checkout, or "
        "`pip install --no-build-isolation .`"
    )
torch.ops.load_library(_library)


class _Kernels:
    """``kernels.NAME(...)``: the compiled op, by the shortest way that records what has to be recorded.

    The dispatcher's way to an autograd formula in Python costs 13 us more than the op; an autograd function of our own,
    called directly, 5 us, and nothing where no gradient is wanted. What an op cannot do, second and forward-mode
    derivatives, is an error here; the dispatcher would return zeros.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        overload = getattr(torch.ops.foldscan, name).default
        direct = overload._op
        below_autograd = torch._C._AutoDispatchBelowAutograd
        formula = _formulas.get(name)
        record, transformed = _recorders(name, direct, *formula) if formula else (overload, overload)

        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return overload(*args)
            if forward_ad._current_level >= 0:
                refuse_tangents(name, args)
            if torch.is_grad_enabled():
                for arg in args:
                    if isinstance(arg, torch.Tensor) and arg.requires_grad:
                        return transformed(*args) if torch._C._are_functorch_transforms_active() else record(*args)
            with below_autograd():
                return direct(*args)

        call.default = overload  # type: ignore[attr-defined]
        setattr(self, name, call)
        return call


_formulas: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {}


def _recorders(
    name: str, direct: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """An op's autograd function in the two forms that PyTorch has: the quick one, and the one that torch.func takes."""

    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return direct(*args)

    def forward_and_setup(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    def function(**parts: Callable[..., Any]) -> Callable[..., Any]:
        made: Any = type(name, (torch.autograd.Function,), {key: staticmethod(part) for key, part in parts.items()})
        return made.apply

    once = once_differentiable(backward)
    return (
        function(forward=forward_and_setup, backward=once),
        function(forward=forward, setup_context=setup_context, backward=once),
    )


def refuse_tangents(name: str, args: Iterable[Any]) -> None:
    """Raise NotImplementedError where a forward-mode derivative is asked for."""
    for arg in args:
        if isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(f"{name}: has no forward-mode derivative, want reverse mode (backward, vjp)")


kernels = _Kernels()


def register(
    name: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Give a compiled op its fake kernel and, where it is differentiable, its autograd formula."""
    torch.library.register_fake(f"foldscan::{name}", fake)
    if backward is not None:
        assert setup_context is not None
        torch.library.register_autograd(f"foldscan::{name}", backward, setup_context=setup_context)
        _formulas[name] = setup_context, backward


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """True where autograd will record a call on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that matrix multiplications are cast to here, or None outside of autocast."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a matrix-multiplying op works in for input ``x``: autocast's inside autocast, else its own."""
    cast = autocast_dtype(x.device.type)
    return cast if cast is not None and x.dtype != torch.float64 else x.dtype


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in at least fp32: fp64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def is_recording() -> bool:
    """True while torch.compile or export traces: no caches, no data-dependent Python."""
    return torch.compiler.is_compiling()
