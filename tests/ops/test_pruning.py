"""Channel scores, group selection, 2:4 masks and the compressed linear layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foldscan import ops
from foldscan.ops.pruning import REDUCTIONS
from foldscan.reference import pruning as reference
from helpers import assert_close_to_truth, check_op, relative_rmse
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16]


def compressed(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, ops.Compressed24]:
    weight = torch.randn(n, k).to(dtype)
    mask = ops.sparsity_mask_2_4(weight)
    return weight, mask, ops.compress_2_4(weight, mask)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_channel_scores_are_their_formulas(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 17, 5, 13) + 0.5).to(dtype)
    wide = x.double()
    formulas = {
        ("mean_abs", "l2"): wide.abs().mean(1).square().sum(0).sqrt(),
        ("mean_abs", "mean"): wide.abs().mean(1).mean(0),
        ("l2", "l2"): wide.square().sum((0, 1)).sqrt(),
        ("l2", "mean"): wide.square().sum(1).sqrt().mean(0),
    }
    assert set(formulas) == set(REDUCTIONS)
    for reduce, want in formulas.items():
        got = ops.channel_scores(x, reduce=reduce)
        assert got.dtype == torch.float64 and got.shape == (5, 13)
        assert relative_rmse(got, want) < 1e-14, reduce
    assert torch.equal(ops.channel_scores(x), ops.channel_scores(x, reduce=("mean_abs", "l2")))


def test_channel_scores_of_views_and_of_nothing() -> None:
    x = torch.randn(2, 9, 130, dtype=torch.float32)
    assert torch.equal(ops.channel_scores(x.transpose(1, 2))[3], ops.channel_scores(x.transpose(1, 2).contiguous())[3])
    assert torch.equal(ops.channel_scores(x[..., 1::2]), ops.channel_scores(x[..., 1::2].contiguous()))
    assert ops.channel_scores(torch.zeros(0, 4, 3)).tolist() == [0, 0, 0]
    assert ops.channel_scores(torch.zeros(2, 0, 3), reduce=("l2", "mean")).tolist() == [0, 0, 0]
    assert ops.channel_scores(torch.zeros(2, 4, 0)).shape == (0,)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_group_topk_mask(data: st.DataObject) -> None:
    groups, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    keep = data.draw(st.integers(0, size))
    # Few different values: most selections are decided by ties.
    scores = torch.tensor(
        data.draw(st.lists(st.integers(-2, 2), min_size=groups * size, max_size=groups * size))
    ).float()
    mask = ops.group_topk_mask(scores, groups, keep)
    for g in range(groups):
        members = list(range(g * size, (g + 1) * size))
        best = sorted(members, key=lambda i: (-scores[i].item(), i))[:keep]
        assert mask[members].nonzero()[:, 0].tolist() == sorted(i - g * size for i in best)
    order = torch.randperm(groups * size)
    numbers = torch.arange(groups).repeat_interleave(size)[order]
    shuffled = ops.group_topk_mask(scores[order], numbers.int(), keep)
    assert torch.equal(shuffled, reference.group_topk_mask(scores[order], numbers, groups, keep))


def test_group_topk_mask_refuses() -> None:
    scores = torch.zeros(6)
    for match, args in (
        ("groups: got 4", (scores, 4, 1)),
        ("groups: got 0", (scores, 0, 1)),
        ("groups: got -1", (scores, torch.tensor([0, 0, -1, 0, 0, 0]), 1)),
        ("groups: got shape", (scores, torch.zeros(5, dtype=torch.long), 1)),
        ("keep: got 4", (scores, 2, 4)),
        ("keep: got 2", (scores, torch.tensor([0, 0, 0, 0, 0, 1]), 2)),
        ("scores: got NaN", (scores.log() - scores.log(), 2, 1)),
        ("scores: got shape", (scores[None], 1, 1)),
    ):
        with pytest.raises(ValueError, match=match):
            ops.group_topk_mask(*args)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_mask_keeps_the_two_best_of_four(dtype: torch.dtype) -> None:
    weight = torch.randint(-2, 3, (37, 44)).to(dtype)
    for scores in (None, torch.randint(-2, 3, (37, 44)).to(dtype)):
        mask = ops.sparsity_mask_2_4(weight, scores)
        assert torch.equal(mask, reference.sparsity_mask_2_4(weight.abs() if scores is None else scores))
        for r, c in ((0, 0), (36, 40), (12, 8)):
            four = (weight.abs() if scores is None else scores)[r, c : c + 4].tolist()
            best = sorted(range(4), key=lambda i: (-four[i], i))[:2]
            assert mask[r, c : c + 4].nonzero()[:, 0].tolist() == sorted(best)
    nan = torch.full((1, 4), float("nan"), dtype=dtype)
    assert ops.sparsity_mask_2_4(nan).sum() == 2


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(1, 4), (3, 8), (70, 12), (130, 260), (5, 0), (0, 8)])
def test_compress_and_back(n: int, k: int, dtype: torch.dtype) -> None:
    weight, mask, c = compressed(n, k, dtype)
    panels = -(-n // 64)
    assert c.values.shape == (panels, k // 2, 64) and c.codes.shape == (panels, -(-k // 8), 64)
    assert torch.equal(c.to_dense(), weight * mask)
    values, codes = reference.compress_2_4(weight, mask)
    assert torch.equal(values, c.values) and torch.equal(codes, c.codes)


SHAPES = [(1, 1, 4), (1, 200, 300), (7, 65, 132), (0, 8, 8), (193, 257, 516), (2, 3, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_linear_forward_and_gradients(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    weight, mask, c = compressed(n, k, dtype)
    x, b, grad = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)

    def oracle(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.linear(x, (weight * mask).to(x.dtype), b)

    assert_close_to_truth(lambda x, b: ops.linear_2_4(x, c, b), oracle, (x, b), grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_has_the_bits_of_the_dense_layer_for_any_rows_and_threads(dtype: torch.dtype) -> None:
    weight, mask, c = compressed(333, 700, dtype)
    x, b = torch.randn(411, 700).to(dtype), torch.randn(333)
    full = ops.linear_2_4(x, c, b)
    assert torch.equal(full, ops.linear(x, weight * mask, b))
    torch.set_num_threads(1)
    assert torch.equal(full, ops.linear_2_4(x, c, b))
    torch.set_num_threads(2)
    for rows in (slice(0, 1), slice(191, 193), slice(410, 411), slice(5, 300)):
        assert torch.equal(full[rows], ops.linear_2_4(x[rows], c, b))


def test_mixed_precision_views_fp16_and_autocast() -> None:
    weight, mask, c = compressed(40, 24, torch.float32)
    x = torch.randn(2, 24, 3).bfloat16().transpose(1, 2).requires_grad_()
    out = ops.linear_2_4(x, c)
    rounded = ops.compress_2_4(weight.bfloat16(), mask)
    assert torch.equal(out, ops.linear_2_4(x.contiguous(), rounded))
    assert torch.autograd.grad(out.sum(), x)[0].dtype == torch.bfloat16
    half = ops.linear_2_4(x.half(), ops.compress_2_4(weight.half(), mask))
    assert half.dtype == torch.float16
    assert relative_rmse(half, F.linear(x.double(), (weight.half() * mask).double())) < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear_2_4(x.float(), c).dtype == torch.bfloat16
    with ops.backend("reference"):
        assert relative_rmse(ops.linear_2_4(x.float(), c), F.linear(x.double(), (weight * mask).double())) < 1e-6


def test_bad_arguments_are_named() -> None:
    weight, mask, c = compressed(8, 16, torch.float32)
    x = torch.zeros(2, 16)
    grad = ops.Compressed24(c.values.clone().requires_grad_(), c.codes, 8)
    wrong_codes = ops.Compressed24(c.values, c.codes[:, :1], 8)
    narrow = ops.Compressed24(c.values.bfloat16(), c.codes, 8)
    for error, match, call in (
        (NotImplementedError, "compressed: its values require a gradient", lambda: ops.linear_2_4(x, grad)),
        (TypeError, "compressed: got Tensor", lambda: ops.linear_2_4(x, c.values)),
        (ValueError, "x: got shape", lambda: ops.linear_2_4(x[:, :8], c)),
        (ValueError, "bias: got shape", lambda: ops.linear_2_4(x, c, torch.zeros(9))),
        (ValueError, "compressed.codes", lambda: ops.linear_2_4(x, wrong_codes)),
        (TypeError, "compressed: got dtype", lambda: ops.linear_2_4(x, narrow)),
        (ValueError, "weight: got shape", lambda: ops.sparsity_mask_2_4(weight[:, :6])),
        (ValueError, "scores: got shape", lambda: ops.sparsity_mask_2_4(weight, weight[:4])),
        (ValueError, "mask: got a group", lambda: ops.compress_2_4(weight, torch.ones_like(mask))),
        (TypeError, "mask: got dtype", lambda: ops.compress_2_4(weight, mask.int())),
        (ValueError, "x: got shape", lambda: ops.channel_scores(x)),
        (ValueError, "reduce: got", lambda: ops.channel_scores(x[None], reduce=("l2", "max"))),
    ):
        with pytest.raises(error, match=match):
            call()


def test_opcheck_and_compile() -> None:
    weight, mask, c = compressed(6, 20, torch.float32)
    x, b = torch.randn(5, 20, requires_grad=True), torch.randn(6, requires_grad=True)
    foldscan = torch.ops.foldscan
    check_op(foldscan.linear_2_4, (x, *c, b), public=ops.linear_2_4, public_args=(x, c, b))
    check_op(
        foldscan.compress_2_4,
        (weight, mask),
        public=lambda w, m: ops.compress_2_4(w, m)[:2],
        public_args=(weight, mask),
    )
    check_op(foldscan.sparsity_mask_2_4, (weight, True), public=ops.sparsity_mask_2_4, public_args=(weight,))
    groups = torch.tensor([0, 1, 1, 0])
    scores = torch.randn(4)
    check_op(
        foldscan.group_topk_mask,
        (scores.double(), groups, 2, 1),
        public=ops.group_topk_mask,
        public_args=(scores, 2, 1),
    )
    state = torch.zeros(8, 20, dtype=torch.float64)
    check_op(
        foldscan.score_update,
        (x.detach(), torch.tensor([0, 2, 5]).int(), True, state),
        public=ops.channel_scores,
        public_args=(x.detach()[None],),
    )
