"""Attention for transformers' registry: `mask` beside `attention_forward`, and whole layers.

A transformers model makes one mask for all its layers and hands it to each. `mask` makes what ``sdpa`` would get (None
where ``is_causal`` says it all), looks once whether it is "causal, from some first key of each row on, within some
window", and notes that on the tensor. `attention_forward` runs our kernel for None and for noted masks; whatever else
comes (a custom mask, packed documents, dropout, ...) goes to ``sdpa``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from foldscan import ops
from foldscan.integrations.transformers.cache import append
from foldscan.integrations.transformers.swap import fallback, runs_here, wants_gradient
from foldscan.ops.attention import MAX_HEAD_DIM

NAME = "foldscan"
"""How the attention and experts implementations are registered; both can also be set by hand in transformers."""

_NOTE = "_foldscan_pattern"
_CHANGES_THE_RESULT = ("position_bias", "cache", "s_aux", "softcap")


@dataclass(frozen=True)
class Pattern:
    """What a mask says: key j of a row is seen by query i when first <= j <= i + K - Q, and j is within the window."""

    first: tuple[int, ...]
    window: int | None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of ``sdpa``, with a note of its pattern where it has one."""
    made = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        **kwargs,
    )
    if isinstance(made, torch.Tensor) and not torch.compiler.is_compiling():
        pattern = _pattern(made, attention_mask, kv_offset, local_size)
        if pattern is not None:
            setattr(made, _NOTE, pattern)
    return made


def _pattern(
    made: torch.Tensor, padding: torch.Tensor | None, kv_offset: int | torch.Tensor, window: int | None
) -> Pattern | None:
    """The pattern that gives exactly this (B, 1, Q, K) mask, or None."""
    batch, _, queries, keys = made.shape
    if made.dtype != torch.bool or queries > keys:
        return None
    first = torch.zeros(batch, dtype=torch.int64)
    if padding is not None:
        begin = int(kv_offset)
        shown = padding[:, begin : begin + keys].bool()
        if shown.shape[1] != keys:
            return None
        first = torch.where(shown.any(1), shown.int().argmax(1), keys)
    key = torch.arange(keys)
    diagonal = torch.arange(queries)[:, None] + keys - queries
    seen = key <= diagonal
    if window is not None:
        seen = seen & (key > diagonal - window)
    want = seen & (key >= first[:, None, None])
    # A query that sees nothing is padding: what comes out of it is nobody's business.
    agree = (want == made[:, 0]) | ~want.any(-1, keepdim=True)
    return Pattern(tuple(first.tolist()), window) if bool(agree.all()) else None


def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention (B, H, Q, D), (B, Hkv, K, D), (B, Hkv, K, Dv) to (B, Q, H, Dv), under transformers' contract."""
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    pattern = Pattern((0,) * batch, None) if attention_mask is None else getattr(attention_mask, _NOTE, None)
    if (
        pattern is None
        or len(pattern.first) != batch
        or (attention_mask is not None and attention_mask.shape[-2:] != (queries, keys))
        # Without a mask sdpa aligns causality at the beginning: only for as many queries as keys, or one, that is ours.
        or (attention_mask is None and queries > 1 and (not causal or keys != queries))
        or dropout != 0.0
        or any(kwargs.get(name) is not None for name in _CHANGES_THE_RESULT)
        or max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM
        or not runs_here(query, key, value)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    window = (-1, -1) if pattern.window is None else (pattern.window - 1, 0)
    if not any(pattern.first):
        if batch > 1 and not wants_gradient(q, k, v):
            return _paged(q, k, v, scaling, window), None
        return ops.flash_attn_func(q, k, v, softmax_scale=scaling, causal=True, window_size=window), None
    rows = []
    for b, first in enumerate(pattern.first):
        hidden = max(0, queries - (keys - first))  # queries that are padding themselves
        row = ops.flash_attn_func(
            q[b : b + 1, hidden:],
            k[b : b + 1, first:],
            v[b : b + 1, first:],
            softmax_scale=scaling,
            causal=True,
            window_size=window,
        )
        rows.append(torch.nn.functional.pad(row, (0, 0, 0, 0, hidden, 0)))
    return torch.cat(rows), None


def _paged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, window: tuple[int, int]
) -> torch.Tensor:
    """A batch as the pages of a cache, one page a row: keys and values are read where transformers keeps them."""
    batch, queries = q.shape[:2]
    keys = k.shape[1]
    starts = torch.arange(batch + 1, dtype=torch.int32)
    table = starts[:batch, None]
    out = ops.flash_attn_varlen_func(
        q.flatten(0, 1),
        k,
        v,
        starts * queries,
        starts * keys,
        queries,
        keys,
        softmax_scale=scaling,
        causal=True,
        window_size=window,
        block_table=table,
    )
    return out.view(batch, queries, *out.shape[1:])


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, L, H, D); cos, sin (1 or B, L, 2 r) with both halves alike, as transformers makes them."""
    batch, length = x.shape[:2]
    half = cos.shape[-1] // 2
    rows = torch.arange(cos.shape[0] * length, dtype=torch.int32)
    if cos.shape[0] < batch:
        rows = rows.repeat(batch)
    tables = (t[..., :half].reshape(-1, half) for t in (cos, sin))
    return ops.rotary_embedding(x.flatten(0, 1), *tables, rows).view(x.shape)


def covers(module: Any) -> str | None:
    """None where `layer` computes this layer, else why not."""
    chosen = module.config._attn_implementation
    return None if chosen in ("sdpa", NAME) else f"attention implementation {chosen} was chosen"


def layer(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention layer of the Llama kind: queries and keys rotated in one pass each, the cache extended in place."""
    if (
        self.config._attn_implementation != NAME
        or torch.compiler.is_compiling()
        or not runs_here(hidden_states)
    ):
        if position_embeddings is not None:
            kwargs["position_embeddings"] = position_embeddings
        return fallback(
            self, hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
    batch, length, _ = hidden_states.shape
    q, k, v = (p(hidden_states).view(batch, length, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    if hasattr(self, "key_multiplier"):
        k = k * self.key_multiplier
    if position_embeddings is not None:
        q, k = _rotate(q, *position_embeddings), _rotate(k, *position_embeddings)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if past_key_values is not None:
        k, v = append(past_key_values, self.layer_idx, k, v)
    dropout = self.attention_dropout if self.training else 0.0
    out, _ = attention_forward(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
    return self.o_proj(out.reshape(batch, length, -1)), None
