"""Convolution with a halo: the bits of one rank, in documents that cross ranks and segments shorter than the halo."""

from __future__ import annotations

import pytest
import torch
from context_cases import BATCHES, SIZES, assert_equal_to, on_one, on_ranks
from foldscan import ops
from foldscan.parallel.context import ContextLayout, context_conv
from foldscan.parallel.groups import Group
from foldscan.reference import ssm as reference
from helpers import assert_budget

CHANNELS = 6


def tensors(total: int, width: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Rows, weight and bias, a gradient."""
    g = torch.Generator().manual_seed(total + width)
    shapes = ((total, CHANNELS), (CHANNELS, width), (CHANNELS,), (total, CHANNELS))
    x, weight, bias, upstream = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return [x], [weight, bias], upstream


def oracle(rows, weights, cu):
    return reference.causal_conv1d(rows[0].T[None], *weights, None, None, "silu", cu)[0].T


def local(rows, weights, layout, group):
    return context_conv(rows[0], *weights, layout, group)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", [2, 4, 8])
def test_equal_to_one_rank_in_fp64(width: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for cu in BATCHES:
        rows, weights, upstream = tensors(cu[-1], width, torch.float64)
        want = on_one(oracle, rows, weights, cu, upstream)
        for zigzag in (True, False):
            layout = ContextLayout(cu[-1], cu, size, zigzag)
            got = on_ranks(local, rows, weights, layout, upstream, monkeypatch)
            assert_equal_to(want, got, 1e-10, (cu, zigzag))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_one_rank_and_its_budget(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for cu in (*BATCHES, (0, 61, 64, 257)):
        rows, weights, upstream = tensors(cu[-1], 4, dtype)

        def single(rows, weights, cu):
            return ops.causal_conv1d_fn(rows[0].T[None], *weights, activation="silu", cu_seqlens=cu)[0].T

        want = on_one(single, rows, weights, cu, upstream)
        truth = on_one(oracle, [r.double() for r in rows], [w.double() for w in weights], cu, upstream.double())
        for size in (1, 2, 4, 8):
            layout = ContextLayout(cu[-1], cu, size)
            got = on_ranks(local, rows, weights, layout, upstream, monkeypatch)
            assert got[0].dtype == dtype and torch.equal(got[0], want[0]), (cu, size)
            again = on_ranks(local, rows, weights, layout, upstream, monkeypatch)
            assert all(torch.equal(a, b) for a, b in zip(got, again))
            for name, g, e, t in zip(("dx", "dweight", "dbias"), got[1:], want[1:], truth[1:]):
                assert_budget(f"{name} of {size} ranks, {cu}", g.to(dtype), e, t)


def test_columns_of_a_wider_tensor_and_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    cu = (0, 3, 21)
    rows, weights, upstream = tensors(21, 4, torch.float32)

    def with_a_view(rows, weights, layout, group):
        wider = torch.cat([rows[0], rows[0]], dim=1)
        return context_conv(wider[:, 3 : 3 + CHANNELS], weights[0], None, layout, group, None)

    def single(rows, weights, cu):
        wider = torch.cat([rows[0], rows[0]], dim=1)[:, 3 : 3 + CHANNELS]
        return ops.causal_conv1d_fn(wider.T[None], weights[0], cu_seqlens=cu)[0].T

    want = on_one(single, rows, weights[:1], cu, upstream)
    got = on_ranks(with_a_view, rows, weights[:1], ContextLayout(21, cu, 3), upstream, monkeypatch)
    assert_equal_to(want, got, 1e-5, cu)


def test_errors_name_the_argument() -> None:
    layout, group = ContextLayout(3, (0, 3), 1), Group("cp", (0,), 0)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 6\), want \(3, channels\)"):
        context_conv(torch.zeros(2, 6), torch.zeros(6, 4), None, layout, group)
    with pytest.raises(ValueError, match="group: got 1 ranks, want 4 as the layout has"):
        context_conv(torch.zeros(3, 6), torch.zeros(6, 4), None, ContextLayout(3, (0, 3), 4), group)
