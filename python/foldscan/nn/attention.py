"""Grouped-query attention over packed sequences, with or without rotary embedding, cached or not."""

from __future__ import annotations

import torch
from torch import nn

from foldscan import ops
from foldscan.nn.cache import AttentionCache
from foldscan.nn.linear import Linear, RMSNorm
from foldscan.nn.packing import Packing
from foldscan.nn.rotary import RotaryEmbedding


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv:2305.13245).

    Args:
        hidden_size: d.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads, and the width of each.
        bias: of q, k, v and, unless ``output_bias`` says otherwise, o.
        rope_theta: base of the rotary embedding; None for no positional encoding. rotary_dim: features it turns.
        sliding_window: keys a query sees, itself included; None for all before it.
        qk_norm_eps: RMSNorm of each query and key head before the rotation (Qwen3); None for none.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        output_bias: bool | None = None,
        rope_theta: float | None = None,
        rotary_dim: int | None = None,
        sliding_window: int | None = None,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=bias if output_bias is None else output_bias)
        self.scale = head_dim**-0.5
        norms = [None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps) for _ in "qk"]
        self.q_norm, self.k_norm = norms
        self.rotary = None if rope_theta is None else RotaryEmbedding(rotary_dim or head_dim, rope_theta)

    def forward(self, hidden: torch.Tensor, packing: Packing, cache: AttentionCache | None = None) -> torch.Tensor:
        """(T, d) to (T, d)."""
        total = hidden.shape[0]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        qkv = ops.linear_joined(hidden, [p.weight for p in layers], [p.bias for p in layers])
        rotated = self.num_heads + self.num_kv_heads
        qk, v = qkv.view(total, rotated + self.num_kv_heads, self.head_dim).tensor_split([rotated], dim=1)
        step = packing.cache
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.tensor_split([self.num_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        if self.rotary is not None:
            qk = self.rotary(qk, packing.position_ids, packing.max_seqlen if step is None else step.max_seqlen_k)
        q, k = qk.tensor_split([self.num_heads], dim=1)
        if packing.context is not None:
            out = packing.context.attention(q, k, v, self.window)
        elif cache is None or step is None:
            cu, longest = packing.cu_seqlens, packing.max_seqlen
            out = ops.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True, window_size=self.window)
        else:
            ops.kv_cache_append(k, v, cache.keys, cache.values, step.block_table, step.cu_seqlens, step.positions)
            out = ops.flash_attn_varlen_func(
                q,
                cache.keys,
                cache.values,
                step.cu_seqlens,
                step.cu_seqlens_k,
                packing.max_seqlen,
                step.max_seqlen_k,
                causal=True,
                window_size=self.window,
                block_table=step.block_table,
            )
        return self.o_proj(out.reshape(total, self.num_heads * self.head_dim))
