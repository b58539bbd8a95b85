"""Mamba-2: the chunked scan (SSD), the fused block around it, and single steps of the recurrence."""

from __future__ import annotations

from typing import Any

import torch

from foldscan.ops import _checks
from foldscan.ops._backend import current_backend, use_native
from foldscan.ops._library import kernels, register
from foldscan.ops.linear import linear
from foldscan.ops.norm import rmsnorm_fn
from foldscan.ops.ssm_conv import causal_conv1d_fn
from foldscan.reference import eager_ssm
from foldscan.reference import ssm as reference


def check_scan_inputs(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
) -> None:
    """Shapes and dtypes of the tensors that every form of the scan takes; leading dimensions are those of x."""
    *lead, heads, channels = x.shape
    _checks.tensor("dt", dt)
    _checks.shape("dt", dt, *lead, heads)
    _checks.tensor("A", A)
    _checks.shape("A", A, heads)
    _checks.tensor("B", B, dims=x.dim())
    _checks.shape("B", B, *lead, "groups", "state")
    _checks.tensor("C", C)
    _checks.shape("C", C, *B.shape)
    if B.shape[-2] == 0 or heads % B.shape[-2] != 0:
        raise ValueError(f"B: got {B.shape[-2]} groups, want a divisor of the {heads} heads")
    for name, value in (("B", B), ("C", C), ("z", z)):
        if value is not None:
            _checks.same_dtype(name, value, "x", x)
    if z is not None:
        _checks.shape("z", z, *x.shape)
    if D is not None:
        _checks.tensor("D", D)
        _checks.shape("D", D, *((heads,) if D.dim() == 1 else (heads, channels)))
    if dt_bias is not None:
        _checks.tensor("dt_bias", dt_bias)
        _checks.shape("dt_bias", dt_bias, heads)


def dense_tokens(t: torch.Tensor) -> torch.Tensor:
    """t itself if its last two dimensions are dense and its rows follow each other, else a contiguous copy."""
    width = t.shape[-1]
    dense = t.stride(-1) == 1 and t.stride(-2) == width
    if t.dim() == 4:
        dense = dense and (t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1))
    return t if dense else t.contiguous()


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int | None = None,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Mamba-2 state-space scan (SSD, arXiv:2405.21060), for whole, packed and continued sequences.

    ``delta = clamp(softplus(dt + dt_bias), dt_limit)``; ``h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T``;
    ``y_t = h_t C_t + D x_t``; with z the result is ``y * silu(z)``.

    Args:
        x: (batch, L, H, P), fp32, bf16, fp16 or fp64. z: the same, or None.
        dt: (batch, L, H), any float dtype. A: (H), negative. dt_bias: (H) or None.
        B, C: (batch, L, G, N), x's dtype; head h reads group ``h // (H // G)``.
        chunk_size: a hint; results do not depend on it.
        D: (H), (H, P) or None.
        initial_states: (batch, H, P, N); with cu_seqlens (n, H, P, N), one for each sequence. With seq_idx it reaches
            the first sequence of each row.
        seq_idx: (batch, L) int32; a sequence is a run of equal ids in a row, the state is reset between runs.
        cu_seqlens: (n + 1) int32 cumulative lengths of packed sequences, batch 1; it takes precedence over seq_idx.
        dt_softplus, dt_limit: see above.
        return_final_states: also return the states after the last token of each row (of each sequence with cu_seqlens).
        return_varlen_states: also return the final state of each sequence of cu_seqlens, (n, H, P, N).
        state_dtype: dtype of returned states; fp32 by default.

    Returns:
        (batch, L, H, P) in x's dtype, or a tuple of it, the final states and the varlen states as asked.
        Differentiable in all float arguments, also through the final states. fp32 accumulation; deterministic; a
        token's bits depend on its sequence's past only, not on packing, batch or threads.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    _checks.tensor("x", x, dims=4)
    check_scan_inputs(x, dt, A, B, C, D, z, dt_bias)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, want a positive number or None")
    batch, length, heads, channels = x.shape
    rows = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens: wants a batch of 1, got x of shape {tuple(x.shape)}")
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, length)
        rows, seq_idx = cu_seqlens.shape[0] - 1, None
    elif return_varlen_states:
        raise ValueError("return_varlen_states: wants cu_seqlens")
    if seq_idx is not None:
        _checks.tensor("seq_idx", seq_idx, dtypes=(torch.int32,))
        _checks.shape("seq_idx", seq_idx, batch, length)
    if initial_states is not None:
        _checks.tensor("initial_states", initial_states)
        _checks.shape("initial_states", initial_states, rows, heads, channels, B.shape[3])
    want_states = return_final_states or return_varlen_states
    out, states = _scan(
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_limit, want_states
    )
    if not want_states:
        return out
    states = states if state_dtype is None else states.to(state_dtype)
    return (out, *[states] * (int(return_final_states) + int(return_varlen_states)))


