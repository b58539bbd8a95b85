"""Vocabulary losses: fp64 truth, every gradient, confident rows, invariants, memory, bits that never change."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foldscan import ops
from helpers import assert_budget, assert_close_to_truth, check_op, gradients, relative_rmse
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16]
# (N, H, V): one, around the block of 256 and the group of 512 columns, primes, more rows than one task of 768.
SHAPES = [(1, 1, 1), (5, 8, 256), (7, 13, 257), (97, 33, 513), (3, 515, 1031), (800, 5, 300), (0, 4, 10)]


def make_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float, temperature: float = 1.0
) -> torch.Tensor:
    z = hidden @ weight.T
    z = z.float() if z.dtype != torch.float64 else z
    if bias is not None:
        z = z + bias.to(z.dtype)
    return (softcap * torch.tanh(z / softcap) if softcap else z) / temperature


def stats_oracle(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """(4, N), from the definitions with the full softmax."""
    log_p = torch.log_softmax(make_logits(hidden, weight, bias, softcap, temperature), -1)
    p, keep = log_p.exp(), (targets != ignore_index).to(log_p.dtype)
    entropy = -(p * log_p).sum(-1)
    varentropy = (p * log_p**2).sum(-1) - entropy**2
    logp = log_p.gather(1, targets.clamp(min=0)[:, None].long())[:, 0]
    lse = torch.logsumexp(make_logits(hidden, weight, bias, softcap, temperature), -1)
    return torch.stack([logp, entropy, varentropy, lse]) * keep


def problem(N: int, H: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g).to(dtype)
    weight = (torch.randn(V, H, generator=g) * 2 / max(H, 1) ** 0.5).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    targets = torch.randint(0, V, (N,), generator=g)
    if N > 2:
        targets[1] = -100
    return hidden, weight, bias, targets


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


def kl_oracle(
    h: torch.Tensor, w: torch.Tensor, th: torch.Tensor, tw: torch.Tensor, direction: str, beta: float, T: float
) -> torch.Tensor:
    s = torch.log_softmax(make_logits(h, w, None, 0.0, T), -1)
    t = torch.log_softmax(make_logits(th, tw, None, 0.0, T), -1)
    if direction == "forward":
        return (t.exp() * (t - s)).sum(-1)
    if direction == "reverse":
        return (s.exp() * (s - t)).sum(-1)
    m = torch.log(beta * t.exp() + (1 - beta) * s.exp())
    return (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)


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


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 20),
    H=st.integers(1, 40),
    V=st.integers(1, 800),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_invariants(N: int, H: int, V: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    hidden, weight, bias, targets = problem(N, H, V, dtype, seed)
    hidden = (hidden.float() * scale).to(dtype)
    targets = targets.clamp(min=0)
    b = bias.float().requires_grad_()
    out = ops.linear_logprob(hidden, weight, targets, b)
    assert (out.logp <= 0).all()
    assert (out.entropy >= 0).all() and (out.entropy <= math.log(V) + 1e-5).all()
    assert (out.varentropy >= 0).all()
    # Rows of logit gradients sum to zero, those of the lse to one: the bias gradient shows it.
    for value, want in ((out.logp, 0.0), (out.entropy, 0.0), (out.varentropy, 0.0), (out.lse, float(N))):
        (grad,) = torch.autograd.grad(value.sum(), b, retain_graph=True)
        size = grad.abs().sum().item()
        assert abs(grad.sum().item() - want) <= (2e-5 if dtype == torch.float32 else 8e-3) * max(size, 1.0)
    truth = stats_oracle(hidden.double(), weight.double(), bias.double(), targets)
    eager = stats_oracle(hidden, weight, bias, targets)
    assert_budget("logp", out.logp, eager[0], truth[0])
    assert_budget("lse", out.lse, eager[3], truth[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_in_training_in_generation_and_with_any_threads(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = problem(830, 140, 1500, dtype)

    def run(n: slice, trained: bool = False) -> torch.Tensor:
        w = weight.clone().requires_grad_() if trained else weight
        return torch.stack(ops.linear_logprob(hidden[n], w, targets[n], bias, temperature=0.8)).detach()

    full = run(slice(None), trained=True)
    assert torch.equal(full, run(slice(None)))
    for i in (0, 96, 767, 829):
        assert torch.equal(full[:, i : i + 1], run(slice(i, i + 1)))
    assert torch.equal(full[:, 100:400], run(slice(100, 400), trained=True))
    torch.set_num_threads(1)
    assert torch.equal(full, run(slice(None)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_same_bits_with_any_threads_and_for_a_row_alone(dtype: torch.dtype) -> None:
    # Rows alone: 9000 rows make waves of one group of columns in fp32, one row a single wave of all.
    hidden, weight, bias, targets = problem(9000, 20, 1300, dtype)
    grad = torch.randn(9000)

    def run(n: slice) -> list[torch.Tensor | None]:
        return gradients(
            lambda h, w, b: ops.linear_cross_entropy(h, w, targets[n], b, reduction="none", label_smoothing=0.1),
            (hidden[n], weight, bias),
            grad[n],
        )[1]

    full, alone = run(slice(None)), run(slice(5000, 5001))
    assert torch.equal(full[0][5000:5001], alone[0])  # type: ignore[index, arg-type]
    torch.set_num_threads(1)
    for a, b in zip(full, run(slice(None))):
        assert torch.equal(a, b)  # type: ignore[arg-type]


def test_ratio_of_new_to_old_probability_is_exactly_one() -> None:
    hidden, weight, _, targets = problem(64, 48, 1000, torch.bfloat16)
    with torch.no_grad():
        old = torch.cat([ops.linear_logprob(hidden[i : i + 1], weight, targets[i : i + 1]).logp for i in range(64)])
    new = ops.linear_logprob(hidden, weight.clone().requires_grad_(), targets).logp
    assert (torch.exp(new.detach() - old) - 1).abs().max() == 0


def test_ignored_rows_cost_nothing_and_poison_nothing() -> None:
    hidden, weight, _, targets = problem(50, 12, 300, torch.float32)
    targets[::2] = 7  # an ignore_index inside the vocabulary is legal
    hidden[::2] = math.nan
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = ops.linear_cross_entropy(h, w, targets.clamp(min=0), ignore_index=7)
    loss.backward()
    assert h.grad is not None and w.grad is not None
    assert loss.isfinite() and w.grad.isfinite().all()
    assert h.grad[::2].abs().sum() == 0
    kept = targets.clamp(min=0) != 7
    assert (
        relative_rmse(loss, F.cross_entropy(hidden[kept].double() @ weight.double().T, targets[kept].clamp(min=0)))
        < 1e-6
    )
    nothing = ops.linear_cross_entropy(h, w, torch.full((50,), -100))
    assert nothing.item() == 0.0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(nothing, (h, w)))


def test_support_restricts_the_vocabulary() -> None:
    hidden, weight, bias, _ = problem(12, 8, 500, torch.float32)
    support = torch.randperm(500)[:37]
    targets = support[torch.randint(0, 37, (12,))]
    targets[3] = -100
    w = weight.clone().requires_grad_()
    out = ops.linear_logprob(hidden, w, targets, bias, support=support)
    position = torch.tensor([-100 if t < 0 else support.tolist().index(t) for t in targets.tolist()])
    want = stats_oracle(hidden.double(), weight[support].double(), bias[support].double(), position)
    assert relative_rmse(torch.stack(out), want) < 1e-6
    out.logp.sum().backward()
    assert w.grad is not None
    outside = torch.ones(500, dtype=torch.bool)
    outside[support] = False
    assert w.grad[outside].abs().sum() == 0 and w.grad[support].abs().sum() > 0
    with pytest.raises(ValueError, match="want one of the ids in support"):
        ops.linear_logprob(hidden, weight, torch.full((12,), int(outside.nonzero()[0])), support=support)
    with pytest.raises(ValueError, match="support: got an id twice"):
        ops.linear_logprob(hidden, weight, targets, support=torch.cat([support, support[:1]]))


def test_non_contiguous_inputs() -> None:
    hidden, weight, bias, targets = problem(20, 16, 300, torch.float32)
    wide = torch.randn(20, 40)
    wide[:, 3:19] = hidden
    a = ops.linear_cross_entropy(hidden, weight, targets, bias)
    b = ops.linear_cross_entropy(wide[:, 3:19], weight.t().contiguous().t(), targets.int(), bias)
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_buffer_of_rows_times_vocabulary(dtype: str) -> None:
    # In a process of its own, because peak memory only grows. N V fp32 would be 296 MB, one gradient of the weight is
    # 37 MB in fp32.
    code = f"""
    import resource, torch
    from foldscan import ops
    torch.set_num_threads(2)
    N, H, V = 512, 64, 151936
    hidden = torch.randn(N, H).to(torch.{dtype}).requires_grad_()
    weight = torch.randn(V, H).to(torch.{dtype}).requires_grad_()
    other = torch.randn(V, H).to(torch.{dtype})
    targets = torch.randint(0, V, (N,))
    small = torch.randn(300, H).to(torch.{dtype})
    ops.linear_cross_entropy(hidden, small.requires_grad_(), targets % 300).backward()
    hidden.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = []
    for loss in (
        lambda: ops.linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1),
        lambda: sum(v.sum() for v in ops.linear_logprob(hidden, weight, targets)),
        lambda: ops.linear_kl_div(hidden, weight, hidden, other, direction="jsd"),
    ):
        loss().backward()
        hidden.grad = weight.grad = None
        grown.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(max(grown) / 1024)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    megabytes = float(out.stdout)
    assert megabytes < 100, f"peak memory grew by {megabytes:.0f} MB"


