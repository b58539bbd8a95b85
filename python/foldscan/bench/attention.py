"""Cases of attention."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F

from foldscan import ops
from foldscan.bench.case import OURS, Case, Implementation, Peer


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Views (batch, heads, length, headdim) of (batch, length, heads, headdim)."""
    return [t.transpose(1, 2) for t in tensors]


def _repeat(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _sdpa(q: Any, k: Any, v: Any, **options: Any) -> torch.Tensor:
    """SDPA on its own layout, grouped heads natively."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


# Prefill: one causal sequence.


def _inputs(t: int, hq: int, hk: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    return {k: torch.randn(1, t, h, d).to(dtype) for k, h in (("q", hq), ("k", hk), ("v", hk))}


def _implementations(t: int, hq: int, hk: int, d: int) -> dict[str, Peer]:
    def sdpa(q: Any, k: Any, v: Any) -> torch.Tensor:
        return _sdpa(*_heads_first(q, k, v), is_causal=True).transpose(1, 2)

    def repeated(q: Any, k: Any, v: Any) -> torch.Tensor:
        q, k, v = _heads_first(q, k, v)
        return _sdpa(q, _repeat(q, k), _repeat(q, v), is_causal=True).transpose(1, 2)

    def copied(q: Any, k: Any, v: Any) -> torch.Tensor:
        return _sdpa(*(x.contiguous() for x in _heads_first(q, k, v)), is_causal=True).transpose(1, 2)

    ways = {"views": sdpa, "copied to heads first": copied}
    if hq != hk:
        ways["repeated heads"] = repeated
    return {OURS: lambda q, k, v: ops.flash_attn_func(q, k, v, causal=True), "torch SDPA": ways}


# Packed documents of 16 to 1024 tokens, lengths spread evenly over the logarithm.


def _lengths(total: int) -> list[int]:
    draw = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(min(round(16 * 64 ** draw.random()), total - sum(lengths)))
    return lengths


def _packed_inputs(t: int, hq: int, hk: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    return {k: torch.randn(t, h, d).to(dtype) for k, h in (("q", hq), ("k", hk), ("v", hk))}


def _packed(t: int, hq: int, hk: int, d: int) -> dict[str, Peer]:
    lengths = _lengths(t)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(t, t, dtype=torch.bool).tril()

    def ours(q: Any, k: Any, v: Any) -> torch.Tensor:
        out: torch.Tensor = ops.flash_attn_varlen_func(q, k, v, cu, cu, max(lengths), max(lengths), causal=True)
        return out

    def masked(q: Any, k: Any, v: Any) -> torch.Tensor:
        return _sdpa(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask)[0].transpose(0, 1)

    def loop(q: Any, k: Any, v: Any) -> torch.Tensor:
        parts = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)))
        return torch.cat([_sdpa(*part, is_causal=True) for part in parts], 2)[0].transpose(0, 1)

    return {OURS: ours, "torch SDPA, masked": masked, "torch SDPA, a document at a time": loop}


# Decoding: one query a sequence against a full cache. The cache lies as each implementation likes it best.


def _decode_inputs(b: int, keys: int, hq: int, hk: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    q, k, v = (torch.randn(b, n, h, d).to(dtype) for n, h in ((1, hq), (keys, hk), (keys, hk)))
    heads_k, heads_v = (x.contiguous() for x in _heads_first(k, v))
    return {"q": q, "k": k, "v": v, "heads_k": heads_k, "heads_v": heads_v}


def _decode(b: int, keys: int, hq: int, hk: int, d: int) -> dict[str, Peer]:
    def ours(q: Any, k: Any, v: Any, **_: Any) -> torch.Tensor:
        out: torch.Tensor = ops.flash_attn_with_kvcache(q, k, v)
        return out

    def positions_first(q: Any, k: Any, v: Any, **_: Any) -> torch.Tensor:
        return _sdpa(*_heads_first(q, k, v)).transpose(1, 2)

    def heads_first(q: Any, heads_k: Any, heads_v: Any, **_: Any) -> torch.Tensor:
        return _sdpa(q.transpose(1, 2), heads_k, heads_v).transpose(1, 2)

    def repeated(q: Any, heads_k: Any, heads_v: Any, **_: Any) -> torch.Tensor:
        q = q.transpose(1, 2)
        return _sdpa(q, _repeat(q, heads_k), _repeat(q, heads_v)).transpose(1, 2)

    def rows(q: Any, heads_k: Any, heads_v: Any, **_: Any) -> torch.Tensor:
        # The query heads of a group stand as query positions of their key head: right because nothing is masked.
        return _sdpa(q.view(b, hk, hq // hk, d), heads_k, heads_v).view(b, 1, hq, d)

    plain: dict[str, Implementation] = {"positions first": positions_first, "heads first": heads_first}
    if hq == hk:
        return {OURS: ours, "torch SDPA": plain}
    return {OURS: ours, "torch SDPA": plain | {"repeated heads": repeated}, "torch SDPA, group as rows": rows}


CASES = [
    Case(
        "attention_causal",
        ("T", "Hq", "Hkv", "D"),
        [
            (2048, 8, 8, 64),
            (1024, 32, 8, 128),
            (512, 8, 8, 64),
            (512, 32, 8, 128),
            (4096, 16, 4, 64),
            (4096, 8, 8, 128),
        ],
        _inputs,
        _implementations,
        lambda t, hq, hk, d: 2 * t * t * hq * d,
        lambda t, hq, hk, d, element: 2 * element * t * d * (hq + hk),
        backward_flops=3.5,
        headline=2,
    ),
    Case(
        "attention_varlen",
        ("T", "Hq", "Hkv", "D"),
        [(4096, 8, 8, 64), (2048, 32, 8, 128)],
        _packed_inputs,
        _packed,
        lambda t, hq, hk, d: 2 * sum(n * n for n in _lengths(t)) * hq * d,
        lambda t, hq, hk, d, element: 2 * element * t * d * (hq + hk),
        backward_flops=3.5,
    ),
    Case(
        "attention_decode",
        ("batch", "keys", "Hq", "Hkv", "D"),
        [(1, 16384, 32, 8, 128), (4, 4096, 32, 8, 128), (16, 1024, 32, 8, 128), (1, 1024, 32, 8, 128)],
        _decode_inputs,
        _decode,
        lambda b, keys, hq, hk, d: 4 * b * keys * hq * d,
        lambda b, keys, hq, hk, d, element: 2 * element * b * keys * hk * d,
        modes=("fwd",),
        headline=2,
    ),
]
