"""ScoreAccumulator: formulas, streaming, merging, hard data, resuming."""

from __future__ import annotations

import pytest
import torch
from foldscan import ops
from foldscan.ops.pruning import REDUCTIONS
from foldscan.pruning import ScoreAccumulator
from helpers import relative_rmse

DTYPES = [torch.float32, torch.bfloat16]


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def everything(a: ScoreAccumulator) -> list[torch.Tensor]:
    return [a.mean_abs(), a.l2(), a.mean(), a.variance(), *(a.scores(r) for r in REDUCTIONS)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_over_packed_sequences(dtype: torch.dtype) -> None:
    x = (torch.randn(60, 3, 7) * 2 + 1).to(dtype)
    a = ScoreAccumulator((3, 7))
    a.update(x, cu([20, 0, 39, 1]))
    wide = x.double()
    assert (a.tokens, a.sequences) == (60, 3)
    for got, want in (
        (a.mean_abs(), wide.abs().mean(0)),
        (a.l2(), wide.norm(dim=0)),
        (a.mean(), wide.mean(0)),
        (a.variance(), wide.var(0, correction=0)),
        (a.scores(), torch.stack([s.abs().mean(0) for s in wide.split([20, 39, 1])]).norm(dim=0)),
    ):
        assert got.shape == (3, 7) and relative_rmse(got, want) < 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
def test_how_the_stream_is_cut_does_not_change_a_bit(dtype: torch.dtype) -> None:
    x = torch.randn(6, 50, 100).to(dtype)
    whole, pieces, packed = (ScoreAccumulator(100) for _ in range(3))
    whole.update(x)
    for part in x.split([1, 3, 0, 2]):
        pieces.update(part)
    torch.set_num_threads(1)
    packed.update(x.flatten(0, 1), cu([50] * 6))
    torch.set_num_threads(2)
    for a, b, c in zip(everything(whole), everything(pieces), everything(packed)):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(whole.scores(), ops.channel_scores(x))


def test_merging_equals_one_stream() -> None:
    x = torch.randn(9, 20, 30) + torch.randn(30) * 10
    whole, empty, parts = ScoreAccumulator(30), ScoreAccumulator(30), [ScoreAccumulator(30) for _ in range(3)]
    whole.update(x)
    for part, data in zip(parts, x.split(3)):
        part.update(data)
    merged = ScoreAccumulator(30)
    for other in (empty, *parts, empty):
        merged.merge(other)
    assert (merged.tokens, merged.sequences) == (180, 9)
    for a, b in zip(everything(merged), everything(whole)):
        assert relative_rmse(a, b) < 1e-13


def test_variance_survives_a_large_common_offset() -> None:
    offset = torch.tensor([1e6, -3e5])
    x = torch.randn(1, 4000, 2) + offset
    a = ScoreAccumulator(2)
    a.update(x)
    assert relative_rmse(a.variance(), (x.double()[0] - offset).var(0, correction=0)) < 1e-12
    constant = ScoreAccumulator(1)
    constant.update(torch.full((1, 1000, 1), 0.1))
    assert constant.variance().item() == 0.0


def test_small_terms_are_not_lost_in_long_sums() -> None:
    # In fp32 (or bf16) a sum of 2^25 would no longer grow by 1.
    a = ScoreAccumulator(1)
    a.update(torch.tensor([2.0**25, *[1.0] * 64]).bfloat16()[None, :, None])
    assert a.mean_abs().item() * 65 == 2.0**25 + 64


def test_state_dict_resumes() -> None:
    x = torch.randn(4, 10, 6)
    whole, first = ScoreAccumulator(6), ScoreAccumulator(6)
    whole.update(x)
    first.update(x[:2])
    second = ScoreAccumulator(6)
    second.load_state_dict(first.state_dict())
    second.update(x[2:])
    for a, b in zip(everything(second), everything(whole)):
        assert torch.equal(a, b)


def test_backends_agree_and_nothing_gives_zeros() -> None:
    x = torch.randn(3, 8, 5)
    native, slow = ScoreAccumulator(5), ScoreAccumulator(5)
    native.update(x)
    with ops.backend("reference"):
        slow.update(x)
    for a, b in zip(everything(native), everything(slow)):
        assert relative_rmse(a, b) < 1e-13
    empty = ScoreAccumulator(5)
    empty.update(torch.zeros(2, 0, 5))
    assert all((t == 0).all() for t in everything(empty)) and empty.sequences == 0
    empty.update(x)  # the shift is taken from the first token that comes
    for a, b in zip(everything(empty), everything(native)):
        assert torch.equal(a, b)


def test_bad_arguments_are_named() -> None:
    a = ScoreAccumulator((2, 3))
    before = everything(a)
    for match, args in (
        (r"x: got shape \(4, 2, 3\), want \(batch, seqlen", (torch.zeros(4, 2, 3),)),
        (r"x: got shape", (torch.zeros(4, 5, 3, 2),)),
        (r"x: got shape \(1, 4, 2, 3\), want \(tokens", (torch.zeros(1, 4, 2, 3), cu([4]))),
        (r"cu_seqlens", (torch.zeros(4, 2, 3), cu([5]))),
    ):
        with pytest.raises(ValueError, match=match):
            a.update(*args)
    with pytest.raises(ValueError, match="other: got channels"):
        a.merge(ScoreAccumulator(6))
    with pytest.raises(ValueError, match="state"):
        a.load_state_dict({"state": torch.zeros(8, 5, dtype=torch.float64), "tokens": 0, "sequences": 0})
    assert all(torch.equal(x, y) for x, y in zip(before, everything(a)))
