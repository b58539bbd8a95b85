"""Error budgets instead of tolerances, and the checks that every registered op passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# Relative RMSE that rounding alone leaves: a few fp32 ulps of a long sum, half an ulp of a bf16 result.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def relative_rmse(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS of the error over the RMS of ``want`` (0 for empty tensors)."""
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    scale = want.square().mean().sqrt().item()
    error = (got - want).square().mean().sqrt().item()
    return error if scale == 0 else error / scale


def gradients(
    fn: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor | None], grad: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Output of ``fn(*inputs)`` and the gradient of every input for the upstream gradient ``grad``."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = fn(*leaves)
    out.backward(grad.to(out.dtype))
    return out.detach(), [None if t is None else t.grad for t in leaves]


def assert_budget(
    name: str,
    got: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    factor: float = 2.0,
    products: torch.dtype | None = None,
    floors: float = 1.0,
) -> None:
    """Our error against fp64 may be ``factor`` times that of the same formula in the same dtype, plus the floor.

    Args:
        products: the dtype that operands of products were rounded to, where an fp32 result is made of bf16 products.
        floors: how many floors to allow, for results that are few and each a long sum in which terms cancel.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(truth.shape)}"
    budget = factor * relative_rmse(eager, truth) + floors * max(FLOOR[got.dtype], FLOOR[products or got.dtype])
    error = relative_rmse(got, truth)
    assert error <= budget, f"{name}: relative RMSE {error:.2e} against fp64, budget {budget:.2e}"


def assert_close_to_truth(
    ours: Callable[..., torch.Tensor],
    oracle: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor | None],
    grad: torch.Tensor,
    factor: float = 2.0,
) -> None:
    """Forward and every input gradient of ``ours`` within the error budget set by ``oracle`` in fp64 and in dtype."""
    doubles = [None if t is None else t.double() for t in inputs]
    truth, truth_grads = gradients(oracle, doubles, grad.double())
    eager, eager_grads = gradients(oracle, inputs, grad)
    out, grads = gradients(ours, inputs, grad)
    assert_budget("output", out, eager, truth, factor)
    for i, (g, e, t) in enumerate(zip(grads, eager_grads, truth_grads)):
        if t is not None:
            assert g is not None and e is not None, f"gradient {i} is missing"
            assert_budget(f"gradient {i}", g, e, t, factor)


def check_op(
    op: Any,
    args: tuple[Any, ...],
    *,
    public: Callable[..., Any] | None = None,
    public_args: tuple[Any, ...] = (),
    public_kwargs: dict[str, Any] | None = None,
) -> None:
    """opcheck on the registered op, then the public function under ``torch.compile(fullgraph=True)``: same values."""
    torch.library.opcheck(op, args)
    if public is None:
        return
    kwargs = public_kwargs or {}
    eager = public(*public_args, **kwargs)
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")(*public_args, **kwargs)
    for a, b in zip(flatten(eager), flatten(compiled)):
        assert torch.equal(a, b)


def flatten(value: Any) -> list[torch.Tensor]:
    """The tensors in a tensor or a (nested) tuple, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value if v is not None for t in flatten(v)]
