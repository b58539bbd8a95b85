"""linear: fp64 truth, gradients, bits that do not depend on rows or threads, caching, registration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foldscan import ops
from helpers import assert_close_to_truth, check_op, relative_rmse

SHAPES = [
    (1, 1, 1),
    (1, 64, 64),
    (7, 13, 5),
    (0, 8, 8),
    (97, 130, 33),
    (200, 65, 515),
    (3, 7, 0),
    (5, 150, 20),
    (97, 300, 9),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_forward_and_gradients(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    grad = torch.randn(m, n).to(dtype)
    assert_close_to_truth(ops.linear, F.linear, (x, w, b), grad)


def test_bf16_input_keeps_fp32_weight_gradient() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(50, 40).bfloat16(), torch.randn(30, 40, requires_grad=True)
    out = ops.linear(x, w)
    assert out.dtype == torch.bfloat16
    grad = torch.randn(50, 30).bfloat16()
    out.backward(grad)
    assert w.grad is not None and w.grad.dtype == torch.float32
    assert relative_rmse(w.grad, grad.double().T @ x.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_with_any_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(211, 700).to(dtype), torch.randn(333, 700).to(dtype), torch.randn(333).to(dtype)
    full = ops.linear(x, w, b)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(full, ops.linear(x, w, b))
    finally:
        torch.set_num_threads(threads)
    for i in (0, 95, 96, 210):
        assert torch.equal(full[i : i + 1], ops.linear(x[i : i + 1], w, b))
    # The path with gradients packs anew: same bits as the cached one.
    assert torch.equal(full, ops.linear(x, w.clone().requires_grad_(), b).detach())


def test_views_autocast_and_fp16() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 40, 17).transpose(2, 3), torch.randn(40, 21).T
    assert relative_rmse(ops.linear(x, w), F.linear(x.double(), w.double())) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, w).dtype == torch.bfloat16
    half = ops.linear(x.half(), w.half())
    assert half.dtype == torch.float16
    assert relative_rmse(half, F.linear(x.half().double(), w.half().double())) < 1e-3


def test_the_packed_weight_follows_changes_of_the_weight() -> None:
    x, w = torch.ones(1, 4), torch.ones(2, 4)
    assert ops.linear(x, w).tolist() == [[4.0, 4.0]]
    w.mul_(2)
    assert ops.linear(x, w).tolist() == [[8.0, 8.0]]


@pytest.mark.parametrize("fused", [False, True])
def test_the_packed_weight_follows_optimizers(fused: bool) -> None:
    """Fused optimizers change a parameter without raising its version counter."""
    w = torch.nn.Parameter(torch.ones(2, 4))
    optimizer = torch.optim.AdamW([w], lr=0.5, fused=fused)
    x = torch.ones(1, 4)
    with torch.no_grad():
        assert ops.linear(x, w).tolist() == [[4.0, 4.0]]
    ops.linear(x, w).sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(ops.linear(x, w), ops.linear(x, w.clone()))
        w.data.fill_(3.0)
        ops.clear_packed_weights()
        assert ops.linear(x, w).tolist() == [[12.0, 12.0]]


def test_long_sums_keep_their_digits() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(30, 20000), torch.randn(40, 20000)
    want = F.linear(x.double(), w.double())
    assert relative_rmse(ops.linear(x, w), want) < 1e-6


def test_bad_arguments_are_named() -> None:
    x, w = torch.zeros(2, 4), torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 4\)"):
        ops.linear(x, w)
    with pytest.raises(ValueError, match="bias"):
        ops.linear(torch.zeros(2, 5), w, torch.zeros(4))
    with pytest.raises(TypeError, match="weight: got dtype int64"):
        ops.linear(x, torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="weight: got dtype"):
        ops.linear(x, torch.zeros(3, 4).bfloat16())


def test_opcheck_and_compile() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8, requires_grad=True)
    w, b = torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True)
    check_op(torch.ops.foldscan.linear, (x, w, b), public=ops.linear, public_args=(x, w, b))


def test_gradcheck() -> None:
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (2, 4), (2,)))
    assert torch.autograd.gradcheck(ops.linear, (x, w, b))
