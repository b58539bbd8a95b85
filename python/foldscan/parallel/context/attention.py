"""Causal attention over documents that several ranks hold, in two ways.

In a ring the keys and values travel from rank to rank, each computes what its queries make of those that pass by, and
the parts are merged by their log-sum-exp (Ring Attention, arXiv:2310.01889). Or all keys are gathered at once, which
takes more memory, but has windows and sinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foldscan import ops
from foldscan.ops._library import compute_dtype, wide
from foldscan.ops.attention import attend_backward
from foldscan.parallel import adjoint, collectives
from foldscan.parallel.context.layout import ContextLayout
from foldscan.parallel.groups import Group


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: ContextLayout,
    group: Group,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    window_size: tuple[int, int] = (-1, -1),
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention within documents; keys and values travel round the ring.

    Args:
        q: (T_loc, Hq, D), this rank's rows as ``layout`` deals them; fp32, bf16, fp16 or fp64.
        k, v: (T_loc, Hkv, D) and (T_loc, Hkv, Dv).
        group: as many ranks as the layout has.
        window_size, sinks: only their defaults; see `gathered_attention`.

    Returns:
        (T_loc, Hq, Dv) in q's dtype (autocast's inside autocast). Differentiable once; backward sends the ring round
        again. Parts are merged in fp32 (fp64) in a fixed order; dK and dV travel in q's dtype and are rounded to it at
        each rank. Sent by a rank: (size - 1) times its share of K and V forward, and of K, V, dK and dV backward.

    Raises:
        ValueError: shapes, or a group of another size. NotImplementedError: a window or sinks.
    """
    if tuple(window_size) not in ((-1, -1), (-1, 0)) or sinks is not None:
        raise NotImplementedError(
            f"window_size, sinks: got {tuple(window_size)} and {'none' if sinks is None else 'some'}, want no window "
            "and no sinks in a ring; gathered_attention (method='all_gather') has both"
        )
    _check(q, k, v, layout, group)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    dtype = compute_dtype(q)
    return _Ring.apply(q.to(dtype), k.to(dtype), v.to(dtype), layout, group, scale, float(softcap))


def gathered_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: ContextLayout,
    group: Group,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    window_size: tuple[int, int] = (-1, -1),
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention within documents over the gathered keys and values of all ranks.

    Arguments and result are those of `ring_attention`, windows and sinks (Hq) as in ``ops.flash_attn_varlen_func``.
    Gathers K and V forward, reduces and scatters dK and dV backward: (size - 1) times a rank's share each.
    """
    _check(q, k, v, layout, group)
    rank, dtype = group.index, compute_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    kv = adjoint.all_gather(torch.cat([k, v], dim=2), layout.counts, group, label="kv")
    index, cu_k = layout.document_keys(rank)
    keys, values = kv.index_select(0, index.to(kv.device)).split([k.shape[2], v.shape[2]], dim=2)
    out = ops.flash_attn_varlen_func(
        q,
        keys,
        values,
        layout.cu_seqlens(rank).to(q.device),
        cu_k.to(q.device),
        layout.counts[rank],
        layout.total,
        softmax_scale=softmax_scale,
        causal=True,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
    )
    return out if layout.counts[rank] else adjoint.depend(out, q, keys, sinks)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: ContextLayout,
        group: Group,
        scale: float,
        softcap: float,
    ) -> torch.Tensor:
        cu = layout.cu_seqlens(group.index).to(q.device)
        merged: torch.Tensor | None = None
        for source, kv in _round(torch.cat([k, v], dim=2), layout, group):
            keys, values = kv.split([k.shape[2], v.shape[2]], dim=2)
            if merged is None:
                part, lse = _part(q, k, v, cu, cu, scale, True, softcap)
                merged = wide(part)
            for rows, span in _earlier(layout, group.index, source):
                one, two = _whole(rows, q.device), _whole(span, q.device)
                part, part_lse = _part(q[rows], keys[span], values[span], one, two, scale, False, softcap)
                merged[rows], lse[:, rows] = ops.merge_attention(
                    merged[rows], lse[:, rows].contiguous(), wide(part), part_lse
                )
        assert merged is not None  # the ring has at least one member
        out = merged.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.group, ctx.scale, ctx.softcap = layout, group, scale, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        layout, group = ctx.layout, ctx.group
        widths = [k.shape[2], v.shape[2]]
        cu = layout.cu_seqlens(group.index).to(q.device)
        own = attend_backward(dout, q, k, v, out, lse, cu, cu, ctx.scale, True, ctx.softcap)
        dq, dkv_own = wide(own[0]), wide(torch.cat(own[1:], dim=2))
        dkv: torch.Tensor | None = None  # of the keys at hand, what the ranks that they passed have added
        for source, kv in _round(torch.cat([k, v], dim=2), layout, group):
            if source == group.index:
                total = dkv_own
            else:
                total = kv.new_zeros(kv.shape, dtype=dq.dtype) if dkv is None else wide(dkv)
            keys, values = kv.split(widths, dim=2)
            for rows, span in _earlier(layout, group.index, source):
                tensors = (dout[rows], q[rows], keys[span], values[span], out[rows], lse[:, rows])
                spans = (_whole(rows, q.device), _whole(span, q.device))
                part = attend_backward(*tensors, *spans, ctx.scale, False, ctx.softcap)
                dq[rows] += part[0]
                total[span] += torch.cat(part[1:], dim=2)
            if source == group.index:
                continue
            # Sent on with the keys; from the last rank of their round they go home.
            following = (source - 1) % group.size
            dkv = collectives.ring_shift(total.to(q.dtype), layout.counts[following], group, label="dkv")
        if dkv is not None:
            dkv_own += dkv
        dk, dv = dkv_own.to(q.dtype).split(widths, dim=2)
        return dq.to(q.dtype), dk, dv, None, None, None, None


def _round(kv: torch.Tensor, layout: ContextLayout, group: Group) -> Iterator[tuple[int, torch.Tensor]]:
    """(whose, keys and values) as they come by: first one's own, then those of the member before, and so on."""
    for step in range(group.size):
        source = (group.index - step) % group.size
        if step:
            kv = collectives.ring_shift(kv, layout.counts[source], group, label="kv")
        yield source, kv


def _earlier(layout: ContextLayout, rank: int, source: int) -> Iterator[tuple[slice, slice]]:
    """Rows of a rank and of a source's keys that they see whole: for each segment, its document's before it."""
    for segment in layout.segments(rank):
        first, last = (layout.rows_before(source, p) for p in (segment.origin, segment.start))
        if first < last:
            yield slice(segment.row, segment.row + segment.first_rows), slice(first, last)


def _whole(rows: slice, device: torch.device) -> torch.Tensor:
    return torch.tensor([0, rows.stop - rows.start], dtype=torch.int32, device=device)


def _part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    scale: float,
    causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = (q.shape[0], k.shape[0])
    return ops.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, *longest, softmax_scale=scale, causal=causal, softcap=softcap, return_lse=True
    )


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: ContextLayout, group: Group) -> None:
    layout.check_group(group)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        layout.check_rows(name, tensor, group.index, "heads", "headdim")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"v: got {v.shape[1]} heads, want {k.shape[1]} as k has")
