"""Linear layers on foldscan's own micro-kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from foldscan.ops import _checks
from foldscan.ops._backend import use_native
from foldscan.ops._library import compute_dtype, kernels, register
from foldscan.ops._packed import cached_pack, find_pack, may_cache, may_find

_linear_packed = torch.ops.foldscan.linear_packed.default._op  # no autograd formula to pass by


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, with the same bits for a row whatever the number of rows or threads.

    Args:
        x: (..., in), fp32, bf16, fp16 or fp64. Inside ``torch.autocast`` it is cast to the autocast dtype.
        weight: (out, in), x's dtype, or fp32 beside a bf16 x: it is rounded to bf16 while it is packed, no copy is
            kept, and its gradient comes back in fp32.
        bias: (out) or None.

    Returns:
        (..., out), in the dtype of the (cast) x. Products are accumulated in fp32 over ``in`` in order, in runs of 512.

    Without gradients the packed weight is cached (as large as the weight) until the weight is changed or freed, or an
    optimizer steps; after editing ``weight.data`` in place call ``clear_packed_weights``.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes.
    """
    if (
        may_find(x)
        and (packed := find_pack("linear", weight, x.dtype)) is not None
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.dtype is torch.float32 and bias.is_contiguous() and bias.shape == weight.shape[:1]))
    ):
        return _linear_packed(x, packed, *weight.shape, bias)
    _checks.tensor("x", x)
    _checks.tensor("weight", weight, dims=2)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, want (..., {weight.shape[1]}) for weight {tuple(weight.shape)}"
        )
    if bias is not None:
        _checks.tensor("bias", bias)
        _checks.shape("bias", bias, weight.shape[0])
    dtype = compute_dtype(x)
    x = x.to(dtype)
    if not use_native(x, weight, bias):
        return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    if dtype == torch.float16:
        return linear(x.float(), weight.float(), bias).to(dtype)
    if weight.dtype not in (dtype, torch.float32):
        raise TypeError(f"weight: got dtype {weight.dtype}, want {dtype} as x has (or float32)")
    if bias is not None:
        bias = bias.float()
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if may_cache((weight,), (rows, bias)):
        out = kernels.linear_packed(rows, packed_linear(weight, dtype), weight.shape[0], weight.shape[1], bias)
    else:
        out = kernels.linear(rows, weight, bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def packed_linear(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The cached packed form of a (out, in) weight for products in ``dtype``."""
    return cached_pack("linear", weight, dtype, kernels.linear_pack)


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = kernels.linear_backward(dout.contiguous(), x, weight, *needs)
    return tuple(g if need else None for g, need in zip(grads, needs))


def _fake_backward(
    dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[torch.Tensor, ...]:
    n, k = weight.shape
    return (
        x.new_empty(x.shape[0] if need_dx else 0, k),
        weight.new_empty(n if need_dweight else 0, k),
        x.new_empty(n if need_dbias else 0, dtype=torch.float32),
    )


register("linear", _fake, _setup, _backward)
register("linear_backward", _fake_backward)
register("linear_packed", lambda x, packed, N, K, bias: x.new_empty(*x.shape[:-1], N))
