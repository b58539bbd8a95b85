"""Cross entropy and token statistics: fp64 truth, every gradient, confident rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foldscan import ops
from helpers import assert_close_to_truth, relative_rmse
from losses_cases import DTYPES, SHAPES, make_logits, problem, stats_oracle


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "H", "V"), SHAPES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cross_entropy_and_gradients(N: int, H: int, V: int, reduction: Any, dtype: torch.dtype) -> None:
    # Per-row upstream gradients with reduction "none": weight gradients must not have been summed before.
    hidden, weight, bias, targets = problem(N, H, V, dtype)

    def oracle(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        loss = -stats_oracle(h, w, b, targets)[0]
        return loss if reduction == "none" else loss.sum() / max(1, int((targets >= 0).sum()))

    grad = torch.randn(N) if reduction == "none" else torch.tensor(0.7)
    assert_close_to_truth(
        lambda h, w, b: ops.linear_cross_entropy(h, w, targets, b, reduction=reduction),
        oracle,
        (hidden, weight, bias),
        grad,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 0.05},
        {"softcap": 3.0},
        {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 5.0, "reduction": "sum"},
    ],
)
def test_smoothing_z_loss_softcap(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = problem(41, 24, 700, dtype)
    s, c, cap = (kwargs.get(k, 0.0) for k in ("label_smoothing", "z_loss", "softcap"))

    def oracle(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z = make_logits(h, w, b, cap)
        loss = F.cross_entropy(z, targets, reduction="none", label_smoothing=s)
        loss = loss + c * torch.logsumexp(z, -1) ** 2 * (targets >= 0)
        return loss.sum() / (1 if kwargs.get("reduction") == "sum" else 40)

    assert_close_to_truth(
        lambda h, w, b: ops.linear_cross_entropy(h, w, targets, b, **kwargs),
        oracle,
        (hidden, weight, bias),
        torch.tensor(1.3),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "H", "V"), SHAPES)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (0.7, 4.0)])
def test_token_stats_and_joint_gradient(
    N: int, H: int, V: int, temperature: float, softcap: float, dtype: torch.dtype
) -> None:
    hidden, weight, bias, targets = problem(N, H, V, dtype, seed=1)

    def ours(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack(ops.linear_logprob(h, w, targets, b, temperature=temperature, softcap=softcap))

    def oracle(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return stats_oracle(h, w, b, targets, temperature=temperature, softcap=softcap)

    assert_close_to_truth(ours, oracle, (hidden, weight, bias), torch.randn(4, N))


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_each_statistic_has_its_own_gradient(index: int) -> None:
    hidden, weight, bias, targets = problem(11, 9, 600, torch.float32, seed=2)
    assert_close_to_truth(
        lambda h, w, b: ops.linear_logprob(h, w, targets, b)[index],
        lambda h, w, b: stats_oracle(h, w, b, targets)[index],
        (hidden, weight, bias),
        torch.randn(11),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("margin", [4.0, 8.0, 14.0, 25.0, 60.0])
def test_true_class_gradient_of_confident_rows(margin: float, dtype: torch.dtype) -> None:
    # p of the target up to 1 - 1e-26: p - 1 must not be formed from a rounded p.
    V = 700
    hidden, weight = torch.eye(2, dtype=dtype), torch.zeros(V, 2, dtype=dtype)
    weight[300, 0], weight[5, 1] = margin, margin
    targets = torch.tensor([300, 5])
    h = hidden.clone().requires_grad_()
    loss = ops.linear_cross_entropy(h, weight, targets, reduction="none")
    loss.sum().backward()
    rest = (V - 1) * math.exp(-margin)
    assert loss.tolist() == pytest.approx([math.log1p(rest)] * 2, rel=1e-5)
    # dz of the target is -rest / (1 + rest); the other rows of weight are zero, so dhidden = margin * dz.
    assert h.grad is not None
    want = -margin * rest / (1 + rest)
    assert torch.diag(h.grad).tolist() == pytest.approx([want] * 2, rel=1e-5 if dtype == torch.float32 else 8e-3)
    bias = torch.zeros(V, requires_grad=True)
    ops.linear_cross_entropy(hidden[:1], weight, targets[:1], bias).backward()
    assert bias.grad is not None
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert bias.grad[300].item() == pytest.approx(want / margin, rel=tolerance, abs=0)


def test_entropy_of_confident_rows_keeps_its_digits() -> None:
    V = 500
    for margin in (10.0, 20.0, 40.0):
        weight = torch.zeros(V, 1)
        weight[123] = margin
        out = ops.linear_logprob(torch.ones(1, 1), weight, torch.tensor([0]))
        q = math.exp(-margin) / (1 + (V - 1) * math.exp(-margin))
        top = math.log1p((V - 1) * math.exp(-margin))
        entropy = (1 - (V - 1) * q) * top + (V - 1) * q * (margin + top)
        assert out.entropy.item() == pytest.approx(entropy, rel=1e-5)
        assert out.logp.item() == pytest.approx(-margin - top, rel=1e-6)


def test_weight_gradient_is_accumulated_in_fp32() -> None:
    # 4000 equal rows: a bf16 accumulator stops growing at 256 times a term.
    N, V = 4000, 8
    hidden, weight = torch.ones(N, 1, dtype=torch.bfloat16), torch.zeros(V, 1, dtype=torch.bfloat16, requires_grad=True)
    ops.linear_cross_entropy(hidden, weight, torch.zeros(N, dtype=torch.long), reduction="sum").backward()
    assert weight.grad is not None
    assert weight.grad[3].item() == pytest.approx(N / V, rel=5e-3)
    assert weight.grad[0].item() == pytest.approx(-N * (1 - 1 / V), rel=5e-3)


def test_weight_gradient_of_many_rows_keeps_its_digits() -> None:
    # One chain over 16384 rows would have a relative error of 2e-6.
    hidden, weight, _, targets = problem(16384, 8, 70, torch.float32)
    w, w64 = weight.clone().requires_grad_(), weight.double().requires_grad_()
    ops.linear_cross_entropy(hidden, w, targets).backward()
    F.cross_entropy(hidden.double() @ w64.T, targets).backward()
    assert w.grad is not None and w64.grad is not None
    assert relative_rmse(w.grad, w64.grad) < 8e-7


def test_loss_is_fp32_and_bf16_keeps_fp32_weight_gradients() -> None:
    hidden, weight, bias, targets = problem(30, 16, 300, torch.float32)
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = ops.linear_cross_entropy(hidden.bfloat16(), w, targets, b)
    loss.backward()
    assert loss.dtype == torch.float32
    assert w.grad is not None and w.grad.dtype == torch.float32
    assert b.grad is not None and b.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear_cross_entropy(hidden, w, targets, b), loss.detach())
    h = hidden.half().requires_grad_()
    half = ops.linear_cross_entropy(h, weight.half(), targets)
    half.backward()
    assert half.dtype == torch.float32
    assert h.grad is not None and h.grad.dtype == torch.float16
    truth = -stats_oracle(hidden.double(), weight.double(), None, targets)[0].sum() / 29
    assert relative_rmse(half, truth) < 2e-3


def test_common_logit_offsets_do_not_matter() -> None:
    hidden, weight, _, targets = problem(20, 8, 900, torch.float32)
    plain = ops.linear_logprob(hidden, weight, targets, torch.zeros(900))
    for offset in (-3000.0, 3000.0):
        moved = ops.linear_logprob(hidden, weight, targets, torch.full((900,), offset))
        # The logits themselves are rounded to 2^-12 there.
        for a, b in zip(plain[:3], moved[:3]):
            assert (a - b).abs().max() < 2e-3
        assert relative_rmse(moved.lse[targets >= 0] - offset, plain.lse[targets >= 0]) < 1e-3


def test_classes_at_minus_infinity_have_no_mass() -> None:
    hidden, weight, _, targets = problem(6, 8, 600, torch.float32)
    targets = targets.clamp(min=0) % 100
    bias = torch.zeros(600)
    bias[100:] = -math.inf
    a = ops.linear_logprob(hidden, weight, targets, bias)
    b = ops.linear_logprob(hidden, weight[:100], targets)
    for x, y in zip(a, b):
        assert relative_rmse(x, y) < 1e-6
    h = hidden.clone().requires_grad_()
    sum(v.sum() for v in ops.linear_logprob(h, weight, targets, bias)).backward()  # type: ignore[union-attr]
    assert h.grad is not None and h.grad.isfinite().all()
