"""A row of attention has the same bits however it is fed; determinism; identities that hold exactly or nearly."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, cu, threads
from foldscan import ops
from helpers import relative_rmse

DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = [{}, {"causal": True}, {"causal": True, "window_size": (300, 0), "softcap": 4.0}]


def tensors(total_q: int, total_k: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, h, dim).to(dtype) for n, h in ((total_q, heads), (total_k, kv_heads), (total_k, kv_heads))]


def varlen(qkv: list[torch.Tensor], lengths_q: list[int], lengths_k: list[int], **kwargs: object) -> torch.Tensor:
    out: torch.Tensor = ops.flash_attn_varlen_func(*qkv, cu(lengths_q), cu(lengths_k), 1, 1, **kwargs)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    for case in (
        Case([300], [300], heads=1, head_dim=64, causal=True, dtype=dtype),
        Case([70, 1, 200], [600, 300, 200], heads=6, kv_heads=2, head_dim=24, causal=True, sinks=True, dtype=dtype),
        # Few rows against many keys: two threads split the keys, one does not.
        Case([3], [2900], heads=4, head_dim=40, causal=True, dtype=dtype),
    ):
        two = case.results(case.public)
        with threads(1):
            one = case.results(case.public)
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), one, two):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_sequence_alone_in_a_batch_and_dense(options: dict[str, object], dtype: torch.dtype) -> None:
    lengths_q, lengths_k = [130, 5, 0, 64], [700, 333, 9, 64]
    qkv = tensors(sum(lengths_q), sum(lengths_k), 4, 2, 32, dtype)
    packed = varlen(qkv, lengths_q, lengths_k, **options)
    starts_q, starts_k = cu(lengths_q), cu(lengths_k)
    order = [3, 1, 0, 2]
    pieces = [
        [
            qkv[0][starts_q[s] : starts_q[s + 1]],
            qkv[1][starts_k[s] : starts_k[s + 1]],
            qkv[2][starts_k[s] : starts_k[s + 1]],
        ]
        for s in range(4)
    ]
    shuffled = varlen(
        [torch.cat([pieces[s][i] for s in order]) for i in range(3)],
        [lengths_q[s] for s in order],
        [lengths_k[s] for s in order],
        **options,
    ).split([lengths_q[s] for s in order])
    for s, piece in enumerate(pieces):
        want = packed[starts_q[s] : starts_q[s + 1]]
        assert torch.equal(want, varlen(piece, [lengths_q[s]], [lengths_k[s]], **options)), s
        assert torch.equal(want, ops.flash_attn_func(*(t[None] for t in piece), **options)[0]), s
        assert torch.equal(want, shuffled[order.index(s)]), s


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_heads_have_the_bits_of_repeated_ones(dtype: torch.dtype) -> None:
    q, k, v = tensors(150, 500, 6, 2, 24, dtype)
    grouped = varlen([q, k, v], [150], [500], causal=True)
    repeated = [q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)]
    assert torch.equal(grouped, varlen(repeated, [150], [500], causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_has_the_bits_it_has_among_others(dtype: torch.dtype) -> None:
    q, k, v = tensors(400, 400, 2, 1, 40, dtype)
    full = varlen([q, k, v], [400], [400], causal=True)
    for i in (0, 1, 63, 64, 95, 96, 255, 256, 257, 399):
        alone = varlen([q[i : i + 1], k[: i + 1], v[: i + 1]], [1], [i + 1], causal=True)
        assert torch.equal(full[i : i + 1], alone), i


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 4, 64), (6, 2, 40), (17, 1, 32), (4, 4, 128)])
def test_keys_read_in_place_give_the_bits_of_packed_ones(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    """Several tiles of rows share a packed block; few rows read the keys where they lie, in the cache too."""
    length = 700
    q, k, v = tensors(length, length, heads, kv_heads, dim, dtype)
    full = varlen([q, k, v], [length], [length], causal=True)
    rows = [0, 1, 255, 256, 319, 320, 600, 699]
    one_each = varlen(
        [q[rows], torch.cat([k[: i + 1] for i in rows]), torch.cat([v[: i + 1] for i in rows])],
        [1] * len(rows),
        [i + 1 for i in rows],
        causal=True,
    )
    assert torch.equal(full[rows], one_each)
    for page_size in (64, 128, 50):
        pages = -(-length // page_size)
        table = torch.randperm(pages).int()[None]
        caches = []
        for t in (k, v):
            cache = torch.full((pages, page_size, kv_heads, dim), float("nan"), dtype=dtype)
            padded = torch.cat([t, t.new_full((pages * page_size - length, kv_heads, dim), float("nan"))])
            cache[table[0].long()] = padded.view(pages, page_size, kv_heads, dim)
            caches.append(cache)
        for i in rows:
            paged = varlen([q[i : i + 1], *caches], [1], [i + 1], causal=True, block_table=table)
            assert torch.equal(full[i : i + 1], paged), (page_size, i)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_sequences_decode_in_waves_with_the_bits_of_one(dtype: torch.dtype) -> None:
    # 60 sequences of up to 3000 keys, 4 heads of 200: the states of their blocks do not fit one wave.
    lengths = [1 + (7 * i * i) % 3000 for i in range(60)]
    q, k, v = tensors(60, max(lengths), 8, 4, 200, dtype)
    caches = [t.view(1, -1, *t.shape[1:]) for t in (k, v)]
    table = torch.zeros(60, 1, dtype=torch.int32)
    out = varlen([q, *caches], [1] * 60, lengths, block_table=table)
    for i in (0, 17, 59):
        n = lengths[i]
        assert torch.equal(out[i : i + 1], varlen([q[i : i + 1], k[:n], v[:n]], [1], [n])), i


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_out_of_sight_do_not_matter(dtype: torch.dtype) -> None:
    q, k, v = tensors(300, 700, 2, 1, 32, dtype)
    options = {"window_size": (200, 50)}
    out = varlen([q, k, v], [300], [700], **options)
    k2, v2 = k.clone(), v.clone()
    k2[:200], v2[:200] = 1e3, -1e3  # the first query's diagonal is key 400
    assert torch.equal(out, varlen([q, k2, v2], [300], [700], **options))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    _, dk, dv = torch.autograd.grad(varlen(leaves, [300], [700], **options).float().square().sum(), leaves)
    assert (dk[:200] == 0).all() and (dv[:200] == 0).all() and (dk[200:] != 0).any(-1).all()


def test_repeated_runs_have_the_same_bits() -> None:
    case = Case([257, 40], [600, 40], heads=2, head_dim=16, causal=True, sinks=True)
    first = case.results(case.public)
    for _ in range(20):
        for a, b in zip(first, case.results(case.public)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_or_softcap_that_is_wide_enough_changes_nothing(dtype: torch.dtype) -> None:
    qkv = tensors(300, 600, 2, 1, 32, dtype)
    causal = varlen(qkv, [300], [600], causal=True)
    assert torch.equal(causal, varlen(qkv, [300], [600], causal=True, window_size=(600, 600)))
    assert torch.equal(causal, varlen(qkv, [300], [600], window_size=(600, 0)))
    capped = varlen(qkv, [300], [600], causal=True, softcap=1e5)
    assert relative_rmse(capped, causal) < (1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_averages(dtype: torch.dtype) -> None:
    q, k, v = tensors(300, 600, 2, 1, 32, dtype)
    floor = 1e-6 if dtype == torch.float32 else 4e-3
    ones = varlen([q, k, torch.ones_like(v)], [300], [600], causal=True)
    assert (ones - 1).abs().max() <= floor
    mean = varlen([q * 0, k, v], [300], [600])
    assert relative_rmse(mean, v.double().mean(0).expand(300, 2, 32)) < floor


def test_permuting_the_keys_or_splitting_and_merging_them_changes_nothing_but_rounding() -> None:
    q, k, v = tensors(130, 700, 4, 2, 32, torch.float32)
    whole, lse = varlen([q, k, v], [130], [700], return_lse=True)
    order = torch.randperm(700)
    assert relative_rmse(varlen([q, k[order], v[order]], [130], [700]), whole) < 1e-6
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    want = torch.autograd.grad(varlen(leaves, [130], [700]), leaves, torch.ones_like(q))
    for at in (0, 1, 300, 699):
        a, lse_a = varlen([leaves[0], leaves[1][:at], leaves[2][:at]], [130], [at], return_lse=True)
        b, lse_b = varlen([leaves[0], leaves[1][at:], leaves[2][at:]], [130], [700 - at], return_lse=True)
        merged, merged_lse = ops.merge_attention(a, lse_a, b, lse_b)
        assert relative_rmse(merged, whole) < 1e-6 and relative_rmse(merged_lse, lse) < 1e-6
        for got, truth in zip(torch.autograd.grad(merged, leaves, torch.ones_like(q)), want):
            assert relative_rmse(got, truth) < 5e-6


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 17, 32, 55, 97, 133])
def test_any_number_of_parts_merges_to_the_whole(splits: int) -> None:
    q, k, v = tensors(9, 300, 4, 2, 16, torch.float32)
    whole, lse = varlen([q, k, v], [9], [300], return_lse=True)
    out, out_lse = torch.zeros_like(whole), torch.full_like(lse, float("-inf"))
    for part_k, part_v in zip(k.tensor_split(splits), v.tensor_split(splits)):
        part, part_lse = varlen([q, part_k, part_v], [9], [len(part_k)], return_lse=True)
        wide = torch.randn(4, 9, 2)  # a partial result that is a view
        wide[..., 0] = part_lse
        out, out_lse = ops.merge_attention(out, out_lse, part, wide[..., 0])
    assert relative_rmse(out, whole) < 2e-6 and relative_rmse(out_lse, lse) < 1e-6
