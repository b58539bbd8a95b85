"""Attention, written out: one sequence and one head at a time, all scores at once, a plain softmax.

Works in the dtype of its inputs when that is fp32 or fp64 and in fp32 otherwise; differentiable everywhere.
"""

from __future__ import annotations

import torch


def visible_keys(
    queries: int, keys: int, window_left: int, window_right: int, device: torch.device | None = None
) -> torch.Tensor:
    """(queries, keys) bool: which key each query sees. The diagonal joins the last query and the last key."""
    distance = torch.arange(keys, device=device)[None, :] - (
        torch.arange(queries, device=device)[:, None] + keys - queries
    )
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if window_left >= 0:
        seen &= distance >= -window_left
    if window_right >= 0:
        seen &= distance <= window_right
    return seen


def _one_head(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    sink: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q @ k.T * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if sink is not None:
        scores = torch.cat([scores, sink.expand(q.shape[0], 1)], dim=1)
        seen = torch.cat([seen, seen.new_ones(q.shape[0], 1)], dim=1)
    any_key = seen.any(dim=1, keepdim=True)
    # Rows without a key stay out of the softmax, so that their gradients are 0 and not NaN.
    scores = scores.masked_fill(~seen & any_key, float("-inf")).masked_fill(~any_key, 0.0)
    if scores.shape[1] == 0:
        return q.new_zeros(q.shape[0], v.shape[1]), q.new_full((q.shape[0],), float("-inf"))
    lse = torch.logsumexp(scores, dim=1)
    probs = torch.exp(scores - lse[:, None]) * any_key
    out = probs[:, : k.shape[0]] @ v
    return out, torch.where(any_key[:, 0], lse, float("-inf"))


def gather_pages(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """The first ``length`` keys of a sequence from a paged cache (pages, page_size, heads, headdim)."""
    used = -(-length // cache.shape[1]) if length else 0
    return cache[pages[:used].long()].flatten(0, 1)[:length]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    block_table: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale Q K^T) V per sequence and head; out (total_q, Hq, Dv) in q's dtype, lse (Hq, total_q)."""
    dtype = q.dtype
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    group = q.shape[1] // k.shape[-2]
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[-1], dtype=wide)], [q.new_zeros(q.shape[1], 0, dtype=wide)]
    for s in range(len(starts_q) - 1):
        length = starts_k[s + 1] - starts_k[s]
        if block_table is None:
            ks, vs = (t[starts_k[s] : starts_k[s + 1]] for t in (k, v))
        else:
            ks, vs = (gather_pages(t, block_table[s], length) for t in (k, v))
        qs = q[starts_q[s] : starts_q[s + 1]]
        seen = visible_keys(qs.shape[0], length, window_left, window_right, q.device)
        heads = [
            _one_head(
                qs[:, h].to(wide),
                ks[:, h // group].to(wide),
                vs[:, h // group].to(wide),
                seen,
                None if sinks is None else sinks[h].to(wide),
                scale,
                softcap,
            )
            for h in range(q.shape[1])
        ]
        outs.append(torch.stack([o for o, _ in heads], dim=1))
        lses.append(torch.stack([lse for _, lse in heads]))
    out, lse = torch.cat(outs).to(dtype), torch.cat(lses, dim=1)
    return out, lse if wide == torch.float64 else lse.float()


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of attention whose ``out`` and ``lse`` are given, and may be over more keys than k holds.

    P = exp(S - lse), D_i = dout_i . out_i, dS = P (dout V^T - D), dV = P^T dout, dQ = scale dS K, dK = scale dS^T Q.
    Source: FlashAttention-2, arXiv:2307.08691, algorithm 2.
    """
    wide = q.dtype if q.dtype in (torch.float32, torch.float64) else torch.float32
    dq, dk, dv = (torch.zeros_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in (q, k, v))
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    group = q.shape[1] // k.shape[1]
    for s in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[s : s + 2]), slice(*starts_k[s : s + 2])
        queries, length = starts_q[s + 1] - starts_q[s], starts_k[s + 1] - starts_k[s]
        seen = visible_keys(queries, length, window_left, window_right, q.device)
        for h in range(q.shape[1]):
            qs, ks, vs = q[rows, h].to(wide), k[keys, h // group].to(wide), v[keys, h // group].to(wide)
            upstream, result = dout[rows, h].to(wide), out[rows, h].to(wide)
            scores = qs @ ks.T * scale
            slope = torch.ones_like(scores)
            if softcap > 0:
                bent = torch.tanh(scores / softcap)
                scores, slope = softcap * bent, 1 - bent.square()
            probs = torch.exp(scores - lse[h, rows, None].to(wide)).masked_fill(~seen, 0.0)
            dscores = probs * (upstream @ vs.T - (upstream * result).sum(1, keepdim=True)) * slope * scale
            dq[rows, h] = dscores @ ks
            dk[keys, h // group] += dscores.T @ qs
            dv[keys, h // group] += probs.T @ upstream
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate the first 2 r features of x (tokens, heads, headdim) by the angles of ``positions``; cos, sin (length, r).

    Feature i turns with feature i + r (half-split), or feature 2 i with 2 i + 1 (interleaved).
    Source: RoFormer, arXiv:2104.09864, equation 34.
    """
    r = cos.shape[1]
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    c, s = (t[positions.long()].to(wide)[:, None, :] for t in (cos, sin))
    turned, rest = x[..., : 2 * r].to(wide), x[..., 2 * r :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :r], turned[..., r:])
    first, second = a * c - b * s, a * s + b * c
    both = torch.stack([first, second], dim=-1).flatten(-2) if interleaved else torch.cat([first, second], dim=-1)
    return torch.cat([both.to(x.dtype), rest], dim=-1)


def kv_cache_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write every new key and value to its slot, one token at a time."""
    starts, page_size = cu_seqlens.tolist(), k_cache.shape[1]
    for s, first in enumerate(positions.tolist()):
        for i, token in enumerate(range(starts[s], starts[s + 1])):
            page = int(block_table[s, (first + i) // page_size])
            k_cache[page, (first + i) % page_size] = k[token]
            v_cache[page, (first + i) % page_size] = v[token]


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys; out (batch, seqlen, heads, headdim), lse (batch, heads, seqlen)."""
    empty = (lse_a == float("-inf")) & (lse_b == float("-inf"))
    both = torch.stack([lse_a, lse_b]).masked_fill(empty, 0.0)
    lse = torch.logsumexp(both, dim=0)
    weights = torch.exp(both - lse).masked_fill(empty, 0.0).transpose(-1, -2)[..., None]
    out = out_a.to(weights.dtype) * weights[0] + out_b.to(weights.dtype) * weights[1]
    return out.to(out_a.dtype), lse.masked_fill(empty, float("-inf"))
