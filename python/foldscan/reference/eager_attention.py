"""Attention as one writes it in plain PyTorch: a loop over sequences around batched matrix products.

``scaled_dot_product_attention`` does the work where it can; it knows neither softcap nor sinks nor the log-sum-exp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from foldscan.reference.attention import gather_pages, visible_keys


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (Hq, Sq, D), k and v (Hkv, Sk, D)."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = torch.matmul(q, k.transpose(1, 2)).float() * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, q.shape[1], 1)], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    empty = lse == float("-inf")
    probs = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])[..., : k.shape[1]]
    return torch.matmul(probs.to(v.dtype), v), lse


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
    need_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``foldscan.reference.attention.attention``; without ``need_lse`` the second result is empty."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[-1])], [q.new_zeros(q.shape[1], 0, dtype=torch.float32)]
    for s in range(len(starts_q) - 1):
        length = starts_k[s + 1] - starts_k[s]
        if block_table is None:
            ks, vs = (t[starts_k[s] : starts_k[s + 1]] for t in (k, v))
        else:
            ks, vs = (gather_pages(t, block_table[s], length) for t in (k, v))
        qs, ks, vs = q[starts_q[s] : starts_q[s + 1]].transpose(0, 1), ks.transpose(0, 1), vs.transpose(0, 1)
        queries = qs.shape[1]
        unmasked = window_left < 0 and window_right < 0
        seen = None if unmasked else visible_keys(queries, length, window_left, window_right, q.device)
        if need_lse or softcap > 0 or sinks is not None or length == 0:
            out, lse = _explicit(qs, ks, vs, seen, sinks, scale, softcap)
            lses.append(lse)
        else:
            square_causal = window_left < 0 and window_right == 0 and queries == length
            out = F.scaled_dot_product_attention(
                qs[None],
                ks[None],
                vs[None],
                attn_mask=None if square_causal else seen,
                is_causal=square_causal,
                scale=scale,
                enable_gqa=True,
            )[0]
        outs.append(out.transpose(0, 1))
    return torch.cat(outs), torch.cat(lses, dim=1)
