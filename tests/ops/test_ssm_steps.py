"""selective_state_update, selective_scan_fn, rmsnorm_fn and the fused Mamba-2 block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foldscan import ops
from foldscan.reference import ssm as reference
from helpers import assert_budget, assert_close_to_truth, check_op
from hypothesis import given, settings
from hypothesis import strategies as st


def update_inputs(dtype: torch.dtype, tied: bool, state_dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    b, h, p, g, n = 3, 4, 17, 2, 21
    a, dt, bias, d = -torch.rand(h) - 0.1, torch.randn(b, h), torch.randn(h), torch.randn(h)
    return {
        "state": torch.randn(5, h, p, n).to(state_dtype),
        "x": torch.randn(b, h, p).to(dtype),
        "dt": dt[..., None].expand(b, h, p) if tied else torch.randn(b, h, p),
        "A": a[:, None, None].expand(h, p, n) if tied else -torch.rand(h, p, n),
        "B": torch.randn(b, g, n).to(dtype),
        "C": torch.randn(b, g, n).to(dtype),
        "D": d[:, None].expand(h, p) if tied else torch.randn(h, p),
        "z": torch.randn(b, h, p).to(dtype),
        "dt_bias": bias[:, None].expand(h, p) if tied else torch.randn(h, p),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("absent", [(), ("D",), ("dt_bias",), ("z", "D", "dt_bias")])
def test_state_update(dtype: torch.dtype, tied: bool, absent: tuple[str, ...]) -> None:
    for state_dtype in (torch.float32, dtype):
        inputs = update_inputs(dtype, tied, state_dtype) | dict.fromkeys(absent)
        slots = torch.tensor([4, -1, 0], dtype=torch.int32)
        runs = []
        for cast in (lambda t: t.clone(), lambda t: t.double() if t.is_floating_point() else t):
            i = {k: None if v is None else cast(v) for k, v in inputs.items()}
            i["state"] = i["state"].clone()
            runs.append((ops.selective_state_update(**i, dt_softplus=True, state_batch_indices=slots), i["state"]))
        with ops.backend("reference"):
            i = inputs | {"state": inputs["state"].clone()}
            runs.append((ops.selective_state_update(**i, dt_softplus=True, state_batch_indices=slots), i["state"]))
        (out, state), (truth, true_state), (eager, eager_state) = runs
        assert_budget("out", out, eager, truth)
        assert_budget("state", state, eager_state, true_state)
        assert out[1].abs().max() == 0
        untouched = [1, 2, 3]
        assert torch.equal(state[untouched], inputs["state"][untouched])


def test_state_update_without_heads_equals_scan() -> None:
    """Token by token it is the Mamba-1 scan."""
    torch.manual_seed(0)
    u, delta, z = torch.randn(2, 128, 6), torch.randn(2, 128, 6), torch.randn(2, 128, 6)
    A, B, C, D, bias = (
        -torch.rand(128, 5),
        torch.randn(2, 5, 6),
        torch.randn(2, 5, 6),
        torch.randn(128),
        torch.randn(128),
    )
    want, last = ops.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    state = torch.zeros(2, 128, 5)
    steps = [
        ops.selective_state_update(
            state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, dt_softplus=True
        )
        for t in range(6)
    ]
    torch.testing.assert_close(torch.stack(steps, -1), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


SCAN_SHAPES = [(1, 1, 1, 1, 1), (2, 16, 64, 8, 1), (1, 40, 65, 5, 2), (2, 24, 130, 3, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SCAN_SHAPES)
@pytest.mark.parametrize("varying", [(True, True), (False, True), (True, False)])
def test_selective_scan(shape: tuple[int, ...], varying: tuple[bool, bool], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, channels, length, n, groups = shape
    bc = [torch.randn(batch, groups, n, length).to(dtype) if v else torch.randn(channels, n) for v in varying]
    u, delta, z = (torch.randn(batch, channels, length).to(dtype) for _ in range(3))
    inputs = [u, delta, -torch.rand(channels, n), *bc, torch.randn(channels), z, torch.randn(channels)]
    grad = torch.randn(batch, channels, length).to(dtype)
    assert_close_to_truth(
        lambda *a: ops.selective_scan_fn(*a, delta_softplus=True),
        lambda *a: reference.selective_scan(*a, True)[0],
        inputs,
        grad,
    )
    inputs[5:] = [None, None, None]
    assert_close_to_truth(
        lambda *a: ops.selective_scan_fn(*a, delta_softplus=True),
        lambda *a: reference.selective_scan(*a, True)[0],
        inputs,
        grad,
    )


def test_selective_scan_bits_and_three_dimensional_b() -> None:
    torch.manual_seed(0)
    u, delta = torch.randn(2, 40, 70), torch.randn(2, 40, 70)
    A, B, C = -torch.rand(40, 4), torch.randn(2, 4, 70), torch.randn(2, 1, 4, 70)

    def run(rows: slice) -> list[torch.Tensor]:
        leaves = [t[rows].clone().requires_grad_() for t in (u, delta, B, C)]
        out = ops.selective_scan_fn(leaves[0], leaves[1], A, leaves[2], leaves[3])
        out.square().sum().backward()
        return [out.detach(), *[t.grad for t in leaves]]

    full = run(slice(None))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(full, run(slice(None))))
    torch.set_num_threads(2)
    assert all(torch.equal(a[1:], b) for a, b in zip(full, run(slice(1, 2))))


def test_selective_scan_refuses_complex_and_bad_shapes() -> None:
    u, A, B = torch.zeros(1, 4, 3), torch.zeros(4, 2), torch.zeros(1, 2, 3)
    with pytest.raises(TypeError, match="A: got dtype complex64"):
        ops.selective_scan_fn(u, u, A.to(torch.complex64), B, B)
    with pytest.raises(ValueError, match="C: got shape"):
        ops.selective_scan_fn(u, u, A, B, torch.zeros(1, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "channels", "group"), [(1, 2, 2), (3, 64, 64), (130, 40, 10), (7, 66, 33), (9, 400, 200), (0, 8, 4)]
)
@pytest.mark.parametrize("mode", ["plain", "before", "after"])
def test_rmsnorm(rows: int, channels: int, group: int, mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = None if mode == "plain" else torch.randn(rows, channels).to(dtype)
    inputs = [torch.randn(rows, channels).to(dtype), torch.randn(channels), torch.randn(channels), z]
    assert_close_to_truth(
        lambda x, w, b, g: ops.rmsnorm_fn(x, w, b, g, 1e-5, group, mode == "before"),
        lambda x, w, b, g: reference.rmsnorm(x, w, b, g, 1e-5, group, mode == "before"),
        inputs,
        torch.randn(rows, channels).to(dtype),
    )


def test_rmsnorm_of_single_channel_groups_is_a_sign() -> None:
    """The gradient of x cancels to almost nothing there, which no relative budget can judge."""
    x = torch.tensor([[3.0, -2.0, 0.0]], requires_grad=True)
    out = ops.rmsnorm_fn(x, torch.tensor([1.0, 2.0, 3.0]), eps=1e-12, group_size=1)
    torch.testing.assert_close(out, torch.tensor([[1.0, -2.0, 0.0]]))
    out[:, :2].sum().backward()
    assert x.grad[:, :2].abs().max() < 1e-6


def test_rmsnorm_against_torch_views_and_bits() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(6, 50, 100)[:, :, :64], torch.randn(64)
    got = ops.rmsnorm_fn(x, w, eps=1e-6)
    want = F.rms_norm(x.double(), (64,), w.double(), 1e-6)
    assert_budget("out", got, want, want)
    assert torch.equal(got[3, 7], ops.rmsnorm_fn(x[3, 7], w, eps=1e-6))
    with pytest.raises(ValueError, match="group_size: got 7"):
        ops.rmsnorm_fn(x, w, group_size=7)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 70), st.integers(1, 5), st.integers(4, 40), st.booleans(), st.booleans(), st.booleans())
def test_rmsnorm_fuzz(rows: int, groups: int, group: int, gated: bool, before: bool, bias: bool) -> None:
    torch.manual_seed(rows)
    inputs = [
        torch.randn(rows, groups * group),
        torch.randn(groups * group),
        torch.randn(groups * group) if bias else None,
        torch.randn(rows, groups * group) if gated else None,
    ]
    assert_close_to_truth(
        lambda x, w, b, z: ops.rmsnorm_fn(x, w, b, z, 1e-6, group, before),
        lambda x, w, b, z: reference.rmsnorm(x, w, b, z, 1e-6, group, before),
        inputs,
        torch.randn(rows, groups * group),
    )


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("mlp", [0, 6])
def test_fused_block(norm: bool, mlp: int) -> None:
    torch.manual_seed(0)
    heads, p, groups, n = 4, 8, 2, 5
    inner, conv_dim = heads * p, heads * p + 2 * groups * n
    inputs = [
        torch.randn(2, 70, 2 * mlp + inner + conv_dim + heads),
        torch.randn(conv_dim, 4),
        torch.randn(conv_dim),
        torch.randn(heads),
        -torch.rand(heads),
        torch.randn(heads),
        torch.randn(inner) if norm else None,
        torch.randn(9, inner + mlp),
    ]

    def ours(zx: Any, cw: Any, cb: Any, db: Any, A: Any, D: Any, rw: Any, ow: Any) -> torch.Tensor:
        out = ops.mamba_split_conv1d_scan_combined(
            zx, cw, cb, db, A, D, 256, rmsnorm_weight=rw, outproj_weight=ow, headdim=p, ngroups=groups,
            norm_before_gate=False,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    def oracle(zx: Any, cw: Any, cb: Any, db: Any, A: Any, D: Any, rw: Any, ow: Any) -> torch.Tensor:
        m, z, xbc, dt = zx.split([2 * mlp, inner, conv_dim, heads], -1)
        xbc = reference.causal_conv1d(xbc.transpose(1, 2), cw, cb, None, None, "silu", None).transpose(1, 2)
        x, B, C = xbc.split([inner, groups * n, groups * n], -1)
        gate = None if norm else z.unflatten(-1, (heads, p))
        y, _ = reference.chunk_scan(
            x.unflatten(-1, (heads, p)), dt, A, B.unflatten(-1, (groups, n)), C.unflatten(-1, (groups, n)), D, gate, db,
            dt_softplus=True,
        )  # fmt: skip
        y = y.flatten(-2)
        if norm:
            y = reference.rmsnorm(y, rw, None, z, 1e-6, inner // groups, False)
        a, b = m.chunk(2, -1)
        return F.linear(torch.cat([F.silu(a) * b, y], -1), ow)

    assert_close_to_truth(ours, oracle, inputs, torch.randn(2, 70, 9))


def test_opcheck_and_compile() -> None:
    torch.manual_seed(0)
    x, w, b, z = (torch.randn(s, requires_grad=True) for s in ((5, 8), (8,), (8,), (5, 8)))
    check_op(
        torch.ops.foldscan.rmsnorm,
        (x, w, b, z, 1e-6, 4, False),
        public=ops.rmsnorm_fn,
        public_args=(x, w, b, z, 1e-6, 4, False),
    )
    u, delta = (torch.randn(1, 4, 9, requires_grad=True) for _ in range(2))
    A, B = torch.randn(4, 3, requires_grad=True), torch.randn(1, 1, 3, 9, requires_grad=True)
    check_op(
        torch.ops.foldscan.selective_scan,
        (u, delta, A, B, B, None, None, None, True),
        public=ops.selective_scan_fn,
        public_args=(u, delta, A, B, B),
    )
    i = update_inputs(torch.float32, True, torch.float32)
    slots = torch.tensor([4, -1, 0], dtype=torch.int32)
    args = (i["state"], i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], i["z"], i["dt_bias"], True, slots)
    check_op(torch.ops.foldscan.state_update, args)