def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu: torch.Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
    states: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not use_native(x, dt, A, D, dt_bias, initial):
        if current_backend() == "eager" and initial is None and not states:
            out = eager_ssm.chunk_scan(x, dt, A, B, C, D, z, dt_bias, seq_idx, cu, softplus, limit)
            return out, out.new_empty(0)
        return reference.chunk_scan(x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, cu, softplus, limit)
    if x.dtype == torch.float16:
        gate = None if z is None else z.float()
        args = (dt, A, B.float(), C.float(), D, gate, dt_bias, initial, seq_idx, cu, softplus, limit, states)
        out, final = _scan(x.float(), *args)
        return out.to(x.dtype), final
    return kernels.scan(
        dense_tokens(x),
        dt.float().contiguous(),
        A.float(),
        dense_tokens(B),
        dense_tokens(C),
        None if D is None else D.float().contiguous(),
        None if z is None else dense_tokens(z),
        None if dt_bias is None else dt_bias.float(),
        None if initial is None else initial.float().contiguous(),
        None if seq_idx is None else seq_idx.contiguous(),
        cu,
        softplus,
        *limit,
        states,
    )


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: torch.Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: torch.Tensor | None = None,
    outproj_bias: torch.Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The inside of a Mamba-2 block after its input projection: split, conv, scan, gated norm, output projection.

    Args:
        zxbcdt: (batch, L, 2 H P + 2 G N + H), in the order z, x, B, C, dt; a larger width 2 m + that starts with 2 m
            channels of a SwiGLU whose (batch, L, m) result is concatenated before the output projection.
        conv1d_weight: (H P + 2 G N, W). conv1d_bias: (H P + 2 G N) or None. dt_bias, A: (H).
        D: (H, P), or (H) with ``headdim`` = P. ngroups: G.
        rmsnorm_weight: (H P); without it z gates the scan's output directly.
        outproj_weight: (out, H P), outproj_bias: (out); without it the normed output is returned.
        initial_states, seq_idx, dt_limit, chunk_size: as in ``mamba_chunk_scan_combined``.

    Returns:
        (batch, L, out or H P), with return_final_states also the states (batch, H, P, N).
    """
    _checks.tensor("zxbcdt", zxbcdt, dims=3)
    _checks.tensor("D", D, dims=(1, 2))
    if D.dim() == 1 and headdim is None:
        raise ValueError("headdim: wanted when D is (H)")
    heads, channels = D.shape[0], D.shape[1] if D.dim() == 2 else int(headdim or 0)
    inner = heads * channels
    conv_dim = conv1d_weight.shape[0]
    if conv_dim <= inner or (conv_dim - inner) % (2 * ngroups) != 0:
        raise ValueError(
            f"conv1d_weight: got {conv_dim} channels, want H P + 2 G N with H P = {inner} and G = {ngroups}"
        )
    state = (conv_dim - inner) // (2 * ngroups)
    mlp2 = zxbcdt.shape[-1] - inner - conv_dim - heads
    if mlp2 < 0 or mlp2 % 2:
        raise ValueError(f"zxbcdt: got width {zxbcdt.shape[-1]}, want {inner + conv_dim + heads} (or that plus 2 m)")
    mlp, z, xbc, dt = zxbcdt.split([mlp2, inner, conv_dim, heads], dim=-1)
    xbc = causal_conv1d_fn(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    assert isinstance(xbc, torch.Tensor)
    x, B, C = xbc.transpose(1, 2).split([inner, ngroups * state, ngroups * state], dim=-1)
    scan = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, channels)),
        dt,
        A,
        B.unflatten(-1, (ngroups, state)),
        C.unflatten(-1, (ngroups, state)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, channels)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    y, final = scan if isinstance(scan, tuple) else (scan, None)
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(
            y, rmsnorm_weight, z=z, eps=rmsnorm_eps, group_size=inner // ngroups, norm_before_gate=norm_before_gate
        )
    if mlp2:
        gate, up = mlp.chunk(2, dim=-1)
        y = torch.cat([torch.nn.functional.silu(gate) * up, y], dim=-1)
    if outproj_weight is not None:
        y = linear(y, outproj_weight, outproj_bias)
    return y if final is None else (y, final)


def _compact_float(t: torch.Tensor) -> torch.Tensor:
    """``t`` in fp32, still expanded where it was: the kernel sees by the zero strides what a head's channels share."""
    if t.dtype == torch.float32:
        return t
    one = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())
    return t[one].float().expand(t.shape)


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of the recurrence, in place: ``state = state exp(delta A) + delta B x; y = C . state + D x``.

    Args:
        state: (slots, H, P, N) or (slots, D, N), fp32 or bf16; updated.
        x, z: (batch, H, P) or (batch, D); z may be None and gates the result with silu.
        dt: like x, any float dtype. dt_bias: (H, P) or (D), or None.
        A: (H, P, N) or (D, N). Expanded tensors (stride 0) that tie A, dt and dt_bias within a head take a fast path.
        B, C: (batch, G, N) or (batch, N).
        D: (H, P) or (D), or None.
        dt_softplus: delta = softplus(dt + dt_bias).
        state_batch_indices: (batch) int32, the slot of each sequence; negative = padding: output 0, no state touched.

    Returns:
        Like x. Not differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    _checks.tensor("state", state, dims=(3, 4))
    _checks.tensor("x", x, dims=state.dim() - 1)
    if state.dim() == 3:
        return _update_without_heads(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    batch, heads, channels = x.shape
    n = state.shape[3]
    _checks.shape("state", state, "slots", heads, channels, n)
    for name, value in (("dt", dt), ("z", z)):
        if value is not None:
            _checks.tensor(name, value)
            _checks.shape(name, value, batch, heads, channels)
    _checks.tensor("A", A)
    _checks.shape("A", A, heads, channels, n)
    _checks.tensor("B", B, dims=3)
    _checks.shape("B", B, batch, "groups", n)
    _checks.tensor("C", C)
    _checks.shape("C", C, *B.shape)
    if heads % B.shape[1] != 0:
        raise ValueError(f"B: got {B.shape[1]} groups, want a divisor of the {heads} heads")
    for name, value in (("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            _checks.tensor(name, value)
            _checks.shape(name, value, heads, channels)
    for name, value in (("B", B), ("C", C), ("z", z)):
        if value is not None:
            _checks.same_dtype(name, value, "x", x)
    if state_batch_indices is not None:
        _checks.tensor("state_batch_indices", state_batch_indices, dtypes=(torch.int32,))
        _checks.shape("state_batch_indices", state_batch_indices, batch)
    elif state.shape[0] != batch:
        raise ValueError(f"state: got {state.shape[0]} rows, want {batch} or state_batch_indices")
    if not use_native(state, x, dt, A) or torch.float16 in (state.dtype, x.dtype) or not state.is_contiguous():
        with torch.no_grad():
            return reference.state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    return kernels.state_update(
        state,
        x.contiguous(),
        _compact_float(dt),
        _compact_float(A),
        B.contiguous(),
        C.contiguous(),
        None if D is None else _compact_float(D),
        None if z is None else z.contiguous(),
        None if dt_bias is None else _compact_float(dt_bias),
        dt_softplus,
        state_batch_indices,
    )


def _update_without_heads(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    indices: torch.Tensor | None,
) -> torch.Tensor:
    """Channels without heads become heads of 64 (or one head), so that they can be spread over threads."""
    channels = state.shape[1]
    width = 64 if channels % 64 == 0 else channels
    _checks.tensor("B", B, dims=2)
    _checks.tensor("C", C, dims=2)

    def split(t: torch.Tensor | None, dim: int) -> torch.Tensor | None:
        return None if t is None else t.unflatten(dim, (channels // width, width))

    args = (split(x, 1), split(dt, 1), split(A, 0), B[:, None], C[:, None], split(D, 0), split(z, 1), split(dt_bias, 0))
    return selective_state_update(split(state, 1), *args, softplus, indices).flatten(1)  # type: ignore[arg-type]


def _fake(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu: torch.Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float,
    states: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = 0 if not states else x.shape[0] if cu is None else cu.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(rows, *x.shape[2:], B.shape[3], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, softplus, dt_min, dt_max, states = inputs
    ctx.save_for_backward(*tensors)
    ctx.options, ctx.states = (softplus, dt_min, dt_max), states
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, dfinal: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, cu = ctx.saved_tensors
    dout = x.new_zeros(x.shape) if dout is None else dout.contiguous()
    dfinal = None if dfinal is None or not ctx.states else dfinal.contiguous()
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = kernels.scan_backward(
        dout, dfinal, x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, cu, *ctx.options
    )
    return (
        dx,
        ddt,
        dA,
        dB,
        dC,
        None if D is None else dD if D.dim() == 2 else dD.sum(1),
        None if z is None else dz,
        None if dt_bias is None else dbias,
        None if initial is None else dinitial,
        *[None] * 6,
    )


def _fake_backward(
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu: torch.Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[torch.Tensor, ...]:
    rows, length, heads, channels = x.shape
    states = 0 if initial is None else initial.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty(rows, length, heads, dtype=torch.float32),
        torch.empty_like(A),
        x.new_empty(B.shape),
        x.new_empty(C.shape),
        A.new_empty(0 if D is None else heads, channels),
        x.new_empty(0 if z is None else rows, length, heads, channels),
        torch.empty_like(A),
        A.new_empty(states, heads, channels, B.shape[3]),
    )


register("scan", _fake, _setup, _backward)
register("scan_backward", _fake_backward)
register("state_update", lambda state, x, *_: x.new_empty(x.shape))
