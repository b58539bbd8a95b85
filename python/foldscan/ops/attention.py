"""Attention with the names and layouts of flash-attn, on one kernel for packed, dense and paged sequences."""

from __future__ import annotations

from typing import Any

import torch

from foldscan.ops import _checks
from foldscan.ops._backend import current_backend, use_native
from foldscan.ops._library import autocast_dtype, kernels, register

MAX_HEAD_DIM = 256


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    sinks: torch.Tensor | None = None,
) -> Any:
    """Softmax attention, out = softmax(scale Q K^T) V, over a batch of equally long sequences.

    Args:
        q: (batch, seqlen_q, Hq, D), fp32, bf16, fp16 or fp64; D from 1 to 256.
        k: (batch, seqlen_k, Hkv, D); query head h uses key head h // (Hq / Hkv).
        v: (batch, seqlen_k, Hkv, Dv); Dv may differ from D.
        dropout_p: must be 0.
        softmax_scale: factor of the scores; 1 / sqrt(D) when None.
        causal: query i sees key j up to j = i + seqlen_k - seqlen_q (aligned at the end).
        window_size: (left, right) keys seen on each side of that diagonal; -1 is unlimited.
        softcap: scores become softcap * tanh(score / softcap) when positive.
        alibi_slopes: not offered.
        deterministic: always true, whatever is passed.
        return_attn_probs: return (out, lse, None), as flash-attn does without dropout.
        return_lse: return (out, lse).
        sinks: (Hq) logits that join the denominator of their head only (a row without keys then has lse = sink).

    Returns:
        out (batch, seqlen_q, Hq, Dv) in q's dtype; a row that sees no key is 0. lse (batch, Hq, seqlen_q) fp32 is the
        natural logarithm of the denominator, -inf for such a row. Both are differentiable.

    A row has the same bits alone, in a batch, packed or paged, in one prefill or token by token, with any number of
    threads. Source: FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2; sinks: arXiv:2309.17453.

    Raises:
        ValueError: shapes or values. TypeError: dtypes. NotImplementedError: alibi_slopes.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(name, tensor, dims=4)
    batch, seqlen_q, heads, head_dim = q.shape
    _checks.shape("k", k, batch, "seqlen_k", "heads", head_dim)
    _checks.shape("v", v, batch, k.shape[1], k.shape[2], "headdim")
    cu_q = multiples(batch + 1, seqlen_q, q.device)
    cu_k = multiples(batch + 1, k.shape[1], q.device)
    out, lse = attend(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_q,
        cu_k,
        None,
        sinks,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        need_lse=return_lse or return_attn_probs,
    )
    out = out.view(batch, seqlen_q, heads, v.shape[3])
    if not (return_lse or return_attn_probs):
        return out
    lse = lse.view(heads, batch, seqlen_q).transpose(0, 1).contiguous()
    return (out, lse, None) if return_attn_probs else (out, lse)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    return_lse: bool = False,
    sinks: torch.Tensor | None = None,
) -> Any:
    """``flash_attn_func`` over sequences of any lengths packed one after another.

    Args:
        q: (total_q, Hq, D).
        k, v: (total_k, Hkv, D) and (total_k, Hkv, Dv); with a block table, caches (pages, page_size, Hkv, D or Dv).
        cu_seqlens_q: (n + 1) int32: sequence s has query rows cu_seqlens_q[s] to cu_seqlens_q[s + 1].
        cu_seqlens_k: (n + 1) int32, likewise for keys; with a block table only the differences count.
        max_seqlen_q, max_seqlen_k: accepted for compatibility; the kernels do not need them.
        block_table: (n, max_pages) int32: key j of sequence s is slot j % page_size of page
            block_table[s, j // page_size]. Not differentiable.

    Returns:
        out (total_q, Hq, Dv); lse (Hq, total_q) fp32 where asked for. The other arguments, results and errors are those
        of ``flash_attn_func``.
    """
    _checks.tensor("q", q, dims=3)
    for name, tensor in (("k", k), ("v", v)):
        _checks.tensor(name, tensor, dims=3 if block_table is None else 4)
    _checks.shape("k", k, *["any"] * (k.dim() - 1), q.shape[2])
    _checks.shape("v", v, *k.shape[:-1], "headdim")
    _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    _checks.shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape[0])
    if block_table is None:
        _checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    else:
        _checks.tensor("cu_seqlens_k", cu_seqlens_k, dtypes=(torch.int32,))
        _checks.shape("block_table", block_table, cu_seqlens_q.shape[0] - 1, "max_pages")
        _checks.tensor("block_table", block_table, dtypes=(torch.int32,))
    out, lse = attend(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        block_table,
        sinks,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        need_lse=return_lse or return_attn_probs,
    )
    if return_attn_probs:
        return out, lse, None
    return (out, lse) if return_lse else out


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two attentions of the same queries over disjoint keys become the one over their union.

    Args:
        out_a, out_b: (batch, seqlen, heads, headdim) or packed (total, heads, headdim), one dtype.
        lse_a, lse_b: (batch, heads, seqlen) or (heads, total) fp32 (fp64 with fp64 outputs), natural logarithm, -inf
            for a row without keys.

    Returns:
        (out, lse) in the layout of the inputs; differentiable in all four. A row that is empty on both sides stays 0
        with lse -inf. Source: FlashInfer, arXiv:2501.01005, section 2.2.
    """
    _checks.tensor("out_a", out_a, dims=(3, 4))
    _checks.tensor("out_b", out_b)
    _checks.shape("out_b", out_b, *out_a.shape)
    _checks.same_dtype("out_b", out_b, "out_a", out_a)
    wide = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    want = (*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3])
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _checks.tensor(name, lse, dtypes=(wide,))
        _checks.shape(name, lse, *want)
    if not use_native(out_a, lse_a, out_b, lse_b):
        from foldscan.reference import attention as reference

        return reference.merge_attention(out_a, lse_a, out_b, lse_b)
    if out_a.dtype == torch.float16:
        out, lse = merge_attention(out_a.float(), lse_a, out_b.float(), lse_b)
        return out.to(torch.float16), lse
    packed = out_a.dim() == 3
    tensors = [t[None] if packed else t for t in (out_a, lse_a, out_b, lse_b)]
    out, lse = kernels.merge_attention(*(t.contiguous() for t in tensors))
    return (out[0], lse[0]) if packed else (out, lse)


