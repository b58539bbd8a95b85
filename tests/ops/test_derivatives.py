"""Derivatives beyond `backward`: torch.func takes the ops, and what they cannot do is an error, never a zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from foldscan import ops
from torch.autograd import forward_ad

Op = Callable[[torch.Tensor], torch.Tensor]


def _ops() -> dict[str, Op]:
    torch.manual_seed(0)
    weight, scale, z = torch.randn(12, 8), torch.rand(8), torch.randn(6, 8)
    q, logits = torch.randn(1, 6, 2, 4), torch.randn(6, 3)
    angles = torch.rand(6, 4)
    up, down = torch.randn(3, 5, 8), torch.randn(3, 8, 5)
    return {
        "linear": lambda x: ops.linear(x, weight),
        "rmsnorm": lambda x: ops.rmsnorm_fn(x, scale, None, z, 1e-5, 4, False),
        "attention": lambda x: ops.flash_attn_func(q, x.view(1, 6, 2, 4), x.view(1, 6, 2, 4), causal=True),
        "rotary": lambda x: ops.rotary_embedding(x[:, None], angles.cos(), angles.sin(), torch.arange(6)),
        "moe": lambda x: ops.moe_mlp(x, *ops.topk_route(logits, 2), up, down, activation="relu2"),
    }


@pytest.mark.parametrize("name", _ops())
def test_func_grad_is_backward(name: str) -> None:
    op, x = _ops()[name], torch.randn(6, 8)
    leaf = x.clone().requires_grad_()
    op(leaf).square().sum().backward()
    assert torch.equal(torch.func.grad(lambda t: op(t).square().sum())(x), leaf.grad)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", _ops())
def test_forward_mode_is_refused(name: str, grad: bool) -> None:
    op, x = _ops()[name], torch.randn(6, 8)
    with torch.set_grad_enabled(grad):
        op(x)  # weights are packed by now: the quick path must not pass a tangent by either
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            op(forward_ad.make_dual(x, torch.ones_like(x)))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(op, (x,), (x,))


@pytest.mark.parametrize("name", _ops())
def test_second_derivatives_are_refused(name: str) -> None:
    op, x = _ops()[name], torch.randn(6, 8, requires_grad=True)
    (first,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), x)
