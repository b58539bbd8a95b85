"""Argument checks with messages that name the argument, what it got and what it wants."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(
    name: str, value: object, *, dtypes: Sequence[torch.dtype] = FLOATS, dims: int | Sequence[int] | None = None
) -> None:
    """Raise TypeError / ValueError unless ``value`` is a tensor of one of ``dtypes`` with ``dims`` dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, want a tensor")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got dtype {str(value.dtype).removeprefix('torch.')}, want one of {wanted}")
    if dims is not None:
        allowed = (dims,) if isinstance(dims, int) else tuple(dims)
        if value.dim() not in allowed:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, want {' or '.join(str(d) for d in allowed)} dimensions"
            )


def shape(name: str, value: torch.Tensor, *want: int | str) -> None:
    """Raise ValueError unless the shape matches; a string stands for any size and names it in the message."""
    got = value.shape
    if got == want or (len(got) == len(want) and all(s == w or isinstance(w, str) for s, w in zip(got, want))):
        return
    raise ValueError(f"{name}: got shape {tuple(got)}, want ({', '.join(str(w) for w in want)})")


def same_dtype(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise TypeError unless both tensors have one dtype."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {value.dtype}, want {other.dtype} as {other_name} has")


def cu_seqlens(name: str, value: torch.Tensor, total: int) -> None:
    """Check cumulative lengths: int32 (n + 1), first 0, not decreasing, last ``total``. No values while compiling."""
    tensor(name, value, dtypes=(torch.int32,), dims=1)
    if value.shape[0] < 1:
        raise ValueError(f"{name}: got no entries, want cumulative lengths starting with 0")
    if torch.compiler.is_compiling():
        return
    lengths = value.tolist()
    if lengths[0] != 0 or lengths[-1] != total or any(b < a for a, b in pairwise(lengths)):
        shown = lengths if len(lengths) < 9 else f"{lengths[:8]} ..."
        raise ValueError(f"{name}: got {shown}, want 0 = first <= .. <= last = {total}")
