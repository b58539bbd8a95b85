"""Vocabulary losses: bits that never change, invariants, memory."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from foldscan import ops
from helpers import assert_budget, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_cases import DTYPES, problem, stats_oracle


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
