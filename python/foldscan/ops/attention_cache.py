"""Attention over a cache of keys and values: appending to it, and flash-attn's one call that does both."""

from __future__ import annotations

from typing import Any

import torch

from foldscan.ops import _checks
from foldscan.ops._backend import current_backend, use_native
from foldscan.ops._library import kernels, register
from foldscan.ops.attention import attend, dense, multiples, named_error


def kv_cache_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write new keys and values into a paged cache, in place and without gradient.

    Args:
        k, v: (total, Hkv, D) and (total, Hkv, Dv), packed.
        k_cache, v_cache: (pages, page_size, Hkv, D or Dv), the dtype of k and v.
        block_table: (n, max_pages) int32: the pages of each sequence.
        cu_seqlens: (n + 1) int32: where each sequence lies in k and v.
        positions: (n) int32: keys already in the cache; the first new one of sequence s becomes key positions[s].

    Raises:
        TypeError, ValueError: before anything is written.
    """
    for name, tensor, cache_name, cache in (("k", k, "k_cache", k_cache), ("v", v, "v_cache", v_cache)):
        _checks.tensor(name, tensor, dims=3)
        _checks.tensor(cache_name, cache, dims=4)
        _checks.same_dtype(name, tensor, cache_name, cache)
        _checks.shape(cache_name, cache, "pages", "page_size", tensor.shape[1], tensor.shape[2])
        if cache.stride(3) != 1:
            raise ValueError(f"{cache_name}: got strides {cache.stride()}, want a dense last dimension")
    _checks.shape("v", v, k.shape[0], k.shape[1], "headdim")
    _checks.shape("v_cache", v_cache, k_cache.shape[0], k_cache.shape[1], "heads", "headdim")
    _checks.cu_seqlens("cu_seqlens", cu_seqlens, k.shape[0])
    _checks.tensor("positions", positions, dtypes=(torch.int32,))
    _checks.shape("positions", positions, cu_seqlens.shape[0] - 1)
    _checks.tensor("block_table", block_table, dtypes=(torch.int32,))
    _checks.shape("block_table", block_table, positions.shape[0], "max_pages")
    k, v = k.detach(), v.detach()
    if current_backend() != "native" or k.device.type not in ("cpu", "meta"):
        from foldscan.reference import attention as reference

        return reference.kv_cache_append(k, v, k_cache, v_cache, block_table, cu_seqlens, positions)
    try:
        kernels.kv_cache_append(dense(k), dense(v), k_cache, v_cache, dense(block_table), cu_seqlens, positions)
    except RuntimeError as error:
        raise named_error(error) from None


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    num_splits: int = 0,
    *,
    return_lse: bool = False,
) -> Any:
    """Append k and v to the cache (rotated, if asked for), then attend to all of it. Not differentiable.

    Args:
        q: (batch, seqlen_q, Hq, D).
        k_cache, v_cache: (batch_cache, seqlen_cache, Hkv, D or Dv), or pages (pages, page_size, Hkv, D or Dv) with a
            block table. Changed in place when k and v are given.
        k, v: (batch, seqlen_new, Hkv, D or Dv), or None.
        rotary_cos, rotary_sin: (length, r) with 2 r <= D: the first 2 r features of q and k are rotated. Key i of
            the new ones stands at cache_seqlens + i; query i too if causal or windowed, else at cache_seqlens.
        cache_seqlens: keys already in the cache, (batch) int32 or one number; None for a full cache.
        cache_batch_idx: (batch) int32: which sequence of the cache each one is; None for the same order.
        block_table: (batch, max_pages) int32, see ``flash_attn_varlen_func``.
        rotary_interleaved: feature 2 i turns with 2 i + 1; else feature i with i + r.
        num_splits: accepted for compatibility. The cache is split over the threads as need be: the bits do not change.

    Returns:
        out (batch, seqlen_q, Hq, Dv), with return_lse also lse (batch, Hq, seqlen_q) fp32. Other arguments and errors
        as for ``flash_attn_func``.
    """
    _checks.tensor("q", q, dims=4)
    batch, seqlen_q, heads, head_dim = q.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.tensor(name, cache, dims=4)
        _checks.same_dtype(name, cache, "q", q)
    _checks.shape("k_cache", k_cache, "batch", "seqlen", "heads", head_dim)
    _checks.shape("v_cache", v_cache, *k_cache.shape[:3], "headdim")
    table, capacity = _table(batch, k_cache, cache_batch_idx, block_table)
    lengths = _cache_lengths(cache_seqlens, batch, k_cache, k, block_table)
    if (k is None) != (v is None):
        raise ValueError("v: want k and v, or neither")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_sin: want rotary_cos and rotary_sin, or neither")
    new = 0
    if k is not None and v is not None:
        _checks.tensor("k", k, dims=4)
        _checks.tensor("v", v, dims=4)
        new = k.shape[1]
        _checks.shape("k", k, batch, new, k_cache.shape[2], head_dim)
        _checks.shape("v", v, batch, new, *v_cache.shape[2:])
        _checks.same_dtype("k", k, "q", q)
        _checks.same_dtype("v", v, "q", q)
    elif rotary_cos is not None:
        raise ValueError("rotary_cos: got a table without k, want the new keys that it rotates")
    longest = lengths if isinstance(lengths, int) else _longest(lengths)
    if longest + new > capacity:
        raise ValueError(f"cache_seqlens: got {longest + new} keys with the new ones, want at most {capacity}")
    q, k_cache, v_cache = q.detach(), k_cache.detach(), v_cache.detach()
    if k is not None and v is not None:
        k, v = k.detach(), v.detach()
        starts = lengths
        if isinstance(starts, int):
            starts = torch.full((batch,), starts, dtype=torch.int32, device=q.device)
        if rotary_cos is not None and rotary_sin is not None:
            _check_rotary(rotary_cos, rotary_sin, head_dim, longest + max(new, seqlen_q))
            ordered = causal or window_size[0] >= 0 or window_size[1] >= 0
            q = _rotate(q, rotary_cos, rotary_sin, starts, rotary_interleaved, ordered)
            k = _rotate(k, rotary_cos, rotary_sin, starts, rotary_interleaved, True)
        cu_new = multiples(batch + 1, new, q.device)
        kv_cache_append(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, table, cu_new, starts)
    if isinstance(lengths, int) or (batch == 1 and not torch.compiler.is_compiling()):
        cu_k = multiples(batch + 1, longest + new, q.device)
    else:
        cu_k = torch.nn.functional.pad((lengths + new).cumsum(0, dtype=torch.int32), (1, 0))
    out, lse = attend(
        q.flatten(0, 1),
        k_cache,
        v_cache,
        multiples(batch + 1, seqlen_q, q.device),
        cu_k,
        table,
        None,
        0.0,
        softmax_scale,
        causal,
        window_size,
        softcap,
        None,
        need_lse=return_lse,
    )
    out = out.view(batch, seqlen_q, heads, v_cache.shape[3])
    return (out, lse.view(heads, batch, seqlen_q).transpose(0, 1).contiguous()) if return_lse else out


def _table(
    batch: int, k_cache: torch.Tensor, cache_batch_idx: torch.Tensor | None, block_table: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """Pages of each sequence, and how many keys they hold. A cache without pages has one long page a sequence."""
    page_size = k_cache.shape[1]
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx: got it beside a block_table, want one of the two")
        _checks.tensor("block_table", block_table, dtypes=(torch.int32,))
        _checks.shape("block_table", block_table, batch, "max_pages")
        return block_table, page_size * block_table.shape[1]
    if cache_batch_idx is None:
        if k_cache.shape[0] < batch:
            raise ValueError(f"k_cache: got {k_cache.shape[0]} sequences, want at least the batch of {batch}")
        return multiples(batch, 1, k_cache.device)[:, None], page_size
    _checks.tensor("cache_batch_idx", cache_batch_idx, dtypes=(torch.int32, torch.int64))
    _checks.shape("cache_batch_idx", cache_batch_idx, batch)
    return cache_batch_idx.to(torch.int32)[:, None], page_size


def _cache_lengths(
    cache_seqlens: int | torch.Tensor | None,
    batch: int,
    k_cache: torch.Tensor,
    k: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> int | torch.Tensor:
    """Keys in the cache: one number for all sequences, or a tensor (batch)."""
    if cache_seqlens is None:
        if k is not None or block_table is not None:
            raise ValueError("cache_seqlens: got None, want the keys in the cache when k or a block_table is given")
        cache_seqlens = k_cache.shape[1]
    if isinstance(cache_seqlens, int):
        return cache_seqlens
    _checks.tensor("cache_seqlens", cache_seqlens, dtypes=(torch.int32, torch.int64))
    _checks.shape("cache_seqlens", cache_seqlens, batch)
    return cache_seqlens.to(torch.int32).contiguous()


def _longest(lengths: torch.Tensor) -> int:
    """The most keys of a sequence; 0 where the values are not known (while compiling) or there are none."""
    return 0 if torch.compiler.is_compiling() or lengths.numel() == 0 else int(lengths.max())


def _check_rotary(cos: torch.Tensor, sin: torch.Tensor, head_dim: int, positions: int) -> None:
    _checks.tensor("rotary_cos", cos, dims=2)
    _checks.tensor("rotary_sin", sin, dims=2)
    _checks.shape("rotary_sin", sin, *cos.shape)
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(f"rotary_cos: got {cos.shape[1]} angles, want at most half the head dimension {head_dim}")
    if not torch.compiler.is_compiling() and positions > cos.shape[0]:
        raise ValueError(f"rotary_cos: got {cos.shape[0]} positions, want {positions}")


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: torch.Tensor, interleaved: bool, ordered: bool
) -> torch.Tensor:
    """x (batch, seqlen, heads, headdim) at positions lengths + i (ordered) or lengths."""
    steps = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    positions = (lengths[:, None] + (steps if ordered else torch.zeros_like(steps))).flatten()
    rows = x.flatten(0, 1)
    if not use_native(x):
        from foldscan.reference import attention as reference

        return reference.rotary(rows, cos, sin, positions, interleaved).view(x.shape)
    half = x.dtype == torch.float16
    table = (cos.float().contiguous(), sin.float().contiguous(), positions)
    return kernels.rotary(dense(rows.float() if half else rows), *table, interleaved).view(x.shape).to(x.dtype)


register("kv_cache_append", lambda k, v, k_cache, v_cache, block_table, cu_seqlens, positions: None)
