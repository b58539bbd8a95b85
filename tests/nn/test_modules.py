"""Each module against its definition written out in fp64, forward and gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from foldscan.nn import MLP, Attention, Mamba2Mixer, MoE, Packing, RMSNorm, Router, positions_of
from helpers import relative_rmse
from torch import nn


def packing(*lengths: int) -> Packing:
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return Packing(cu, max(lengths), positions_of(cu, sum(lengths)))


def compare(module: nn.Module, oracle: nn.Module, x: torch.Tensor, *arguments: object) -> None:
    """Output and all gradients of ``module`` in fp32 against ``oracle`` (a function of the fp64 copy)."""
    truth = copy.deepcopy(module).double()
    ours_in, true_in = x.clone().requires_grad_(), x.double().requires_grad_()
    got, want = module(ours_in, *arguments), oracle(truth, true_in)
    got = got[0] if isinstance(got, tuple) else got
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    assert relative_rmse(got, want) < 1e-5
    assert relative_rmse(ours_in.grad, true_in.grad) < 2e-5
    for (name, a), b in zip(module.named_parameters(), truth.parameters()):
        assert a.grad is not None and b.grad is not None, name
        if float(b.grad.abs().max()) < 1e-12:  # the bias of k shifts all scores of a row: softmax does not see it
            assert float(a.grad.abs().max()) < 1e-4, name
        else:
            assert relative_rmse(a.grad, b.grad) < 2e-5, name


def randomise(module: nn.Module, scale: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    return module


@pytest.mark.parametrize(("activation", "bias"), [("relu2", False), ("relu2", True), ("silu", False)])
@pytest.mark.parametrize("rows", [1, 37])
def test_mlp(activation: str, bias: bool, rows: int) -> None:
    def oracle(m: MLP, x: torch.Tensor) -> torch.Tensor:
        up = F.linear(x, m.up_proj.weight, m.up_proj.bias)
        if m.gate_proj is None:
            return F.linear(torch.relu(up) ** 2, m.down_proj.weight, m.down_proj.bias)
        return F.linear(F.silu(F.linear(x, m.gate_proj.weight)) * up, m.down_proj.weight)

    compare(randomise(MLP(19, 45, activation=activation, bias=bias)), oracle, torch.randn(rows, 19))


@pytest.mark.parametrize("activation", ["relu2", "silu"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("shared", "latent"), [(0, None), (11, 13)])
def test_moe(activation: str, score: str, shared: int, latent: int | None) -> None:
    router = Router(19, 5, 2, score=score, bias=score == "sigmoid", scaling=1.5)
    moe = randomise(
        MoE(
            19, router, intermediate_size=23, activation=activation, shared_intermediate_size=shared, latent_size=latent
        )
    )

    def act(m: nn.Module, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        return torch.relu(up) ** 2 if gate is None else F.silu(gate) * up

    def oracle(m: MoE, x: torch.Tensor) -> torch.Tensor:
        logits = x @ m.gate.weight.T
        rows = []
        for t in range(len(x)):
            values = logits[t].sigmoid() if score == "sigmoid" else logits[t]
            best = values.detach().topk(2).indices
            weights = values[best] / values[best].sum() if score == "sigmoid" else values[best].softmax(0)
            inner = x[t] if m.fc1_latent_proj is None else m.fc1_latent_proj.weight @ x[t]
            out = torch.zeros(len(inner), dtype=x.dtype)
            for weight, e in zip(1.5 * weights, best.tolist()):
                gate = None if m.experts.gate_proj is None else m.experts.gate_proj[e] @ inner
                out = out + weight * (m.experts.down_proj[e] @ act(m, gate, m.experts.up_proj[e] @ inner))
            if m.fc2_latent_proj is not None:
                out = m.fc2_latent_proj.weight @ out
            if m.shared_experts is not None:
                s = m.shared_experts
                gate = None if s.gate_proj is None else s.gate_proj.weight @ x[t]
                out = out + s.down_proj.weight @ act(s, gate, s.up_proj.weight @ x[t])
            rows.append(out)
        return torch.stack(rows)

    compare(moe, oracle, torch.randn(41, 19))


@pytest.mark.parametrize(("groups", "limit"), [(1, (0.0, float("inf"))), (3, (0.02, 0.9))])
def test_mamba2_is_its_recurrence(groups: int, limit: tuple[float, float]) -> None:
    """Token by token from the definition, state and convolution restarting at each sequence."""
    heads, width, state, lengths = 6, 5, 7, (70, 1, 13)
    mixer = Mamba2Mixer(
        11, num_heads=heads, head_dim=width, num_groups=groups, state_size=state, bias=True, time_step_limit=limit
    )
    randomise(mixer, 0.5)

    def oracle(m: Mamba2Mixer, u: torch.Tensor) -> torch.Tensor:
        inner, rows = heads * width, []
        for sequence in u.split(list(lengths)):
            projected = sequence @ m.in_proj.weight.T + m.in_proj.bias
            z, xbc, dt = projected.split([inner, m.conv_dim, heads], dim=-1)
            padded = torch.cat([xbc.new_zeros(3, m.conv_dim), xbc])
            h = u.new_zeros(heads, width, state)
            for t in range(len(sequence)):
                window = (padded[t : t + 4] * m.conv1d.weight[:, 0].T).sum(0) + m.conv1d.bias
                x, b, c = F.silu(window).split([inner, groups * state, groups * state])
                x = x.view(heads, width)
                b = b.view(groups, state).repeat_interleave(heads // groups, 0)
                c = c.view(groups, state).repeat_interleave(heads // groups, 0)
                delta = F.softplus(dt[t] + m.dt_bias).clamp(*limit)
                decay = torch.exp(-delta * m.A_log.exp())
                h = decay[:, None, None] * h + (delta[:, None] * x)[:, :, None] * b[:, None]
                y = (h * c[:, None]).sum(-1) + m.D[:, None] * x
                gated = (y.flatten() * F.silu(z[t])).view(groups, -1)
                normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + m.norm.eps)
                rows.append(m.out_proj.weight @ (normed.flatten() * m.norm.weight) + m.out_proj.bias)
        return torch.stack(rows)

    compare(mixer, oracle, torch.randn(sum(lengths), 11), packing(*lengths))


@pytest.mark.parametrize(("theta", "window"), [(None, None), (100.0, None), (None, 6)])
def test_attention_is_its_softmax(theta: float | None, window: int | None) -> None:
    lengths = (30, 1, 17)
    attention = Attention(
        13, num_heads=6, num_kv_heads=2, head_dim=10, bias=True, rope_theta=theta, sliding_window=window
    )
    randomise(attention)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        if theta is None:
            return x
        angle = torch.arange(len(x)).double()[:, None] * theta ** (-torch.arange(0, 10, 2).double() / 10)
        turned = torch.complex(x[..., :5], x[..., 5:]) * torch.exp(1j * angle)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    def oracle(m: Attention, u: torch.Tensor) -> torch.Tensor:
        rows = []
        for s in u.split(list(lengths)):
            q, k, v = (F.linear(s, p.weight, p.bias) for p in (m.q_proj, m.k_proj, m.v_proj))
            q, k = rotate(q.view(-1, 6, 10)), rotate(k.view(-1, 2, 10)).repeat_interleave(3, 1)
            v = v.view(-1, 2, 10).repeat_interleave(3, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) / 10**0.5
            i, j = torch.arange(len(s))[:, None], torch.arange(len(s))
            seen = (j <= i) if window is None else (j <= i) & (j > i - window)
            mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
            rows.append(F.linear(mixed.flatten(1), m.o_proj.weight, m.o_proj.bias))
        return torch.cat(rows)

    compare(attention, oracle, torch.randn(sum(lengths), 13), packing(*lengths))


def test_fp64_is_not_rounded_on_the_way() -> None:
    """A change far below fp32's resolution changes what comes out, and the gradients of parameters say by how much."""
    mamba = Mamba2Mixer(6, num_heads=4, head_dim=3, num_groups=2, state_size=5)
    moe = MoE(6, Router(6, 4, 2, score="sigmoid", bias=True), intermediate_size=5)
    for module, arguments in ((mamba, (packing(2, 5),)), (moe, ())):
        module = randomise(module).double()
        x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)

        def loss(module: nn.Module = module, x: torch.Tensor = x, arguments: tuple[object, ...] = arguments):
            out = module(x, *arguments)
            return (out[0] if isinstance(out, tuple) else out).sin().sum()

        loss().backward()
        for name, p in [("x", x), *module.named_parameters()]:
            step, grad = 1e-6 * torch.randn_like(p), p.grad
            assert grad is not None and grad.dtype == torch.float64
            with torch.no_grad():
                p += step
                above = loss()
                p -= 2 * step
                difference = above - loss()
                p += step
            assert abs(float(difference - 2 * (grad * step).sum())) < 1e-6 * float((2 * (grad * step)).norm() + 1e-9), (
                name
            )


def test_rmsnorm() -> None:
    def oracle(m: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * m.weight

    compare(randomise(RMSNorm(29)), oracle, torch.randn(7, 29))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(4, 4, activation="gelu"), "activation: got 'gelu'"),
        (lambda: MLP(4, 4, activation="silu", bias=True), "bias"),
        (lambda: Router(4, 4, 2, score="max"), "score: got 'max'"),
        (lambda: MoE(4, Router(4, 4, 2), intermediate_size=4, activation="tanh"), "activation: got 'tanh'"),
    ],
)
def test_wrong_choices_are_named(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
