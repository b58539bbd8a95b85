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
) -> torch.Tensor:
    """Chunked SSD in batched matrix products (arXiv:2405.21060, listing 1), with masks for packed sequences."""
    batch, length, heads, P = x.shape
    groups, N = B.shape[2:]
    pad = -length % chunk
    delta = F.pad(time_steps(dt, dt_bias, dt_softplus, dt_limit), (0, 0, 0, pad))
    ids = _sequence_ids(batch, length, seq_idx, cu_seqlens)
    if ids is None:
        ids = x.new_zeros(batch, length, dtype=torch.int32)
    ids = F.pad(ids, (0, pad), mode="constant", value=-7)

    def chunks(t: torch.Tensor) -> torch.Tensor:
        return F.pad(t, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk))

    xc, Bc, Cc = chunks(x), chunks(B), chunks(C)
    dc, ic = delta.unflatten(1, (-1, chunk)), ids.unflatten(1, (-1, chunk))  # (b, c, q, H), (b, c, q)
    cum = torch.cumsum(dc * A.float(), 2).transpose(2, 3)  # (b, c, H, q)
    same = ic[:, :, :, None] == ic[:, :, None, :]
    allowed = same & torch.ones(chunk, chunk, dtype=torch.bool).tril()
    decay = torch.exp((cum[..., :, None] - cum[..., None, :]).masked_fill(~allowed[:, :, None], -torch.inf))
    gram = torch.einsum("bclgn,bcsgn->bcgls", Cc, Bc).repeat_interleave(heads // groups, 2)
    weights = (gram * decay * dc.transpose(2, 3)[..., None, :]).to(x.dtype)
    y = torch.einsum("bchls,bcshp->bclhp", weights, xc)
    # States that leave each chunk, then the recurrence over chunks.
    ends = ic == ic[:, :, -1:]
    to_end = torch.exp(cum[..., -1:] - cum).transpose(2, 3) * dc * ends[..., None]
    Bh = Bc.repeat_interleave(heads // groups, 3)
    local = torch.einsum("bcshn,bcshp->bchpn", Bh.float(), xc.float() * to_end[..., None])
    keep = torch.exp(cum[..., -1]) * (ic[:, :, 0] == ic[:, :, -1])[..., None]
    state = local.new_zeros(batch, heads, P, N)
    previous = ic[:, 0, 0]
    incoming, carried = [], []
    for c in range(local.shape[1]):
        incoming.append(state)
        carried.append(ic[:, c] == previous[:, None])
        connected = (ic[:, c, 0] == previous)[:, None]
        state = (keep[:, c] * connected)[..., None, None] * state + local[:, c]
        previous = ic[:, c, -1]
    S = torch.stack(incoming, 1)
    from_start = torch.exp(cum).transpose(2, 3) * torch.stack(carried, 1)[..., None]
    Ch = Cc.repeat_interleave(heads // groups, 3)
    y = y + torch.einsum("bclhn,bchpn->bclhp", Ch.float(), S) * from_start[..., None]
    y = y.flatten(1, 2)[:, :length]
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
