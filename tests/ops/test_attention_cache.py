"""Paged caches: appending, decoding with the bits of the prefill, and flash_attn_with_kvcache."""

from __future__ import annotations

import pytest
import torch
from attention_cases import cu
from foldscan import ops
from foldscan.reference import attention as reference
from helpers import relative_rmse

DTYPES = [torch.float32, torch.bfloat16]


def paged(pages: int, page_size: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches full of NaN: a slot that was not written must never be read."""
    return tuple(torch.full((pages, page_size, heads, dim), float("nan"), dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 7, 64, 300])
@pytest.mark.parametrize("options", [{}, {"window_size": (130, 0), "softcap": 5.0}])
def test_prefill_pieces_and_decoding_have_the_bits_of_one_call(
    options: dict[str, object], page_size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    lengths, heads, kv_heads, dim = [530, 70], 6, 2, 24
    options = {"causal": True, **options}
    q, k, v = (torch.randn(600, h, dim).to(dtype) for h in (heads, kv_heads, kv_heads))
    want = ops.flash_attn_varlen_func(q, k, v, cu(lengths), cu(lengths), 530, 530, **options)
    per_sequence = -(-530 // page_size)
    k_cache, v_cache = paged(2 * per_sequence + 1, page_size, kv_heads, dim, dtype)
    table = torch.randperm(2 * per_sequence + 1)[: 2 * per_sequence].int().view(2, per_sequence)
    starts, done = cu(lengths).tolist(), [0, 0]
    # Prefill in pieces, then single tokens, with unequal progress; an empty step in between.
    for steps in ([250, 3], [0, 1], [5, 60], [1, 1], [1, 0], [270, 4], [1, 1], [1, 0], [1, 0]):
        rows = torch.cat([torch.arange(starts[s] + done[s], starts[s] + done[s] + steps[s]) for s in range(2)])
        positions = torch.tensor(done).int()
        ops.kv_cache_append(k[rows], v[rows], k_cache, v_cache, table, cu(steps), positions)
        done = [d + n for d, n in zip(done, steps)]
        out = ops.flash_attn_varlen_func(
            q[rows], k_cache, v_cache, cu(steps), cu(done), max(steps), max(done), block_table=table, **options
        )
        assert torch.equal(out, want[rows]), (steps, done)
    assert done == lengths


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_append_writes_the_right_slots_and_no_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(9, 2, 5).to(dtype), torch.randn(9, 2, 3).to(dtype)
    qkv = torch.randn(9, 3, 2, 5).to(dtype)
    table = torch.tensor([[4, 0, 2], [6, 1, 5]], dtype=torch.int32)
    args = (table, cu([5, 4]), torch.tensor([3, 0]).int())
    spread = torch.randn(5, 2, 9).to(dtype).transpose(0, 2)  # (9, 2, 5), last dimension not dense
    for keys, values in ((k, v), (qkv[:, 1], qkv[:, 2, :, 1:4]), (spread, v)):
        caches = [torch.zeros(7, 4, 2, d).to(dtype) for d in (5, 3)]
        wanted = [c.clone() for c in caches]
        ops.kv_cache_append(keys, values, *caches, *args)
        reference.kv_cache_append(keys, values, *wanted, *args)
        assert torch.equal(caches[0], wanted[0]) and torch.equal(caches[1], wanted[1])
        assert caches[0].ne(0).any(-1).any(-1).sum() == 9


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, first: int, step: int, interleaved: bool
) -> torch.Tensor:
    """x (seqlen, heads, headdim): each pair of features as a complex number, times e^(i angle)."""
    r = cos.shape[1]
    out = x.clone()
    for i in range(x.shape[0]):
        turn = torch.complex(cos[first + i * step], sin[first + i * step])
        a, b = (x[i, :, 0 : 2 * r : 2], x[i, :, 1 : 2 * r : 2]) if interleaved else (x[i, :, :r], x[i, :, r : 2 * r])
        z = torch.complex(a, b) * turn
        if interleaved:
            out[i, :, 0 : 2 * r : 2], out[i, :, 1 : 2 * r : 2] = z.real, z.imag
        else:
            out[i, :, :r], out[i, :, r : 2 * r] = z.real, z.imag
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["dense", "batch_idx", 1, 4, 8, 128])
def test_with_kvcache(layout: str | int, causal: bool, interleaved: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, new, heads, kv_heads, dim, r, capacity = 3, 4, 4, 2, 20, 6, 48
    lengths = torch.tensor([0, 17, 44]).int()
    q, k, v = (torch.randn(batch, new, h, dim).to(dtype) for h in (heads, kv_heads, kv_heads))
    angle = torch.rand(capacity, r) * 6
    cos, sin = angle.cos(), angle.sin()
    history = [torch.randn(batch, capacity, kv_heads, dim).to(dtype) for _ in range(2)]
    kwargs: dict[str, object] = {}
    if isinstance(layout, int):  # the size of a page
        pages = -(-capacity // layout)
        caches = list(paged(3 * pages + 2, layout, kv_heads, dim, dtype))
        table = torch.randperm(3 * pages + 2)[: 3 * pages].int().view(3, pages)
        for cache, old in zip(caches, history):
            for b in range(batch):
                padded = torch.nn.functional.pad(old[b], (0, 0, 0, 0, 0, pages * layout - capacity))
                cache[table[b].long()] = padded.view(pages, layout, kv_heads, dim)
        kwargs["block_table"] = table
        where = [cache_rows(caches, table[b]) for b in range(batch)]
    else:
        index = torch.tensor([4, 0, 2]) if layout == "batch_idx" else torch.arange(3)
        caches = [torch.zeros(5, capacity, kv_heads, dim).to(dtype) for _ in range(2)]
        for cache, old in zip(caches, history):
            cache[index] = old
        if layout == "batch_idx":
            kwargs["cache_batch_idx"] = index.int()
        where = [(lambda i=i: [c[i] for c in caches]) for i in index.tolist()]
    out, lse = ops.flash_attn_with_kvcache(
        q, *caches, k, v, cos, sin, lengths, causal=causal, rotary_interleaved=interleaved, return_lse=True, **kwargs
    )
    for b in range(batch):
        past = int(lengths[b])
        turned_q = rotated(q[b].double(), cos.double(), sin.double(), past, 1 if causal else 0, interleaved)
        turned_k = rotated(k[b].double(), cos.double(), sin.double(), past, 1, interleaved)
        keys = torch.cat([history[0][b, :past].double(), turned_k])
        values = torch.cat([history[1][b, :past], v[b]])
        stored_k, stored_v = (t[: past + new] for t in where[b]())
        assert torch.equal(stored_v, values)
        assert relative_rmse(stored_k, keys) < (1e-6 if dtype == torch.float32 else 3e-3)
        want, want_lse = ops.flash_attn_func(
            turned_q[None], keys[None], values.double()[None], causal=causal, return_lse=True
        )
        assert relative_rmse(out[b], want[0]) < (1e-6 if dtype == torch.float32 else 1e-2)
        assert relative_rmse(lse[b], want_lse[0]) < (1e-6 if dtype == torch.float32 else 5e-3)


def cache_rows(caches: list[torch.Tensor], pages: torch.Tensor) -> object:
    return lambda: [c[pages.long()].flatten(0, 1) for c in caches]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_cache(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 64).to(dtype) for n, h in ((1, 6), (20000, 2), (20000, 2)))
    out, lse = ops.flash_attn_with_kvcache(q, k, v, cache_seqlens=torch.tensor([20000, 19807]).int(), return_lse=True)
    for b, n in ((0, 20000), (1, 19807)):
        one = (t[b : b + 1, :n].double() for t in (k, v))
        want, want_lse = ops.flash_attn_func(q[b : b + 1].double(), *one, return_lse=True)
        assert relative_rmse(out[b], want[0]) < (1e-6 if dtype == torch.float32 else 6e-3)
        assert relative_rmse(lse[b], want_lse[0]) < 1e-6


def test_with_kvcache_without_new_keys_and_defaults() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 30, 2, 8), torch.randn(2, 30, 2, 8)
    assert torch.equal(ops.flash_attn_with_kvcache(q, k, v), ops.flash_attn_func(q, k, v))
    part = ops.flash_attn_with_kvcache(q, k, v, cache_seqlens=11, softcap=2.0, window_size=(4, 0))
    assert torch.equal(part, ops.flash_attn_func(q, k[:, :11], v[:, :11], softcap=2.0, window_size=(4, 0)))
    empty, lse = ops.flash_attn_with_kvcache(q, k, v, cache_seqlens=0, return_lse=True)
    assert (empty == 0).all() and (lse == float("-inf")).all()


def test_appending_then_attending_equals_one_call_in_bits() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        q, k, v = (torch.randn(2, 40, h, 16).to(dtype) for h in (4, 2, 2))
        want = ops.flash_attn_func(q, k, v, causal=True)
        caches = [torch.zeros(2, 50, 2, 16).to(dtype) for _ in range(2)]
        for i, n in ((0, 33), (33, 1), (34, 6)):
            step = [t[:, i : i + n] for t in (q, k, v)]
            out = ops.flash_attn_with_kvcache(step[0], *caches, step[1], step[2], cache_seqlens=i, causal=True)
            assert torch.equal(out, want[:, i : i + n])


def test_no_gradient_through_pages() -> None:
    q = torch.randn(1, 2, 8, requires_grad=True)
    k = torch.randn(3, 4, 2, 8)
    table = torch.zeros(1, 1, dtype=torch.int32)
    out = ops.flash_attn_varlen_func(q, k, k, cu([1]), cu([3]), 1, 3, block_table=table)
    with pytest.raises(NotImplementedError, match="block_table"):
        out.sum().backward()


def test_bad_arguments_are_named_and_nothing_is_written() -> None:
    k = torch.ones(3, 2, 8)
    cache = torch.zeros(4, 2, 2, 8)
    before = cache.clone()
    table, positions = torch.tensor([[0, 3]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    good = (k, k, cache, cache.clone(), table, cu([3]), positions)
    wrong = [
        (ValueError, "block_table", {4: torch.tensor([[0, 4]], dtype=torch.int32)}),
        (ValueError, "block_table", {4: torch.tensor([[0, -1]], dtype=torch.int32)}),
        (ValueError, "block_table", {6: torch.tensor([2], dtype=torch.int32)}),
        (ValueError, "positions", {6: torch.tensor([-1], dtype=torch.int32)}),
        (ValueError, "positions", {6: torch.tensor([1, 1], dtype=torch.int32)}),
        (ValueError, "cu_seqlens", {5: cu([2])}),
        (TypeError, "k: got dtype", {0: k.bfloat16()}),
        (ValueError, "k_cache", {2: torch.zeros(4, 2, 3, 8)}),
        (ValueError, "v_cache", {3: torch.zeros(5, 2, 2, 8)}),
        (TypeError, "block_table", {4: table.long()}),
    ]
    for error, match, change in wrong:
        args = [change.get(i, a) for i, a in enumerate(good)]
        with pytest.raises(error, match=match):
            ops.kv_cache_append(*args)
        assert torch.equal(cache, before)
    q = torch.zeros(1, 2, 8)
    for match, lengths, bad in (
        ("block_table", [5], table),
        ("block_table", [3], torch.tensor([[0, 9]], dtype=torch.int32)),
        ("block_table", [3], torch.zeros(2, 2, dtype=torch.int32)),
    ):
        with pytest.raises(ValueError, match=match):
            ops.flash_attn_varlen_func(q, cache, cache, cu([1]), cu(lengths), 1, 3, block_table=bad)
    q, wide = torch.zeros(1, 2, 2, 8), torch.zeros(9, 5)
    for match, kwargs in (
        ("cache_seqlens", {"k": q, "v": q}),
        ("cache_seqlens: got 3", {"k": q, "v": q, "cache_seqlens": 1}),
        ("v: want", {"k": q, "cache_seqlens": 0}),
        ("rotary_sin", {"k": q, "v": q, "cache_seqlens": 0, "rotary_cos": torch.zeros(9, 2)}),
        ("rotary_cos", {"rotary_sin": torch.zeros(9, 2), "rotary_cos": torch.zeros(9, 2)}),
        ("rotary_cos: got 5", {"k": q, "v": q, "cache_seqlens": 0, "rotary_sin": wide, "rotary_cos": wide}),
        ("cache_batch_idx", {"cache_batch_idx": torch.zeros(2).int()}),
        ("block_table", {"cache_batch_idx": torch.zeros(1).int(), "block_table": table, "cache_seqlens": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            ops.flash_attn_with_kvcache(q, cache, cache.clone(), **kwargs)
    assert torch.equal(cache, before)


def test_opcheck_and_compile() -> None:
    torch.manual_seed(0)
    k = torch.randn(5, 2, 8)
    caches = (torch.zeros(4, 4, 2, 8), torch.zeros(4, 4, 2, 8))
    table = torch.tensor([[0, 2], [1, 3]], dtype=torch.int32)
    args = (k, k, *caches, table, cu([2, 3]), torch.tensor([1, 4]).int())
    torch.library.opcheck(torch.ops.foldscan.kv_cache_append, args)

    angles = torch.randn(9, 3)
    torch.library.opcheck(torch.ops.foldscan.rotary, (k, angles.cos(), angles.sin(), torch.arange(5).int(), True))

    def step(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        ops.kv_cache_append(k, k, k_cache, v_cache, table, cu_new, positions)
        out: torch.Tensor = ops.flash_attn_varlen_func(
            q, k_cache, v_cache, cu_new, cu_all, 3, 7, causal=True, block_table=table
        )
        return out

    cu_new, cu_all, positions = cu([2, 3]), cu([3, 7]), torch.tensor([1, 4]).int()
    q = torch.randn(5, 4, 8)
    eager_caches, compiled_caches = ([torch.zeros(4, 4, 2, 8) for _ in range(2)] for _ in range(2))
    want = step(q, *eager_caches)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(q, *compiled_caches)
    assert torch.equal(got, want) and torch.equal(eager_caches[0], compiled_caches[0])
    dense = torch.randn(2, 6, 2, 8)
    compiled = torch.compile(ops.flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(dense, dense, dense), ops.flash_attn_with_kvcache(dense, dense, dense))
