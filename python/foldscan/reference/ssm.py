"""State-space operators in plain PyTorch: token by token, as the equations say. The oracle of the tests.

Low-precision inputs are computed in fp32 and rounded once at the end; fp64 stays fp64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F


def wide(t: torch.Tensor) -> torch.Tensor:
    """fp64 stays, everything else becomes fp32."""
    return t if t.dtype == torch.float64 else t.float()


def segments(
    rows: int, length: int, seq_idx: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> Iterator[tuple[int, int, int, int | None, int | None]]:
    """Sequences as (row, begin, end, initial state row or None, final state row or None), tokens counted in the row."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        for i in range(len(bounds) - 1):
            yield 0, bounds[i], bounds[i + 1], i, i
        return
    for row in range(rows):
        begin = 0
        for t in range(1, length):
            if seq_idx is not None and seq_idx[row, t] != seq_idx[row, t - 1]:
                yield row, begin, t, (row if begin == 0 else None), None
                begin = t
        yield row, begin, length, (row if begin == 0 else None), row


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    activation: str | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """y[t] = act(bias + sum_w weight[w] x[t - W + 1 + w]) within each sequence; x (B, D, L)."""
    batch, _, length = x.shape
    width = weight.shape[1]
    v, w = wide(x), wide(weight)
    pieces: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    for row, begin, end, initial, _ in segments(batch, length, seq_idx, cu_seqlens):
        past = v.new_zeros(v.shape[1], width - 1)
        if initial_states is not None and initial is not None:
            past = wide(initial_states[initial])
        full = torch.cat([past, v[row, :, begin:end]], dim=1)
        out = torch.zeros_like(v[row, :, begin:end])
        for k in range(width):
            out = out + w[:, k : k + 1] * full[:, k : k + end - begin]
        if bias is not None:
            out = out + wide(bias)[:, None]
        out = F.silu(out) if activation else out
        if seq_idx is not None and cu_seqlens is None and end > begin and seq_idx[row, begin] < 0:
            out = out * 0
        pieces[row].append(out)
    return torch.stack([torch.cat(p, dim=1) if p else v[i] for i, p in enumerate(pieces)]).to(x.dtype)


def time_steps(
    dt: torch.Tensor, dt_bias: torch.Tensor | None, softplus: bool, dt_limit: tuple[float, float]
) -> torch.Tensor:
    """delta = clamp(softplus(dt + bias)), without overflow for large dt."""
    delta = wide(dt) if dt_bias is None else wide(dt) + wide(dt_bias)
    if softplus:
        delta = delta.clamp(min=0) + torch.log1p(torch.exp(-delta.abs()))
    return delta.clamp(*dt_limit)


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T; y_t = h_t C_t + D x_t; out = y silu(z).

    Shapes as in ``ops.mamba_chunk_scan_combined``; returns (out, final states).
    """
    batch, length, heads, P = x.shape
    repeat = heads // B.shape[2]
    N = B.shape[3]
    delta = time_steps(dt, dt_bias, dt_softplus, dt_limit)
    xs, Bs, Cs = wide(x), wide(B).repeat_interleave(repeat, 2), wide(C).repeat_interleave(repeat, 2)
    skip = None if D is None else (wide(D) if D.dim() == 2 else wide(D)[:, None])
    rows: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    finals: dict[int, torch.Tensor] = {}
    for row, begin, end, initial, final in segments(batch, length, seq_idx, cu_seqlens):
        h = xs.new_zeros(heads, P, N)
        if initial_states is not None and initial is not None:
            h = wide(initial_states[initial])
        for t in range(begin, end):
            decay = torch.exp(delta[row, t] * wide(A))[:, None, None]
            h = decay * h + (delta[row, t][:, None] * xs[row, t])[:, :, None] * Bs[row, t][:, None, :]
            y = (h * Cs[row, t][:, None, :]).sum(-1)
            if skip is not None:
                y = y + skip * xs[row, t]
            rows[row].append(y if z is None else y * F.silu(wide(z[row, t])))
        if final is not None:
            finals[final] = h
    out = torch.stack([torch.stack(r) for r in rows]) if length else xs.new_zeros(x.shape)
    states = torch.stack([finals[i] for i in range(len(finals))]) if finals else xs.new_zeros(0, heads, P, N)
    return out.to(x.dtype), states


def state_update(
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
    slots: torch.Tensor | None,
) -> torch.Tensor:
    """One step of the recurrence, in place on ``state``: (slots, H, P, N); x, dt (batch, H, P); B, C (batch, G, N)."""
    batch, heads, _ = x.shape
    repeat = heads // B.shape[1]
    delta = time_steps(dt, dt_bias, softplus, (-float("inf"), float("inf")))
    out = torch.zeros_like(x)
    for b in range(batch):
        slot = b if slots is None else int(slots[b])
        if slot < 0:
            continue
        h = wide(state[slot]) * torch.exp(delta[b][..., None] * wide(A))
        dB = delta[b][..., None] * wide(B[b]).repeat_interleave(repeat, 0)[:, None, :]
        h = h + dB * wide(x[b])[..., None]
        state[slot] = h.to(state.dtype)
        y = (h * wide(C[b]).repeat_interleave(repeat, 0)[:, None, :]).sum(-1)
        if D is not None:
            y = y + wide(D) * wide(x[b])
        out[b] = (y if z is None else y * F.silu(wide(z[b]))).to(x.dtype)
    return out


def selective_scan(
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
    """Mamba-1: u, delta, z (B, D, L); A (D, N); B, C (D, N) or (B, G, N, L). Returns (out, last state)."""
    batch, channels, length = u.shape
    bias = None if delta_bias is None else delta_bias[:, None]
    steps = time_steps(delta, bias, softplus, (-float("inf"), float("inf")))

    def at(m: torch.Tensor, t: int) -> torch.Tensor:
        if m.dim() == 2:
            return wide(m)[None]
        return wide(m[..., t]).repeat_interleave(channels // m.shape[1], 1)

    h = wide(u).new_zeros(batch, channels, A.shape[1])
    outs = []
    for t in range(length):
        step, ut = steps[:, :, t, None], wide(u[:, :, t, None])
        h = torch.exp(step * wide(A)) * h + step * ut * at(B, t)
        outs.append((h * at(C, t)).sum(-1))
    y = torch.stack(outs, dim=2) if outs else wide(u) * 0
    if D is not None:
        y = y + wide(D)[:, None] * wide(u)
    if z is not None:
        y = y * F.silu(wide(z))
    return y.to(u.dtype), h


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> torch.Tensor:
    """norm(v) = v / sqrt(mean over the group of v^2 + eps); the gate silu(z) acts before or after it. x (..., D)."""
    v = wide(x)
    if z is not None and not norm_before_gate:
        v = v * F.silu(wide(z))
    grouped = v.unflatten(-1, (-1, group_size))
    v = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2) * wide(weight)
    if bias is not None:
        v = v + wide(bias)
    if z is not None and norm_before_gate:
        v = v * F.silu(wide(z))
    return v.to(x.dtype)
