"""State-space operators as one would write them well in plain PyTorch: the peer of the benchmarks, not an oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from foldscan.reference.ssm import time_steps

CHUNK = 64


def _sequence_ids(rows: int, length: int, seq_idx: torch.Tensor | None, cu: torch.Tensor | None) -> torch.Tensor | None:
    if cu is None:
        return seq_idx
    return torch.searchsorted(cu[1:].contiguous(), torch.arange(length, dtype=cu.dtype), right=True)[None]


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    activation: str | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """Depthwise ``F.conv1d``; packed sequences by masked taps. No initial states."""
    width, length = weight.shape[1], x.shape[2]
    ids = _sequence_ids(x.shape[0], length, seq_idx, cu_seqlens)
    if ids is None:
        b = None if bias is None else bias.to(x.dtype)
        out = F.conv1d(x, weight.to(x.dtype)[:, None], b, padding=width - 1, groups=x.shape[1])[..., :length]
    else:
        out = x * weight[:, -1:].to(x.dtype)
        for back in range(1, min(width, length)):
            same = (ids[:, back:] == ids[:, :-back])[:, None]
            out[..., back:] += x[..., :-back] * weight[:, -1 - back, None].to(x.dtype) * same
        if bias is not None:
            out = out + bias.to(x.dtype)[:, None]
    return F.silu(out) if activation else out


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    chunk: int = CHUNK,
    passing: str = "loop",
) -> torch.Tensor:
    """Chunked SSD in batched matrix products (arXiv:2405.21060, listing 1), with masks for packed sequences.

    The heads of a group share B and C: their states and carried outputs are one product per chunk and group, without
    a copy of B or C per head. ``passing`` carries the states from chunk to chunk by a "loop", or by one "matmul" with
    the decays between all pairs of chunks (for torch.compile, which unrolls loops).
    """
    batch, length, heads, P = x.shape
    groups, N = B.shape[2:]
    per_group = heads // groups
    pad = -length % chunk
    delta = F.pad(time_steps(dt, dt_bias, dt_softplus, dt_limit), (0, 0, 0, pad))
    ids = _sequence_ids(batch, length, seq_idx, cu_seqlens)
    packed = ids is not None
    if ids is None:
        ids = x.new_zeros(batch, length, dtype=torch.int32)
    ids = F.pad(ids, (0, pad), mode="constant", value=-7)

    def chunks(t: torch.Tensor) -> torch.Tensor:
        return F.pad(t, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk)).transpose(2, 3)

    xc, Bc, Cc = chunks(x), chunks(B), chunks(C)  # (b, c, H, q, P), (b, c, G, q, N) twice
    dc, ic = delta.unflatten(1, (-1, chunk)).transpose(2, 3), ids.unflatten(1, (-1, chunk))  # (b, c, H, q), (b, c, q)
    cum = torch.cumsum(dc * A.float()[:, None], 3)
    allowed = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    if packed:
        allowed = allowed & (ic[:, :, None, :, None] == ic[:, :, None, None, :])
    decay = torch.exp((cum[..., :, None] - cum[..., None, :]).masked_fill(~allowed, -torch.inf))
    gram = Cc @ Bc.transpose(3, 4)  # (b, c, G, q, q)
    weights = gram[:, :, :, None] * (decay * dc[..., None, :]).unflatten(2, (groups, per_group))
    y = weights.flatten(2, 3).to(x.dtype) @ xc

    # States that leave each chunk, then the recurrence over chunks.
    to_end = torch.exp(cum[..., -1:] - cum) * dc
    if packed:
        to_end = to_end * (ic == ic[:, :, -1:])[:, :, None]
    weighted = (xc * to_end[..., None]).to(x.dtype).unflatten(2, (groups, per_group)).transpose(3, 4).flatten(4)
    local = (Bc.transpose(3, 4) @ weighted).float()  # (b, c, G, N, heads of the group * P)
    total = cum[..., -1]
    if passing == "matmul" and not packed:
        before = F.pad(torch.cumsum(total, 1), (0, 0, 1, 0)).transpose(1, 2)  # (b, H, c + 1): decay before each chunk
        pairs = before[:, :, :-1, None] - before[:, :, None, 1:]
        later = torch.ones(pairs.shape[-2:], dtype=torch.bool, device=x.device).tril(-1)
        between = torch.exp(pairs.masked_fill(~later, -torch.inf))  # (b, H, c, c)
        by_head = local.unflatten(4, (per_group, P)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(3)
        S = (between @ by_head).unflatten(3, (N, P)).unflatten(1, (groups, per_group)).permute(0, 3, 1, 4, 2, 5)
        S = S.flatten(4)
    else:
        keep = torch.exp(total) * (ic[:, :, 0] == ic[:, :, -1])[..., None]
        previous = ic[:, 0, 0]
        state, incoming, carried = torch.zeros_like(local[:, 0]), [], []
        for c in range(local.shape[1]):
            incoming.append(state)
            carried.append(ic[:, c] == previous[:, None])
            connected = (ic[:, c, 0] == previous)[:, None]
            factor = (keep[:, c] * connected).unflatten(1, (groups, per_group))[..., None].expand(-1, -1, -1, P)
            state = factor.flatten(2)[:, :, None] * state + local[:, c]
            previous = ic[:, c, -1]
        S = torch.stack(incoming, 1)
    from_start = torch.exp(cum)
    if packed:
        from_start = from_start * torch.stack(carried, 1)[:, :, None]
    inter = (Cc @ S.to(x.dtype)).unflatten(4, (per_group, P)).transpose(3, 4).flatten(2, 3)  # (b, c, H, q, P)
    y = (y + inter * from_start[..., None]).transpose(2, 3).flatten(1, 2)[:, :length]
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    return (y if z is None else y * F.silu(z)).to(x.dtype)


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> torch.Tensor:
    """Gated RMSNorm from ``F.rms_norm`` on the groups."""
    v = x.float() if z is None or norm_before_gate else x.float() * F.silu(z.float())
    v = F.rms_norm(v.unflatten(-1, (-1, group_size)), (group_size,), eps=eps).flatten(-2) * weight
    v = v if bias is None else v + bias
    return (v * F.silu(z.float()) if z is not None and norm_before_gate else v).to(x.dtype)