_counts: dict[tuple[int, int, torch.device], torch.Tensor] = {}


def multiples(count: int, step: int, device: torch.device) -> torch.Tensor:
    """0, step, .. (count - 1) step as int32, not to be written to: kept, since every layer of a step asks for the same.

    The oldest are forgotten; the lengths of a decode step never come again.
    """
    if torch.compiler.is_compiling():
        return torch.arange(count, dtype=torch.int32, device=device) * step
    key = (count, step, device)
    found = _counts.get(key)
    if found is None:
        with torch.inference_mode(False):  # an inference tensor could not be saved for a backward pass later
            found = torch.arange(count, dtype=torch.int32, device=device) * step
        if type(found) is torch.Tensor:  # a fake tensor belongs to one trace
            while len(_counts) >= 64:
                _counts.pop(next(iter(_counts)))
            _counts[key] = found
    return found


def _window(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    if len(window_size) != 2 or any(w < -1 for w in window_size):
        raise ValueError(f"window_size: got {window_size}, want (left, right), each -1 (unlimited) or more")
    return window_size[0], 0 if causal else window_size[1]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    block_table: torch.Tensor | None,
    sinks: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    *,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The common core: q (total_q, Hq, D), k and v (total_k, Hkv, .) or pages; out and lse (Hq, total_q)."""
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes: not supported, want None")
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p: got {dropout_p}, want 0")
    if not softcap >= 0.0:
        raise ValueError(f"softcap: got {softcap}, want 0 (none) or more")
    heads, head_dim = q.shape[1], q.shape[2]
    for name, dim in (("q", head_dim), ("v", v.shape[-1])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: got head dimension {dim}, want 1 to {MAX_HEAD_DIM}")
    if k.shape[-2] == 0 or heads % k.shape[-2] != 0:
        raise ValueError(f"k: got {k.shape[-2]} heads, want a divisor of q's {heads}")
    window = _window(causal, window_size)
    if sinks is not None:
        _checks.tensor("sinks", sinks)
        _checks.shape("sinks", sinks, heads)
        sinks = sinks.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    dtype = autocast_dtype(q.device.type)
    if dtype is not None and block_table is None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _checks.same_dtype("k", k, "q", q)
    _checks.same_dtype("v", v, "q", q)
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    flags = (scale, float(softcap), *window)
    if not use_native(q, k, v, sinks):
        if current_backend() == "eager":
            from foldscan.reference import eager_attention

            return eager_attention.attention(q, k, v, cu_q, cu_k, block_table, sinks, *flags, need_lse=need_lse)
        from foldscan.reference import attention as reference

        return reference.attention(q, k, v, cu_q, cu_k, block_table, sinks, *flags)
    half = q.dtype == torch.float16
    if half:
        q, k, v = q.float(), k.float(), v.float()
    try:
        out, lse = kernels.attention(
            dense(q), dense(k), dense(v), cu_q, cu_k, None if block_table is None else dense(block_table), sinks, *flags
        )
    except RuntimeError as error:
        raise named_error(error) from None
    return (out.to(torch.float16) if half else out), lse


def attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What some of the keys of an attention contribute to its gradient.

    Args:
        dout, out: (total_q, Hq, Dv) and lse (Hq, total_q): of the attention over all its keys, so that the
            contributions of disjoint sets of keys add up.
        q, k, v: (total_q, Hq, D), (total_k, Hkv, D), (total_k, Hkv, Dv), one dtype, as in ``flash_attn_varlen_func``.

    Returns:
        dq, dk, dv in the dtype of q.
    """
    flags = (softmax_scale, softcap, *_window(causal, (-1, -1)))
    if not use_native(dout, q, k, v, out, lse):
        from foldscan.reference import attention as reference

        return reference.attention_backward(dout, q, k, v, out, lse, cu_q, cu_k, *flags)
    dtype = q.dtype
    if dtype == torch.float16:
        dout, q, k, v, out = (t.float() for t in (dout, q, k, v, out))
    tensors = (dout.contiguous(), None, dense(q), dense(k), dense(v), out.contiguous(), lse.contiguous(), cu_q, cu_k)
    dq, dk, dv, _ = kernels.attention_backward(*tensors, None, *flags)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def dense(t: torch.Tensor) -> torch.Tensor:
    """Dense in the last dimension; the other strides are free."""
    return t if t.stride(-1) == 1 else t.contiguous()


def named_error(error: RuntimeError) -> Exception:
    """Where the kernel's binding finds a bad page or length it names the argument: that is a ValueError."""
    message = str(error).split("\n")[0]
    _, found, text = message.partition("argument ")
    return ValueError(text) if found else error


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    block_table: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    total, heads, _ = q.shape
    return q.new_empty(total, heads, v.shape[-1]), q.new_empty(heads, total, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_q, cu_k, block_table, sinks, *ctx.flags = inputs
    ctx.paged = block_table is not None
    ctx.save_for_backward(q, k, v, cu_q, cu_k, sinks, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if ctx.paged:
        raise NotImplementedError("block_table: attention over a paged cache has no gradient")
    q, k, v, cu_q, cu_k, sinks, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, dsinks = kernels.attention_backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, sinks, *ctx.flags)
    return dq, dk, dv, None, None, None, dsinks if sinks is not None else None, None, None, None, None


def _fake_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
) -> tuple[torch.Tensor, ...]:
    dsinks = q.new_empty(0 if sinks is None else q.shape[1], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward_merge(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return kernels.merge_attention_backward(dout.contiguous(), dlse.contiguous(), *ctx.saved_tensors)


register("attention", _fake, _setup, _backward)
register("attention_backward", _fake_backward)
register(
    "merge_attention",
    lambda out_a, lse_a, out_b, lse_b: (torch.empty_like(out_a), torch.empty_like(lse_a)),
    _setup_merge,
    _backward_merge,
)
register(
    "merge_attention_backward",
    lambda dout, dlse, out_a, lse_a, out_b, lse_b: tuple(torch.empty_like(t) for t in (out_a, lse_a, out_b, lse_b)),
)
