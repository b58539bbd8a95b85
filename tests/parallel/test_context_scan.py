"""State passing between ranks: equal to the recurrence, token by token, on one rank that has the whole batch."""

from __future__ import annotations

import pytest
import torch
from context_cases import BATCHES, SIZES, assert_equal_to, on_one, on_ranks
from foldscan import ops
from foldscan.parallel.context import ContextLayout, context_scan
from foldscan.parallel.groups import Group
from foldscan.reference import ssm as reference
from helpers import assert_budget

HEADS, GROUPS, P, N = 4, 2, 3, 5
LIMIT = (0.02, 1.5)
OPTIONS = {"dt_softplus": True, "dt_limit": LIMIT}
NAMES = ("y", "dx", "ddt", "dB", "dC", "dz", "dA", "dD", "dbias")


def tensors(total: int, dtype: torch.dtype, decay: float = 1.0) -> tuple[list, list, torch.Tensor]:
    """x, dt, B, C, z; A, D, dt_bias; a gradient. ``decay`` is the size of A: a small one remembers long."""
    g = torch.Generator().manual_seed(total)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = [
        draw(total, HEADS, P),
        draw(total, HEADS),
        draw(total, GROUPS, N),
        draw(total, GROUPS, N),
        draw(total, HEADS, P),
    ]
    parameters = [-decay * draw(HEADS).exp(), draw(HEADS), draw(HEADS)]
    wide = torch.promote_types(dtype, torch.float32)
    return [r.to(dtype) for r in rows], [w.to(wide) for w in parameters], draw(total, HEADS, P).to(dtype)


def oracle(rows, weights, cu):
    x, dt, B, C, z = (r[None] for r in rows)
    A, D, bias = weights
    return reference.chunk_scan(x, dt, A, B, C, D, z, bias, None, None, cu, True, LIMIT)[0][0]


def single(rows, weights, cu):
    x, dt, B, C, z = (r[None] for r in rows)
    A, D, bias = weights
    return ops.mamba_chunk_scan_combined(x, dt, A, B, C, D=D, z=z, dt_bias=bias, cu_seqlens=cu, **OPTIONS)[0]


def local(rows, weights, layout, group):
    x, dt, B, C, z = rows
    A, D, bias = weights
    return context_scan(x, dt, A, B, C, layout, group, D=D, z=z, dt_bias=bias, **OPTIONS)


@pytest.mark.parametrize("size", SIZES)
def test_equal_to_the_recurrence_in_fp64(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for cu in BATCHES:
        rows, weights, upstream = tensors(cu[-1], torch.float64, decay=0.1)
        want = on_one(oracle, rows, weights, cu, upstream)
        for zigzag in (True, False):
            layout = ContextLayout(cu[-1], cu, size, zigzag)
            got = on_ranks(local, rows, weights, layout, upstream, monkeypatch)
            assert_equal_to(want, got, 1e-10, (cu, zigzag))


def test_plain_arguments_and_gradients_of_some_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No D, z, bias or softplus; A and dt without gradient."""
    cu = (0, 3, 37)
    rows, (A, _, _), upstream = tensors(37, torch.float64)
    dt = rows[1].abs() * 0.1

    def here(rows, weights, layout, group):
        return context_scan(rows[0], dt[layout.indices(group.index)], A, rows[1], rows[2], layout, group)

    def whole(rows, weights, cu):
        x, B, C = (r[None] for r in rows)
        return reference.chunk_scan(x, dt[None], A, B, C, cu_seqlens=cu)[0][0]

    some = [rows[0], *rows[2:4]]
    want = on_one(whole, some, [], cu, upstream)
    for size in (2, 4):
        got = on_ranks(here, some, [], ContextLayout(37, cu, size), upstream, monkeypatch)
        assert_equal_to(want, got, 1e-10, size)


@pytest.mark.parametrize("decay", [0.001, 1.0, 30.0])
def test_long_documents_in_fp32(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that live for thousands of tokens, and decays whose product over a segment underflows."""
    for cu in (*BATCHES, (0, 2200), (0, 700, 701, 2100)):
        rows, weights, upstream = tensors(cu[-1], torch.float32, decay)
        doubles = [r.double() for r in rows], [w.double() for w in weights]
        truth = on_one(oracle, *doubles, cu, upstream.double())
        eager = on_one(single, rows, weights, cu, upstream)
        for size in (2, 4) if cu[-1] > 100 else (4, 8):
            layout = ContextLayout(cu[-1], cu, size, zigzag=size != 4)
            got = on_ranks(local, rows, weights, layout, upstream, monkeypatch)
            assert_equal_to(truth[:1], got[:1], 1e-5, (cu, size))
            for name, g, e, t in zip(NAMES, got, eager, truth):
                assert_budget(f"{name} of {size} ranks, {cu}", g.float(), e.float(), t, floors=2)


def test_bf16_stays_in_the_budget_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    cu = (0, 31, 300)
    rows, weights, upstream = tensors(300, torch.bfloat16, 0.1)
    truth = on_one(oracle, [r.double() for r in rows], [w.double() for w in weights], cu, upstream.double())
    eager = on_one(single, rows, weights, cu, upstream)
    for size in (2, 4, 8):
        layout = ContextLayout(300, cu, size)
        got = on_ranks(local, rows, weights, layout, upstream, monkeypatch)
        assert got[0].dtype == torch.bfloat16
        for name, g, e, t in zip(NAMES, got, eager, truth):
            assert_budget(f"{name} of {size} ranks", g.to(e.dtype), e, t, products=torch.bfloat16)
        again = on_ranks(local, rows, weights, layout, upstream, monkeypatch)
        assert all(torch.equal(a, b) for a, b in zip(got, again))


def test_autocast_does_not_reach_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    cu = (0, 50)
    rows, weights, upstream = tensors(50, torch.float32, 0.1)

    def cast(rows, weights, layout, group):
        with torch.autocast("cpu", torch.bfloat16):
            return local(rows, weights, layout, group)

    layout = ContextLayout(50, cu, 4)
    got, want = (on_ranks(f, rows, weights, layout, upstream, monkeypatch) for f in (cast, local))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_one_rank_has_the_bits_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    cu = (0, 5, 5, 40)
    rows, weights, upstream = tensors(40, torch.float32)
    want = on_one(single, rows, weights, cu, upstream)
    got = on_ranks(local, rows, weights, ContextLayout(40, cu, 1), upstream, monkeypatch)
    assert torch.equal(got[0], want[0])
    assert_equal_to(want, got, 1e-5, cu)


def test_errors_name_the_argument() -> None:
    rows, weights, _ = tensors(3, torch.float32)
    layout, group = ContextLayout(3, (0, 3), 1), Group("cp", (0,), 0)
    with pytest.raises(ValueError, match=r"B: got shape \(2, 2, 5\), want \(3, any, any\)"):
        local([*rows[:2], rows[2][:2], *rows[3:]], weights, layout, group)
    with pytest.raises(ValueError, match="group: got 1 ranks, want 2"):
        local(rows, weights, ContextLayout(3, (0, 3), 2), group)
