"""RMSNorm, plain, grouped and gated."""

from __future__ import annotations

import math
from typing import Any

import torch

from foldscan.ops import _checks
from foldscan.ops._backend import current_backend, use_native
from foldscan.ops._library import kernels, register
from foldscan.reference import eager_ssm
from foldscan.reference import ssm as reference


def rmsnorm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """RMSNorm over groups of channels, optionally gated by ``silu(z)``.

    ``norm(v) = v / sqrt(mean_group(v^2) + eps)``; the result is ``(norm(x) * weight + bias) * silu(z)`` with
    ``norm_before_gate``, else ``norm(x * silu(z)) * weight + bias`` (Mamba-2, arXiv:2405.21060). Without z it is
    RMSNorm (arXiv:1910.07467).

    Args:
        x: (..., D), fp32, bf16, fp16 or fp64. z: x's shape and dtype, or None.
        weight, bias: (D), any float dtype; bias may be None.
        group_size: channels a group, a divisor of D; None is D.

    Returns:
        Like x. Statistics and arithmetic in fp32. A row's bits depend on that row only.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    _checks.tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x: got a scalar, want (..., D)")
    channels = x.shape[-1]
    _checks.tensor("weight", weight)
    _checks.shape("weight", weight, channels)
    if bias is not None:
        _checks.tensor("bias", bias)
        _checks.shape("bias", bias, channels)
    if z is not None:
        _checks.tensor("z", z)
        _checks.same_dtype("z", z, "x", x)
        _checks.shape("z", z, *x.shape)
    group = channels if group_size is None else group_size
    if group <= 0 or channels % group != 0:
        raise ValueError(f"group_size: got {group_size}, want a divisor of {channels}")
    if not use_native(x, weight, bias, z):
        voice = eager_ssm if current_backend() == "eager" else reference
        return voice.rmsnorm(x, weight, bias, z, eps, group, norm_before_gate)
    if x.dtype == torch.float16:
        gate = None if z is None else z.float()
        return rmsnorm_fn(x.float(), weight, bias, gate, eps, group, norm_before_gate).to(x.dtype)
    rows = _rows(x)
    gate = None if z is None else _rows(z)
    b = None if bias is None else bias.float()
    out, _ = kernels.rmsnorm(rows, weight.float(), b, gate, eps, group, norm_before_gate)
    return out.view(x.shape)


def _rows(t: torch.Tensor) -> torch.Tensor:
    if t.dim() == 2 and t.stride(1) == 1:
        return t
    t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    eps: float,
    group: int,
    before_gate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, channels = x.shape
    return x.new_empty(rows, channels), x.new_empty(rows, channels // group, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, z, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, z, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, z, rstd = ctx.saved_tensors
    dx, dweight, dbias, dz = kernels.rmsnorm_backward(dout.contiguous(), x, weight, bias, z, rstd, *ctx.options)
    return dx, dweight, None if bias is None else dbias, None if z is None else dz, None, None, None


def _fake_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    rstd: torch.Tensor,
    eps: float,
    group: int,
    before_gate: bool,
) -> tuple[torch.Tensor, ...]:
    rows, channels = x.shape
    dz = x.new_empty(0 if z is None else rows, channels)
    return x.new_empty(rows, channels), torch.empty_like(weight), torch.empty_like(weight), dz


register("rmsnorm", _fake, _setup, _backward)
register("rmsnorm_backward", _fake_backward)
