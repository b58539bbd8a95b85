"""Which voice of an op speaks: the compiled kernels, the readable reference, or plain eager PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

Backend = Literal["native", "reference", "eager"]

_current: Backend = "native"


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Run the ops inside the block on another implementation.

    Args:
        name: ``"native"`` (compiled kernels, the default), ``"reference"`` (``foldscan.reference``: the slow,
            obvious definition) or ``"eager"`` (``foldscan.reference.eager``: the best plain-PyTorch formulation, the
            peer that benchmarks compare with).

    Raises:
        ValueError: ``name`` is none of the three.
    """
    global _current
    if name not in ("native", "reference", "eager"):
        raise ValueError(f"backend: got {name!r}, want 'native', 'reference' or 'eager'")
    previous, _current = _current, name
    try:
        yield
    finally:
        _current = previous


def current_backend() -> Backend:
    """The backend that ops called now would use."""
    return _current


def use_native(*tensors: torch.Tensor | None) -> bool:
    """True when the compiled kernels take these tensors: native backend, CPU, and not fp64 (the reference's dtype)."""
    return _current == "native" and all(
        t is None or ((t.is_cpu or t.is_meta) and t.dtype != torch.float64) for t in tensors
    )
