"""Loads the compiled operators and holds the few patterns that every op family registers with.

An op is one dispatcher entry in C++ (schema and CPU kernel), a fake kernel and an autograd formula in Python:

    torch.ops.foldscan.NAME         what the public function calls
    register(NAME, fake, ...)       shapes for torch.compile, and which op computes the gradient
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_library = Path(__file__).resolve().parent.parent / "_ops.so"
if not _library.exists():
    raise ImportError(
        f"foldscan: the compiled operators are missing ({_library}). Run `make setup` in a checkout, or "
        "`pip install --no-build-isolation .`"
    )
torch.ops.load_library(_library)


class _Kernels:
    """``kernels.NAME(...)``: the compiled op, past autograd where no gradient is recorded.

    The autograd formula of an op is Python code that the dispatcher runs through even when there is nothing to record,
    which costs more than the rest of a small call.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        overload = getattr(torch.ops.foldscan, name).default
        direct = overload._op

        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling() or torch.is_grad_enabled():
                return overload(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return direct(*args)

        call.default = overload  # type: ignore[attr-defined]
        setattr(self, name, call)
        return call


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
        torch.library.register_autograd(f"foldscan::{name}", backward, setup_context=setup_context)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that matrix multiplications are cast to here, or None outside of autocast."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a matrix-multiplying op works in for input ``x``: autocast's inside autocast, else its own."""
    cast = autocast_dtype(x.device.type)
    return cast if cast is not None and x.dtype != torch.float64 else x.dtype


def is_recording() -> bool:
    """True while torch.compile or export traces: no caches, no data-dependent Python."""
    return torch.compiler.is_compiling()