def test_every_backend_gives_the_same_function() -> None:
    hidden, weight, bias, targets = problem(20, 16, 300, torch.float32)
    teacher = problem(20, 6, 300, torch.float32, seed=4)[:2]

    def run() -> list[torch.Tensor]:
        return [
            ops.linear_cross_entropy(hidden, weight, targets, bias, softcap=9.0, label_smoothing=0.1, z_loss=0.1),
            *ops.linear_logprob(hidden, weight, targets, bias, temperature=0.5, softcap=9.0),
            *(ops.linear_kl_div(hidden, weight, *teacher, direction=d) for d in ("forward", "reverse", "jsd")),  # type: ignore[arg-type]
        ]

    native = run()
    for name in ("reference", "eager"):
        with ops.backend(name):  # type: ignore[arg-type]
            for a, b in zip(native, run()):
                assert relative_rmse(a, b) < 2e-6


def test_bad_arguments_are_named() -> None:
    hidden, weight, bias, targets = problem(6, 8, 30, torch.float32)
    teacher = (hidden, weight)
    cases: list[tuple[str, Any]] = [
        ("targets: got label 30", lambda: ops.linear_cross_entropy(hidden, weight, targets.clamp(min=30))),
        ("targets: got label -1", lambda: ops.linear_logprob(hidden, weight, torch.full((6,), -1))),
        ("targets: got shape", lambda: ops.linear_cross_entropy(hidden, weight, targets[:3])),
        ("weight: got shape", lambda: ops.linear_cross_entropy(hidden, weight[:, :5], targets)),
        ("bias: got shape", lambda: ops.linear_cross_entropy(hidden, weight, targets, bias[:4])),
        ("reduction: got 'avg'", lambda: ops.linear_cross_entropy(hidden, weight, targets, reduction="avg")),  # type: ignore
        ("label_smoothing: got 2", lambda: ops.linear_cross_entropy(hidden, weight, targets, label_smoothing=2)),
        ("softcap: got -1", lambda: ops.linear_cross_entropy(hidden, weight, targets, softcap=-1.0)),
        ("temperature: got 0", lambda: ops.linear_logprob(hidden, weight, targets, temperature=0.0)),
        ("support: got ids", lambda: ops.linear_logprob(hidden, weight, targets, support=torch.tensor([3, 30]))),
        ("direction: got 'up'", lambda: ops.linear_kl_div(hidden, weight, *teacher, direction="up")),  # type: ignore
        ("beta: got 1.5", lambda: ops.linear_kl_div(hidden, weight, *teacher, direction="jsd", beta=1.5)),
        ("teacher_weight: got shape", lambda: ops.linear_kl_div(hidden, weight, hidden, weight[:9])),
        ("mask: got shape", lambda: ops.linear_kl_div(hidden, weight, *teacher, mask=torch.ones(3, dtype=torch.bool))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="targets: got dtype float32"):
        ops.linear_cross_entropy(hidden, weight, targets.float())
    with pytest.raises(TypeError, match="weight: got dtype"):
        ops.linear_cross_entropy(hidden, weight.bfloat16(), targets)
    # A direct call of the kernel is refused too, before it touches memory.
    with pytest.raises(RuntimeError, match="a label is out of range"):
        torch.ops.foldscan.linear_stats(hidden, weight, targets + 40, None, 1.0, 0.0, -100, True)


def test_opcheck_and_compile() -> None:
    hidden, weight, bias, targets = problem(5, 8, 30, torch.float32)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    hidden, weight, bias = leaves
    check_op(
        torch.ops.foldscan.linear_stats,
        (hidden, weight, targets, bias, 1.0, 0.0, -100, True),
        public=ops.linear_logprob,
        public_args=(hidden, weight, targets, bias),
        public_kwargs={"support": torch.arange(30)},
    )
    args = (hidden, weight, targets, bias)
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    assert torch.equal(ops.linear_cross_entropy(*args), compiled(*args))
    for a, b in zip(
        torch.autograd.grad(compiled(*args), leaves), torch.autograd.grad(ops.linear_cross_entropy(*args), leaves)
    ):
        assert torch.equal(a, b)
    teacher = torch.randn(5, 4), torch.randn(30, 4)
    check_op(
        torch.ops.foldscan.linear_kl,
        (hidden, weight, *teacher, torch.ones(5, dtype=torch.bool), 2, 0.3, 1.0),
        public=ops.linear_kl_div,
        public_args=(hidden, weight, *teacher),
    )


def test_gradcheck() -> None:
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (5, 2), (5,)))
    targets = torch.tensor([4, -100, 0])
    assert torch.autograd.gradcheck(
        lambda h, w, b: tuple(ops.linear_logprob(h, w, targets, b, temperature=0.7)), (hidden, weight, bias)
    )
    assert torch.autograd.gradcheck(
        lambda h, w, b: ops.linear_cross_entropy(h, w, targets, b, z_loss=0.1, softcap=3.0), (hidden, weight, bias)
    )
