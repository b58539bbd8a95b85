"""Vocabulary losses: ignored rows, supports, views, backends, errors, registration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foldscan import ops
from helpers import check_op, relative_rmse
from losses_cases import problem, stats_oracle


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
