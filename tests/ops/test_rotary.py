"""Rotary embedding against complex rotation, its gradient, and joined linear layers against separate ones."""

import pytest
import torch
from foldscan import ops
from helpers import relative_rmse


def angles(length: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(length)[:, None] * 0.3 ** torch.arange(r)
    return angle.cos(), angle.sin()


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, pairs: bool
) -> torch.Tensor:
    """Every pair of features as a complex number, one feature at a time."""
    out, r = x.double().clone(), cos.shape[1]
    for i in range(r):
        a, b = (2 * i, 2 * i + 1) if pairs else (i, i + r)
        turn = torch.complex(cos[positions, i].double(), sin[positions, i].double())[:, None]
        both = torch.complex(x[..., a].double(), x[..., b].double()) * turn
        out[..., a], out[..., b] = both.real, both.imag
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape,r", [((7, 3, 8), 4), ((1, 1, 130), 17), ((5, 4, 64), 32), ((0, 2, 4), 1)])
def test_rotation(shape: tuple[int, ...], r: int, interleaved: bool, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    cos, sin = angles(50, r)
    positions = torch.randint(50, (shape[0],))
    got = ops.rotary_embedding(x, cos, sin, positions, interleaved=interleaved)
    assert got.dtype == dtype
    budget = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    assert relative_rmse(got, rotated(x, cos, sin, positions, interleaved)) < budget
    strided = torch.randn(shape[0], shape[1], 2 * shape[2]).to(dtype)[..., ::2].copy_(x)
    assert torch.equal(ops.rotary_embedding(strided, cos, sin, positions.int(), interleaved=interleaved), got)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_turns_back(interleaved: bool) -> None:
    cos, sin = angles(9, 3)
    positions = torch.tensor([0, 8, 3, 3, 5])
    x, dout = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.detach().clone().to(dtype).requires_grad_()
        ops.rotary_embedding(leaf, cos, sin, positions, interleaved=interleaved).backward(dout.to(dtype))
        assert leaf.grad is not None
        found.append(leaf.grad)
    assert relative_rmse(*found) < 1e-6
    torch.library.opcheck(
        torch.ops.foldscan.rotary, (x.requires_grad_(), cos.float(), sin.float(), positions.int(), interleaved)
    )


def test_rotary_refuses() -> None:
    x, (cos, sin), positions = torch.randn(3, 2, 8), angles(9, 4), torch.arange(3)
    for match, args in (
        ("cos: got 4", (x[..., :6], cos, sin, positions)),
        ("sin", (x, cos, sin[:5], positions)),
        ("positions", (x, cos, sin, positions[:2])),
        ("x: got shape", (x[0], cos, sin, positions)),
    ):
        with pytest.raises(ValueError, match=match):
            ops.rotary_embedding(*args)
    with pytest.raises(TypeError, match="positions"):
        ops.rotary_embedding(x, cos, sin, positions.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 33])
def test_joined_layers_have_the_bits_of_separate_ones(rows: int, bias: bool, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 45).to(dtype)
    weights = [torch.randn(n, 45).to(dtype) for n in (17, 64, 3)]
    biases = [torch.randn(w.shape[0]).to(dtype) if bias else None for w in weights]

    def separate() -> torch.Tensor:
        return torch.cat([ops.linear(x, w, b) for w, b in zip(weights, biases)], -1)

    assert torch.equal(ops.linear_joined(x, weights, biases), separate())
    for w in weights:  # the packed form notices a change of each of them
        before = ops.linear_joined(x, weights, biases)
        w.mul_(2.0)
        assert torch.equal(ops.linear_joined(x, weights, biases), separate())
        assert rows == 0 or not torch.equal(separate(), before)


def test_joined_layers_have_gradients() -> None:
    x = torch.randn(6, 20, requires_grad=True)
    weights = [torch.randn(n, 20, requires_grad=True) for n in (4, 9)]
    grads = []
    for run in (lambda: ops.linear_joined(x, weights), lambda: torch.cat([ops.linear(x, w) for w in weights], -1)):
        grads.append(torch.autograd.grad(run().square().sum(), [x, *weights]))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
