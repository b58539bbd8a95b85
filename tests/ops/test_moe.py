"""moe_mlp and grouped_mm: fp64 truth, gradients, uneven loads, bits that do not depend on other tokens or threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foldscan import ops
from helpers import assert_budget, assert_close_to_truth, check_op, gradients, relative_rmse
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16]


def activation_oracle(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "relu2":
        return torch.where(x > 0, x * x, torch.zeros_like(x))
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def experts_oracle(
    x: torch.Tensor,
    probs: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    experts: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """Token by token, slot by slot."""
    rows = []
    for t in range(x.shape[0]):
        row = x.new_zeros(down.shape[1])
        for j, e in enumerate(experts[t].tolist()):
            if e < 0:
                continue
            hidden = up[e] @ x[t]
            if gate is None:
                hidden = activation_oracle(hidden, activation)
            else:
                hidden = activation_oracle(gate[e] @ x[t], activation) * hidden
            row = row + probs[t, j].to(x.dtype) * (down[e] @ hidden)
        rows.append(row)
    return torch.stack(rows) if rows else x.new_zeros(0, down.shape[1]) + 0 * (up.sum() + down.sum())


def problem(
    T: int, H: int, F: int, E: int, k: int, dtype: torch.dtype, gated: bool, D: int | None = None, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    x = normal(T, H)
    experts = torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(T)]) if T else torch.zeros(0, k).long()
    probs = torch.rand(T, k, generator=g)
    up, down = normal(E, F, H, scale=max(H, 1) ** -0.5), normal(E, D or H, F, scale=max(F, 1) ** -0.5)
    gate = normal(E, F, H, scale=max(H, 1) ** -0.5) if gated else None
    return x, probs, up, down, gate, experts  # type: ignore[return-value]


def check_mlp(
    x: torch.Tensor,
    probs: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    experts: torch.Tensor,
    activation: str,
) -> None:
    def ours(x: torch.Tensor, p: torch.Tensor, u: torch.Tensor, d: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return ops.moe_mlp(x, p, experts, u, d, w_gate=g, activation=activation)  # type: ignore[arg-type]

    def oracle(x: torch.Tensor, p: torch.Tensor, u: torch.Tensor, d: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return experts_oracle(x, p, u, d, g, experts, activation)

    grad = torch.randn(x.shape[0], down.shape[1], generator=torch.Generator().manual_seed(9)).to(x.dtype)
    assert_close_to_truth(ours, oracle, (x, probs, up, down, gate), grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "relu2", "gelu"])
def test_mlp_forward_and_gradients(activation: str, gated: bool, dtype: torch.dtype) -> None:
    check_mlp(*problem(23, 37, 29, 5, 2, dtype, gated), activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "H", "F", "E", "k", "D"),
    [
        (1, 1, 1, 1, 1, 1),
        (0, 8, 8, 4, 2, 8),
        (3, 65, 129, 7, 7, 33),  # K = E, another output width, one column past a tile
        (9, 130, 31, 29, 3, 130),  # most experts get one token or none
        (13, 515, 64, 3, 1, 16),  # past one block of K
    ],
)
def test_mlp_odd_shapes(T: int, H: int, F: int, E: int, k: int, D: int, dtype: torch.dtype) -> None:
    check_mlp(*problem(T, H, F, E, k, dtype, True, D), "silu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_gets_all_and_the_others_get_zero_gradients(dtype: torch.dtype) -> None:
    x, probs, up, down, gate, _ = problem(211, 24, 40, 6, 1, dtype, True)
    experts = torch.full((211, 1), 4)
    check_mlp(x, probs, up, down, gate, experts, "silu")
    up.requires_grad_()
    ops.moe_mlp(x, probs, experts, up, down, w_gate=gate).sum().backward()
    assert up.grad is not None
    assert up.grad[4].abs().sum() > 0
    assert up.grad[[0, 1, 2, 3, 5]].abs().sum() == 0


def test_more_rows_than_one_task() -> None:
    # kTaskRows = 8 * 96 rows share one packing: 1601 rows are three tasks, the last of 65.
    x, probs, up, down, gate, _ = problem(1601, 9, 11, 2, 1, torch.float32, True)
    experts = torch.zeros(1601, 1, dtype=torch.int32)
    out = ops.moe_mlp(x, probs, experts, up, down, w_gate=gate)
    hidden = F.silu(x.double() @ gate[0].double().T) * (x.double() @ up[0].double().T)
    truth = probs.double() * (hidden @ down[0].double().T)
    assert relative_rmse(out, truth) < 1e-6


def test_weight_gradient_of_many_rows_keeps_its_digits() -> None:
    # One chain over 16000 rows would have a relative error of 2e-6.
    a, b = torch.randn(16000, 6), torch.randn(1, 6, 5, requires_grad=True)
    grad = torch.randn(16000, 5)
    ops.grouped_mm(a, b, torch.tensor([16000], dtype=torch.int32)).backward(grad)
    assert b.grad is not None
    assert relative_rmse(b.grad[0], a.double().T @ grad.double()) < 8e-7


def test_empty_slots_add_nothing_and_get_no_gradient() -> None:
    x, probs, up, down, gate, experts = problem(31, 16, 24, 5, 3, torch.float32, True)
    experts[::2, 1] = -1
    experts[5] = -1
    check_mlp(x, probs, up, down, gate, experts, "silu")
    probs.requires_grad_()
    out = ops.moe_mlp(x, probs, experts, up, down, w_gate=gate)
    out.sum().backward()
    assert probs.grad is not None
    assert out[5].abs().sum() == 0
    assert probs.grad[experts < 0].abs().sum() == 0
    assert probs.grad[experts >= 0].abs().min() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_token_has_the_same_bits_alone_in_a_batch_and_with_any_threads(gated: bool, dtype: torch.dtype) -> None:
    x, probs, up, down, gate, experts = problem(203, 700, 150, 4, 2, dtype, gated)

    def run(i: slice, weights: tuple[torch.Tensor, ...] = (up, down)) -> torch.Tensor:
        return ops.moe_mlp(x[i], probs[i], experts[i], *weights, w_gate=gate).detach()

    full = run(slice(None))
    for i in (0, 95, 96, 202):
        assert torch.equal(full[i : i + 1], run(slice(i, i + 1)))
    assert torch.equal(full[50:120], run(slice(50, 120)))
    # With gradients the weights are packed on the way: same bits as from the cache.
    assert torch.equal(full, run(slice(None), (up.clone().requires_grad_(), down)))
    torch.set_num_threads(1)
    assert torch.equal(full, run(slice(None)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_same_bits_with_any_threads_and_a_token_alone(dtype: torch.dtype) -> None:
    x, probs, up, down, gate, experts = problem(150, 140, 270, 3, 2, dtype, True)
    grad = torch.randn(150, 140).to(dtype)

    def run(n: slice) -> list[torch.Tensor | None]:
        def fn(*inputs: torch.Tensor) -> torch.Tensor:
            a, p, u, d, g = inputs
            return ops.moe_mlp(a, p, experts[n], u, d, w_gate=g)

        return gradients(fn, (x[n], probs[n], up, down, gate), grad[n])[1]

    full = run(slice(None))
    alone = run(slice(97, 98))
    for i in (0, 1):
        assert torch.equal(full[i][97:98], alone[i])  # type: ignore[index, arg-type]
    torch.set_num_threads(1)
    for a, b in zip(full, run(slice(None))):
        assert torch.equal(a, b)  # type: ignore[arg-type]


def test_mixed_precision_autocast_and_fp16() -> None:
    x, probs, up, down, gate, experts = problem(50, 40, 48, 4, 2, torch.float32, True)
    truth = experts_oracle(*(t.double() for t in (x, probs, up, down, gate)), experts, "silu")
    leaves = [t.clone().requires_grad_() for t in (up, down, gate)]
    out = ops.moe_mlp(x.bfloat16(), probs, experts, leaves[0], leaves[1], w_gate=leaves[2])
    assert out.dtype == torch.bfloat16
    assert relative_rmse(out, truth) < 2e-2
    out.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.moe_mlp(x, probs, experts, up, down, w_gate=gate), out.detach())
    half = ops.moe_mlp(x.half(), probs, experts, up.half(), down.half(), w_gate=gate.half())
    assert half.dtype == torch.float16
    assert relative_rmse(half, truth) < 3e-3


def test_cached_weights_follow_changes_and_views() -> None:
    x, probs, experts = torch.ones(1, 4), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long)
    up, down = torch.ones(2, 3, 4), torch.ones(2, 4, 3)
    assert ops.moe_mlp(x, probs, experts, up, down, activation="relu2").tolist() == [[48.0] * 4]
    up.mul_(2)
    assert ops.moe_mlp(x, probs, experts, up, down, activation="relu2").tolist() == [[192.0] * 4]
    flat = torch.nn.Parameter(torch.ones(3, 4))
    with torch.no_grad():
        assert ops.moe_mlp(x, probs, experts, flat[None], down[:1], activation="relu2").tolist() == [[48.0] * 4]
        flat.mul_(3)
        assert ops.moe_mlp(x, probs, experts, flat[None], down[:1], activation="relu2").tolist() == [[432.0] * 4]
        # Another window on the same storage is another weight.
        up[1].zero_()
        assert ops.moe_mlp(x, probs, experts, up[1:], down[:1], activation="relu2").tolist() == [[0.0] * 4]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 40),
    H=st.integers(1, 70),
    F=st.integers(1, 70),
    E=st.integers(1, 9),
    k=st.integers(1, 4),
    activation=st.sampled_from(["silu", "relu2", "gelu"]),
    gated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_mlp_fuzz(T: int, H: int, F: int, E: int, k: int, activation: str, gated: bool, dtype: torch.dtype) -> None:
    x, probs, up, down, gate, experts = problem(T, H, F, E, min(k, E), dtype, gated, seed=T + H)
    # A few values of a tiny problem may all but cancel, so the floor is that of the larger scale.
    leaves = [x, probs, up, down, gate]
    truth = experts_oracle(*[None if t is None else t.double() for t in leaves], experts, activation)  # type: ignore
    eager = experts_oracle(*leaves, experts, activation)  # type: ignore[arg-type]
    out = ops.moe_mlp(x, probs, experts, up, down, w_gate=gate, activation=activation)  # type: ignore[arg-type]
    assert_budget("output", out, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("sizes", "K", "N"), [([3, 0, 97, 1], 33, 130), ([0, 0], 4, 4), ([5], 1, 1), ([2, 2], 600, 7)])
def test_grouped_mm(sizes: list[int], K: int, N: int, transposed: bool, dtype: torch.dtype) -> None:
    G, total = len(sizes), sum(sizes)
    offs = torch.tensor(sizes).cumsum(0).int()
    a, bias = torch.randn(total, K).to(dtype), torch.randn(G, N).to(dtype)
    b = torch.randn(G, N, K).to(dtype).transpose(1, 2) if transposed else torch.randn(G, K, N).to(dtype)

    def oracle(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        group = torch.repeat_interleave(torch.arange(G), torch.tensor(sizes))
        return torch.einsum("rk,rkn->rn", a, b[group]) + bias[group]

    grad = torch.randn(total, N).to(dtype)
    assert_close_to_truth(lambda a, b, c: ops.grouped_mm(a, b, offs, c), oracle, (a, b, bias), grad)


def test_grouped_mm_agrees_with_torch_and_zeroes_the_tail() -> None:
    a, b = torch.randn(20, 16, dtype=torch.bfloat16), torch.randn(3, 16, 32, dtype=torch.bfloat16)
    offs = torch.tensor([4, 4, 20], dtype=torch.int32)
    theirs = F.grouped_mm(a, b, offs=offs)
    assert relative_rmse(ops.grouped_mm(a, b, offs), theirs) < 4e-3
    wide = torch.randn(25, 32, dtype=torch.bfloat16)[:, ::2]
    out = ops.grouped_mm(wide, b.float(), offs)
    assert out[20:].abs().sum() == 0
    assert torch.equal(out[4:20], ops.grouped_mm(wide[4:20], b[2:].float(), torch.tensor([16], dtype=torch.int32)))


def test_every_backend_gives_the_same_function() -> None:
    x, probs, up, down, gate, experts = problem(30, 16, 24, 5, 3, torch.float32, True)
    experts[3, 1] = -1
    native = ops.moe_mlp(x, probs, experts, up, down, w_gate=gate)
    offs = torch.tensor([10, 10, 25, 30, 30], dtype=torch.int32)
    product = ops.grouped_mm(x, up.transpose(1, 2), offs)
    for name in ("reference", "eager"):
        with ops.backend(name):  # type: ignore[arg-type]
            assert relative_rmse(ops.moe_mlp(x, probs, experts, up, down, w_gate=gate), native) < 1e-6
            assert relative_rmse(ops.grouped_mm(x, up.transpose(1, 2), offs), product) < 1e-6


def test_bad_arguments_are_named() -> None:
    x, probs, up, down, gate, experts = problem(6, 8, 4, 3, 2, torch.float32, True)
    with pytest.raises(ValueError, match=r"experts: got indices in \[0, 3\]"):
        ops.moe_mlp(x, probs, torch.where(experts > 0, 3, 0), up, down)
    with pytest.raises(TypeError, match="experts: got dtype float32"):
        ops.moe_mlp(x, probs, probs, up, down)
    with pytest.raises(ValueError, match="probs: got shape"):
        ops.moe_mlp(x, probs[:, :1], experts, up, down)
    with pytest.raises(ValueError, match="w_down: got shape"):
        ops.moe_mlp(x, probs, experts, up, up)
    with pytest.raises(ValueError, match="tokens: got shape"):
        ops.moe_mlp(x[:, :5], probs, experts, up, down)
    with pytest.raises(ValueError, match=r"w_up: got shape \(3, 0, 8\)"):
        ops.moe_mlp(x, probs, experts, up[:, :0], down[:, :, :0])
    with pytest.raises(ValueError, match=r"experts: got shape \(6, 0\)"):
        ops.moe_mlp(x, probs[:, :0], experts[:, :0], up, down)
    with pytest.raises(ValueError, match="activation: got 'tanh'"):
        ops.moe_mlp(x, probs, experts, up, down, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="w_up: got dtype"):
        ops.moe_mlp(x, probs, experts, up.bfloat16(), down.bfloat16())
    with pytest.raises(ValueError, match=r"offs: got \[4, 2, 6\]"):
        ops.grouped_mm(x, up.transpose(1, 2), torch.tensor([4, 2, 6], dtype=torch.int32))
    # A direct call of the kernel is refused too, before it touches memory.
    with pytest.raises(RuntimeError, match="experts: an index is out of range"):
        torch.ops.foldscan.moe_mlp(x, probs, experts + 2, up, down, gate, 0, False)


def test_opcheck_and_compile() -> None:
    x, probs, up, down, gate, experts = problem(9, 8, 12, 4, 2, torch.float32, True)
    leaves = [t.requires_grad_() for t in (x, probs, up, down, gate)]
    x, probs, up, down, gate = leaves
    check_op(
        torch.ops.foldscan.moe_mlp,
        (x, probs, experts, up, down, gate, 0, True),
        public=ops.moe_mlp,
        public_args=(x, probs, experts, up, down),
        public_kwargs={"w_gate": gate},
    )
    a, b = torch.randn(7, 5, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True)
    bias, offs = torch.randn(3, 6, requires_grad=True), torch.tensor([2, 2, 7], dtype=torch.int32)
    check_op(torch.ops.foldscan.grouped_mm, (a, b, offs, bias), public=ops.grouped_mm, public_args=(a, b, offs, bias))


def test_gradcheck() -> None:
    x, probs, up, down, gate, experts = (
        t if t.dtype == torch.int64 else t.double().requires_grad_()
        for t in problem(4, 3, 2, 3, 2, torch.float32, True)
    )
    assert torch.autograd.gradcheck(
        lambda *a: ops.moe_mlp(a[0], a[1], experts, a[2], a[3], w_gate=a[4]), (x, probs, up, down, gate)
    )
