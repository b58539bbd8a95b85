"""Mamba-1: the selective scan."""

from __future__ import annotations

from typing import Any

import torch

from foldscan.ops import _checks
from foldscan.ops._backend import use_native
from foldscan.ops._library import kernels, register
from foldscan.reference import ssm as reference


def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba-1 selective scan (arXiv:2312.00752).

    ``delta' = softplus(delta + delta_bias)``; ``h_t = exp(delta'_t A) h_{t-1} + delta'_t B_t u_t``;
    ``y_t = C_t . h_t + D u_t``; with z the result is ``y * silu(z)``.

    Args:
        u, delta: (batch, D, L), fp32, bf16, fp16 or fp64. z: the same, or None.
        A: (D, N), real. D, delta_bias: (D) or None.
        B, C: (D, N) constant in time, (batch, N, L), or (batch, G, N, L).

    Returns:
        (batch, D, L) in u's dtype; with return_last_state also the state after the last token, (batch, D, N) fp32,
        which carries no gradient. Everything else is differentiable in all float arguments.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype (complex A too), shape or value.
    """
    _checks.tensor("u", u, dims=3)
    batch, channels, length = u.shape
    for name, value in (("delta", delta), ("z", z)):
        if value is not None:
            _checks.tensor(name, value)
            _checks.shape(name, value, batch, channels, length)
    _checks.tensor("A", A, dims=2)
    _checks.shape("A", A, channels, "state")
    n = A.shape[1]
    groups = []
    for name, value in (("B", B), ("C", C)):
        _checks.tensor(name, value, dims=(2, 3, 4))
        if value.dim() == 2:
            _checks.shape(name, value, channels, n)
        elif value.dim() == 3:
            _checks.shape(name, value, batch, n, length)
            groups.append(1)
        else:
            _checks.shape(name, value, batch, "groups", n, length)
            groups.append(value.shape[1])
    if len(set(groups)) > 1 or (groups and (groups[0] == 0 or channels % groups[0] != 0)):
        raise ValueError(f"B, C: got {groups} groups, want one divisor of the {channels} channels")
    for name, value in (("D", D), ("delta_bias", delta_bias)):
        if value is not None:
            _checks.tensor(name, value)
            _checks.shape(name, value, channels)
    B, C = (m[:, None] if m.dim() == 3 else m for m in (B, C))
    if not use_native(u, delta, A, B, C, D, z, delta_bias):
        out, last = reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    else:
        work = torch.float32 if u.dtype == torch.float16 else u.dtype

        def varying(m: torch.Tensor) -> torch.Tensor:
            return m.to(work if m.dim() == 4 else torch.float32).contiguous()

        out, last = kernels.selective_scan(
            u.to(work).contiguous(),
            delta.to(work).contiguous(),
            A.float().contiguous(),
            varying(B),
            varying(C),
            None if D is None else D.float(),
            None if z is None else z.to(work).contiguous(),
            None if delta_bias is None else delta_bias.float(),
            delta_softplus,
        )
        out = out.to(u.dtype)
    return (out, last.detach()) if return_last_state else out


def _fake(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape[0], *A.shape, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    u, delta, A, B, C, D, z, delta_bias = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dz, dbias = kernels.selective_scan_backward(
        dout.contiguous(), u, delta, A, B, C, D, z, delta_bias, ctx.softplus
    )
    return (
        du,
        ddelta,
        dA,
        dB.to(B.dtype),
        dC.to(C.dtype),
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else dbias,
        None,
    )


def _fake_backward(
    dout: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    softplus: bool,
) -> tuple[torch.Tensor, ...]:
    rows, channels, length = u.shape
    return (
        u.new_empty(u.shape),
        u.new_empty(u.shape),
        torch.empty_like(A),
        A.new_empty(B.shape),
        A.new_empty(C.shape),
        A.new_empty(channels),
        u.new_empty(0 if z is None else rows, channels, length),
        A.new_empty(channels),
    )


register("selective_scan", _fake, _setup, _backward)
register("selective_scan_backward", _fake_backward)
