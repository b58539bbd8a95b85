"""Attention of documents that cross ranks: equal to one rank that has them all, in a ring and gathered."""

from __future__ import annotations

import pytest
import torch
from context_cases import BATCHES, SIZES, assert_equal_to, on_one, on_ranks
from foldscan import ops
from foldscan.ops.attention import attend_backward
from foldscan.parallel.context import ContextLayout, ContextParallel, gathered_attention, ring_attention
from foldscan.parallel.groups import Group
from foldscan.reference import attention as reference
from helpers import assert_budget
from simulated import run_ranks

HEADS, KV_HEADS, D, DV = 4, 2, 8, 6
METHODS = {"ring": ring_attention, "all_gather": gathered_attention}


def tensors(total: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v and a gradient."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, D), (KV_HEADS, D), (KV_HEADS, DV), (HEADS, DV))
    return [torch.randn(total, *shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def oracle(window: int = -1, softcap: float = 0.0):
    """All scores of a document at once, a plain softmax."""

    def whole(rows, weights, cu):
        sinks = weights[0] if weights else None
        return reference.attention(*rows, cu, cu, None, sinks, D**-0.5, softcap, window, 0)[0]

    return whole


def ours(method: str, **options):
    def local(rows, weights, layout, group):
        return METHODS[method](*rows, layout, group, sinks=weights[0] if weights else None, **options)

    return local


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_equal_to_one_rank_in_fp64(method: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for cu in BATCHES:
        *rows, upstream = tensors(cu[-1], torch.float64)
        want = on_one(oracle(), rows, [], cu, upstream)
        for zigzag in (True, False):
            layout = ContextLayout(cu[-1], cu, size, zigzag)
            got = on_ranks(ours(method), rows, [], layout, upstream, monkeypatch)
            assert_equal_to(want, got, 1e-10, (cu, zigzag))


@pytest.mark.parametrize("method", METHODS)
def test_equal_to_one_rank_in_fp32_with_a_softcap(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cu = (0, 0, 61, 64, 203, 203, 257)
    *rows, upstream = tensors(cu[-1], torch.float64)
    want = on_one(oracle(softcap=2.0), rows, [], cu, upstream)
    for size in (2, 4):
        layout = ContextLayout(cu[-1], cu, size)
        got = on_ranks(ours(method, softcap=2.0), [r.float() for r in rows], [], layout, upstream.float(), monkeypatch)
        assert got[0].dtype == torch.float32
        assert_equal_to(want, got, 1e-5, size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_in_the_budget_of_one_rank(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cu = (0, 61, 64, 257)
    *rows, upstream = (t.to(dtype) for t in tensors(cu[-1], torch.float64))
    truth = on_one(oracle(), [r.double() for r in rows], [], cu, upstream.double())

    def single(rows, weights, cu):
        return ops.flash_attn_varlen_func(*rows, cu, cu, 0, 0, causal=True)

    eager = on_one(single, rows, [], cu, upstream)
    for size in (2, 4):
        got = on_ranks(ours(method), rows, [], ContextLayout(cu[-1], cu, size), upstream, monkeypatch)
        for name, g, e, t in zip(("out", "dq", "dk", "dv"), got, eager, truth):
            assert g.dtype == dtype
            assert_budget(f"{name} of {size} ranks", g, e, t)


def test_gathered_keys_have_windows_and_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    for cu in BATCHES:
        *rows, upstream = tensors(cu[-1], torch.float64)
        want = on_one(oracle(window=6), rows, [sinks], cu, upstream)
        for size in (2, 4):
            layout = ContextLayout(cu[-1], cu, size)
            local = ours("all_gather", window_size=(6, 0))
            assert_equal_to(want, on_ranks(local, rows, [sinks], layout, upstream, monkeypatch), 1e-10, (cu, size))


def test_a_ring_refuses_windows_and_sinks() -> None:
    *rows, _ = tensors(3, torch.float32)
    layout, group = ContextLayout(3, (0, 3), 1), Group("cp", (0,), 0)
    for options in ({"window_size": (2, 0)}, {"sinks": torch.zeros(HEADS)}):
        with pytest.raises(NotImplementedError, match=r"window_size, sinks: got .* gathered_attention"):
            ring_attention(*rows, layout, group, **options)
    with pytest.raises(ValueError, match=r"k: got shape \(2, 2, 8\), want \(3, heads, headdim\)"):
        ring_attention(rows[0], rows[1][:2], rows[2], layout, group)
    with pytest.raises(ValueError, match="v: got 1 heads, want 2 as k has"):
        ring_attention(rows[0], rows[1], rows[2][:, :1], layout, group)
    with pytest.raises(ValueError, match="group: got 1 ranks, want 2"):
        gathered_attention(*rows, ContextLayout(3, (0, 3), 2), group)
    with pytest.raises(ValueError, match="method: got 'rings', want 'ring' or 'all_gather'"):
        ContextParallel(layout, group, "rings")  # type: ignore[arg-type]


def test_the_same_bits_again_and_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    cu = (0, 61, 64, 130)
    *rows, upstream = tensors(cu[-1], torch.float32)
    for method in METHODS:
        layout = ContextLayout(cu[-1], cu, 4)
        one, two = (on_ranks(ours(method), rows, [], layout, upstream, monkeypatch) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two))

        def local(rows, weights, layout, group, method=method):
            with torch.autocast("cpu", torch.bfloat16):
                return METHODS[method](*rows, layout, group)

        cast = on_ranks(local, rows, [], layout, upstream, monkeypatch)
        plain = on_ranks(ours(method), [r.bfloat16() for r in rows], [], layout, upstream, monkeypatch)
        assert cast[0].dtype == torch.bfloat16 and cast[1].dtype == torch.float32
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(cast, plain))


def test_a_part_of_the_keys_contributes_its_part_of_the_gradient() -> None:
    """With out and lse over all keys, the gradients of two halves of the keys add up; fp64 and the kernel."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-2)):
        q, k, v, dout = (t.to(dtype) for t in tensors(20, torch.float64))
        cu = torch.tensor([0, 20], dtype=torch.int32)
        out, lse = ops.flash_attn_varlen_func(q, k, v, cu, cu, 20, 20, softcap=3.0, return_lse=True)
        want = on_one(
            lambda r, w, c: reference.attention(*r, c, c, None, None, D**-0.5, 3.0, -1, -1)[0],
            [t.double() for t in (q, k, v)],
            [],
            (0, 20),
            dout.double(),
        )[1:]
        parts = []
        for keys in (slice(0, 7), slice(7, 20)):
            cu_k = torch.tensor([0, keys.stop - keys.start], dtype=torch.int32)
            parts.append(attend_backward(dout, q, k[keys], v[keys], out, lse, cu, cu_k, D**-0.5, False, 3.0))
        assert all(t.dtype == dtype for part in parts for t in part)
        got = [parts[0][0] + parts[1][0], *(torch.cat([a, b]) for a, b in zip(parts[0][1:], parts[1][1:]))]
        assert_equal_to(want, got, tolerance, dtype)


def test_one_rank_gathers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cu = (0, 5, 5, 11)
    *rows, _ = tensors(11, torch.float32)
    starts = torch.tensor(cu, dtype=torch.int32)
    want = ops.flash_attn_varlen_func(*rows, starts, starts, 6, 6, causal=True)
    for method in METHODS:
        (got,) = run_ranks(
            1,
            lambda group, m=method: ContextParallel(ContextLayout(11, cu, 1), group, m).attention(*rows, (-1, -1)),
            monkeypatch,
        )
        assert torch.equal(got, want)
