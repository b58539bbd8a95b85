"""A divided vocabulary: embedding and cross entropy equal to the whole table on one rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from foldscan import ops
from foldscan.parallel.groups import Group, shares
from foldscan.parallel.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding
from helpers import assert_budget
from simulated import run_ranks

H, V = 7, 23
# Rows of each rank: uneven, none on some, none at all.
COUNTS = ((9,), (5, 8), (0, 6), (4, 0, 3), (0, 0, 0), (3, 1, 4, 1))
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, weight, targets of which some are ignored, gradients of the rows' losses."""
    g = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, H, generator=g, dtype=torch.float64) * 2 for n in (rows, V))
    targets = torch.randint(0, V, (rows,), generator=g)
    targets[2::5] = -100
    return hidden.to(dtype), weight.to(dtype), targets, torch.randn(rows, generator=g, dtype=torch.float64)


def full_softmax(hidden, weight, targets, upstream, softcap: float, z_loss: float) -> Results:
    """Loss of every row, gradients of hidden and weight, from all logits in fp64."""
    hidden, weight = (t.double().requires_grad_() for t in (hidden.detach().clone(), weight.detach().clone()))
    logits = hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    loss = loss + z_loss * torch.where(targets == -100, 0, torch.logsumexp(logits, 1)).square()
    loss.backward(upstream)
    return loss.detach(), hidden.grad, weight.grad  # type: ignore[return-value]


def divided(hidden, weight, targets, upstream, counts: Sequence[int], monkeypatch, **options) -> Results:
    size = len(counts)

    def worker(group: Group) -> Results:
        rows = hidden.split(list(counts))[group.index].clone().requires_grad_()
        shard = weight.split(shares(V, size))[group.index].clone().requires_grad_()
        loss = vocab_parallel_cross_entropy(rows, shard, targets, group, counts=counts, vocab_size=V, **options)
        assert loss.shape == (counts[group.index],)
        loss.backward(upstream.split(list(counts))[group.index].to(loss.dtype))
        return loss.detach(), rows.grad, shard.grad  # type: ignore[return-value]

    loss, dhidden, dweight = (torch.cat(parts) for parts in zip(*run_ranks(size, worker, monkeypatch)))
    return loss, dhidden, dweight


@pytest.mark.parametrize("softcap, z_loss", [(0.0, 0.0), (5.0, 0.0), (0.0, 0.01), (5.0, 0.01)])
def test_loss_equals_the_full_softmax(softcap: float, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for counts in COUNTS:
            inputs = tensors(sum(counts), dtype)
            want = full_softmax(*inputs, softcap, z_loss)
            got = divided(*inputs, counts, monkeypatch, softcap=softcap, z_loss=z_loss)
            again = divided(*inputs, counts, monkeypatch, softcap=softcap, z_loss=z_loss)
            for g, a, w in zip(got, again, want):
                assert g.dtype == dtype and torch.equal(g, a)
                torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance * 10)


def test_bf16_and_autocast_stay_in_the_budget_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, upstream = tensors(64, torch.bfloat16)
    truth = full_softmax(hidden, weight, targets, upstream, 0.0, 0.0)
    one, head = (t.clone().requires_grad_() for t in (hidden, weight))
    loss = ops.linear_cross_entropy(one, head, targets, reduction="none")
    loss.backward(upstream.float())
    for counts in ((30, 34), (10, 20, 0, 34)):
        got = divided(hidden, weight, targets, upstream, counts, monkeypatch)
        for name, g, e, t in zip(("loss", "dhidden", "dweight"), got, (loss.detach(), one.grad, head.grad), truth):
            assert e is not None and g.dtype == e.dtype
            assert_budget(name, g, e, t)
    counts = (30, 34)

    def cast(group: Group) -> torch.Tensor:
        shard = weight.float().split(shares(V, 2))[group.index]
        with torch.autocast("cpu", torch.bfloat16):
            rows = hidden.float().split(list(counts))[group.index]
            return vocab_parallel_cross_entropy(rows, shard, targets, group, counts=counts, vocab_size=V)

    assert torch.equal(
        torch.cat(run_ranks(2, cast, monkeypatch)), divided(hidden, weight, targets, upstream, counts, monkeypatch)[0]
    )


def test_one_rank_has_the_bits_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, upstream = tensors(9, torch.float32)
    loss, _, _ = divided(hidden, weight, targets, upstream, (9,), monkeypatch, z_loss=0.1)
    assert torch.equal(loss, ops.linear_cross_entropy(hidden, weight, targets, reduction="none", z_loss=0.1))


def test_embedding_is_the_whole_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for counts in COUNTS:
            size = len(counts)
            upstream, weight, ids, _ = tensors(sum(counts), dtype)
            ids = ids.clamp(min=0)
            ids[1::3] = ids[:1]  # one id often
            table = weight.double().clone().requires_grad_()
            want = F.embedding(ids, table)
            want.backward(upstream.double())

            def worker(group: Group, counts=counts, upstream=upstream, weight=weight, ids=ids, size=size):
                shard = weight.split(shares(V, size))[group.index].clone().requires_grad_()
                rows = vocab_parallel_embedding(ids, shard, group, counts=counts, vocab_size=V)
                rows.backward(upstream.split(list(counts))[group.index])
                return rows.detach(), shard.grad

            rows, grad = (torch.cat(parts) for parts in zip(*run_ranks(size, worker, monkeypatch)))
            assert rows.dtype == dtype and torch.equal(rows, want.detach().to(dtype))
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
            torch.testing.assert_close(grad.double(), table.grad, rtol=tolerance, atol=tolerance)


def test_errors_name_the_argument() -> None:
    hidden, weight, targets, _ = tensors(9, torch.float32)
    group = Group("tp", (0,), 0)
    known = {"counts": (9,), "vocab_size": V}
    bad = targets.clone()
    bad[0] = V
    for call, message in (
        (lambda: vocab_parallel_cross_entropy(hidden, weight, bad, group, **known), r"targets: got 23, want \[0, 23\)"),
        (lambda: vocab_parallel_embedding(targets, weight, group, **known), "ids: got -100, want"),
        (lambda: vocab_parallel_embedding(bad, weight, group, **known), "ids: got 23, want"),
        (
            lambda: vocab_parallel_cross_entropy(hidden, weight[1:], targets, group, **known),
            "weight: got 22 rows, want 23, the share of rank 0 of 23",
        ),
        (
            lambda: vocab_parallel_cross_entropy(hidden[1:], weight, targets, group, **known),
            r"hidden: got shape \(8, 7\), want \(9, 7\)",
        ),
        (
            lambda: vocab_parallel_cross_entropy(hidden, weight, targets[1:], group, **known),
            r"targets: got shape \(8,\), want \(9\)",
        ),
        (
            lambda: vocab_parallel_embedding(targets, weight, group, counts=(4, 5), vocab_size=V),
            "counts: got 2 numbers of rows, want one for each of the 1 ranks",
        ),
        (
            lambda: vocab_parallel_embedding(targets, weight[:0], group, counts=(9,), vocab_size=0),
            "vocab_size: got 0, want at least a row for each of the 1 ranks",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
