"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch

from foldscan.ops import _checks
from foldscan.ops._backend import use_native
from foldscan.ops._library import kernels, register
from foldscan.reference import attention as reference


def rotary_embedding(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Rotate the first 2 r features of every head by the angles of its token's position.

    Args:
        x: (tokens, heads, headdim), fp32, bf16, fp16 or fp64.
        cos, sin: (length, r), 2 r <= headdim; used in fp32, no gradient.
        positions: (tokens) int32 or int64, rows of the tables.
        interleaved: feature 2 i turns with feature 2 i + 1, not i with i + r (Llama, Qwen, Mixtral).

    Returns:
        Like x, computed in fp32 and rounded once. Differentiable in x: the gradient turns back. Source: RoFormer,
        arXiv:2104.09864, equation 34.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    _checks.tensor("x", x, dims=3)
    for name, table in (("cos", cos), ("sin", sin)):
        _checks.tensor(name, table, dims=2)
        _checks.shape(name, table, *cos.shape)
    if 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(f"cos: got {cos.shape[1]} angles, want at most half the head dimension {x.shape[2]}")
    _checks.tensor("positions", positions, dtypes=(torch.int32, torch.int64))
    _checks.shape("positions", positions, x.shape[0])
    if not use_native(x):
        return reference.rotary(x, cos, sin, positions, interleaved)
    if x.dtype == torch.float16:
        return rotary_embedding(x.float(), cos, sin, positions, interleaved=interleaved).to(x.dtype)
    if x.stride(-1) != 1:
        x = x.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the strides of an empty tensor
    tables = (t.detach().float().contiguous() for t in (cos, sin))
    return kernels.rotary(x, *tables, positions.to(torch.int32), interleaved)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, positions, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    return kernels.rotary(dout.contiguous(), cos, -sin, positions, ctx.interleaved), None, None, None, None


register("rotary", lambda x, cos, sin, positions, interleaved: x.new_empty(x.shape), _setup, _backward)
