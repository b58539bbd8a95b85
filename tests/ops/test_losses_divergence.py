"""Divergences: fp64 truth, gradients, near convergence and far from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from foldscan import ops
from helpers import assert_close_to_truth, relative_rmse
from losses_cases import DTYPES, kl_oracle, problem


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("direction", "beta"), [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
@pytest.mark.parametrize(("N", "H", "V"), [(1, 3, 2), (37, 17, 1031), (0, 4, 10), (100, 6, 256)])
def test_divergences_and_gradients(N: int, H: int, V: int, direction: Any, beta: float, dtype: torch.dtype) -> None:
    hidden, weight, _, _ = problem(N, H, V, dtype)
    teacher_hidden, teacher_weight, _, _ = problem(N, H + 2, V, dtype, seed=3)
    mask = torch.arange(N) % 3 != 1

    def ours(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ops.linear_kl_div(
            h,
            w,
            teacher_hidden,
            teacher_weight,
            direction=direction,
            beta=beta,
            temperature=1.7,
            mask=mask,
            reduction="none",
        )

    def oracle(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        loss = kl_oracle(h, w, teacher_hidden.to(h.dtype), teacher_weight.to(h.dtype), direction, beta, 1.7)
        return torch.where(mask, loss, torch.zeros_like(loss))

    assert_close_to_truth(ours, oracle, (hidden, weight), torch.randn(N))


def test_jsd_ends_are_the_divergences_and_reductions_count_rows() -> None:
    hidden, weight, _, _ = problem(9, 5, 40, torch.float32)
    teacher = problem(9, 5, 40, torch.float32, seed=3)[:2]
    mask = torch.arange(9) < 4

    def kl(**kwargs: Any) -> torch.Tensor:
        return ops.linear_kl_div(hidden, weight, *teacher, **kwargs)

    assert torch.equal(kl(direction="jsd", beta=0.0), kl(direction="forward"))
    assert torch.equal(kl(direction="jsd", beta=1.0), kl(direction="reverse"))
    rows = kl(reduction="none", mask=mask)
    assert rows[4:].abs().sum() == 0
    assert kl(mask=mask).item() == pytest.approx(rows.sum().item() / 4)
    assert kl(mask=mask, reduction="sum").item() == pytest.approx(rows.sum().item())
    assert kl(mask=torch.zeros(9, dtype=torch.bool)).item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_gradient_near_convergence_keeps_its_digits(direction: Any, dtype: torch.dtype) -> None:
    # Teacher and student differ by a hundredth in a few directions: pS - pT is a small difference of equal numbers.
    hidden, weight, _, _ = problem(16, 32, 2000, dtype)
    teacher_hidden = (hidden.float() * 1.01).to(dtype)

    def run(fn: Callable[..., torch.Tensor], cast: torch.dtype) -> torch.Tensor:
        h = hidden.to(cast).clone().requires_grad_()
        fn(h, weight.to(cast), teacher_hidden.to(cast)).sum().backward()
        assert h.grad is not None
        return h.grad

    truth = run(lambda h, w, t: kl_oracle(h, w, t, w, direction, 0.5, 1.0), torch.float64)
    got = run(lambda h, w, t: ops.linear_kl_div(h, w, t, w, direction=direction, reduction="none"), dtype)
    # bf16: dlogits are rounded once as operands and the result once.
    assert relative_rmse(got, truth) < (1e-3 if dtype == torch.float32 else 6e-3)
