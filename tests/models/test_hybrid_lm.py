"""The model: batched, packed and alone are the same bits; losses, gradients and initialisation are as stated."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foldscan.models import HybridConfig, HybridLM
from foldscan.nn import Mamba2Mixer
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "state_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rope_theta": 1e4,
    "intermediate_size": 48,
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "initializer_range": 0.2,
}


def make(pattern: str = "M*-E", **changes: Any) -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(HybridConfig(**{**SHAPE, "pattern": pattern, **changes}))


def tokens(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SHAPE["vocab_size"], (n,), generator=generator) for n in lengths]


def pack(sequences: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([0, *(len(s) for s in sequences)])
    return torch.cat(sequences), lengths.cumsum(0).int()


@pytest.mark.parametrize("pattern", ["M", "*", "-", "E", "ME*-M"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@torch.no_grad()
def test_packed_batched_and_alone_are_the_same_bits(pattern: str, precision: str) -> None:
    model = make(pattern).eval()
    if precision == "bf16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        sequences = tokens(1, 70, 33, 2)
        flat, cu = pack(sequences)
        packed = model(flat, cu_seqlens=cu).split([len(s) for s in sequences])
        for sequence, rows in zip(sequences, packed):
            assert torch.equal(model(sequence), rows)
            assert torch.equal(model.logits(model(sequence)), model.logits(rows))
        twice = model(torch.stack([sequences[1], sequences[1].flip(0)]))
        assert torch.equal(twice[0], packed[1])
        assert torch.equal(model(flat[None], cu_seqlens=cu)[0], torch.cat(packed))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(lambda v: sum(v) > 0))
@torch.no_grad()
def test_any_packing_with_empty_sequences(lengths: list[int]) -> None:
    model = make("M*E").eval()
    sequences = tokens(*lengths)
    flat, cu = pack(sequences)
    rows = model(flat, cu_seqlens=cu).split(lengths)
    for sequence, got in zip(sequences, rows):
        if len(sequence):
            assert torch.equal(model(sequence), got)


@torch.no_grad()
def test_a_token_sees_only_what_is_before_it() -> None:
    model = make("M*E").eval()
    (sequence,) = tokens(40)
    changed = sequence.clone()
    changed[25] = (changed[25] + 1) % SHAPE["vocab_size"]
    before, after = model(sequence), model(changed)
    assert torch.equal(before[:25], after[:25])
    assert not torch.equal(before[25], after[25]) and not torch.equal(before[39], after[39])


@torch.no_grad()
def test_rotary_positions_restart_and_shift() -> None:
    model = make("*").eval()
    first, second = tokens(20, 20)
    flat, cu = pack([first, second])
    default = model(flat, cu_seqlens=cu)
    explicit = model(flat, cu_seqlens=cu, position_ids=torch.arange(20).repeat(2))
    assert torch.equal(default, explicit)
    # Rotary attention depends on differences of positions only.
    torch.testing.assert_close(model(first, position_ids=torch.arange(20) + 9), model(first), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(first, position_ids=torch.arange(20) * 2), model(first), atol=1e-3)


@torch.no_grad()
def test_a_sliding_window_forgets() -> None:
    model = make("*", sliding_window=5).eval()
    (sequence,) = tokens(30)
    changed = sequence.clone()
    changed[10] = (changed[10] + 1) % SHAPE["vocab_size"]
    differs = (model(sequence) != model(changed)).any(-1).nonzero().flatten().tolist()
    assert differs == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_cross_entropy_of_the_logits(tied: bool) -> None:
    model = make(tie_embeddings=tied)
    (ids,), (labels,) = tokens(50), tokens(50, seed=1)
    labels[7] = -100
    loss = model.loss(ids, labels)
    want = F.cross_entropy(model.logits(model(ids)), labels, ignore_index=-100)
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    names = {n for n, p in model.named_parameters()}
    got = dict(zip(names, torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names])))
    expected = dict(zip(names, torch.autograd.grad(want, [dict(model.named_parameters())[n] for n in names])))
    for name in names:
        torch.testing.assert_close(got[name], expected[name], atol=2e-5, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_match_finite_differences() -> None:
    """Along the gradient itself, through every kind of layer; the slope there is the gradient's squared length."""
    model = make("M*-", initializer_range=0.3)  # a router's choice is not differentiable: it is tested with its op
    (ids,), (labels,) = tokens(24), tokens(24, seed=1)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model.loss(ids, labels), parameters)
    slope = sum(float(g.double().square().sum()) for g in gradients)
    step = 0.01 / slope  # moves the loss by about 0.01 each way

    @torch.no_grad()
    def at(scale: float) -> float:
        for p, g in zip(parameters, gradients):
            p.add_(g, alpha=scale)
        value = float(model.loss(ids, labels))
        for p, g in zip(parameters, gradients):
            p.add_(g, alpha=-scale)
        return value

    assert slope == pytest.approx((at(step) - at(-step)) / (2 * step), rel=0.01)


def test_packed_gradients_are_the_sum_of_separate_ones() -> None:
    model = make("M*-E")
    sequences, targets = tokens(17, 40), tokens(17, 40, seed=1)
    flat, cu = pack(sequences)
    total = model.loss(flat, torch.cat(targets), cu_seqlens=cu)
    whole = torch.autograd.grad(total, list(model.parameters()))
    weighted = sum(len(s) * model.loss(s, t) for s, t in zip(sequences, targets)) / len(flat)
    parts = torch.autograd.grad(weighted, list(model.parameters()))
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_no_bit(autocast: bool) -> None:
    model = make("M*-E", load_balancing_coef=0.1, router_z_coef=0.01)
    (ids,), (labels,) = tokens(40), tokens(40, seed=1)
    results = []
    for model.activation_checkpointing in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss(ids, labels)
        results.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


def test_router_losses_are_added_with_their_coefficients() -> None:
    (ids,), (labels,) = tokens(64), tokens(64, seed=1)
    plain = make("EE").loss_parts(ids, labels)
    full = make("EE", load_balancing_coef=0.5, router_z_coef=0.25).loss_parts(ids, labels)
    want = plain.cross_entropy + 0.5 * plain.load_balancing + 0.25 * plain.router_z
    torch.testing.assert_close(full.total, want)
    assert plain.expert_counts is not None and plain.expert_counts.shape == (2, 4)
    assert plain.expert_counts.sum(1).tolist() == [128, 128]
    assert float(plain.load_balancing) >= 0.99
    assert make("M").loss_parts(ids, labels).expert_counts is None


def test_router_bias_evens_the_load() -> None:
    model = make("E", router_score="sigmoid", router_bias=True, router_bias_rate=0.05, experts_per_token=1)
    (ids,), (labels,) = tokens(200), tokens(200, seed=1)

    bias = model.layers[0].mixer.gate.e_score_correction_bias
    bias[0] = 1.0  # sigmoid scores are below 1: expert 0 takes every token

    def worst() -> float:
        counts = model.loss_parts(ids, labels).expert_counts
        assert counts is not None
        return float(counts.max()) / 50

    assert worst() == 4.0
    for _ in range(60):
        counts = model.loss_parts(ids, labels).expert_counts
        assert counts is not None
        model.update_router_bias(counts)
    assert worst() < 1.5


def test_initialisation_is_as_published() -> None:
    model = make("M" * 9, hidden_size=64, mamba_num_heads=64, mamba_head_dim=4, initializer_range=0.02)
    mixers = [m for m in model.modules() if isinstance(m, Mamba2Mixer)]
    a = torch.cat([m.A_log.detach().exp() for m in mixers])
    assert 1 <= float(a.min()) < 2 and 15 < float(a.max()) <= 16
    dt = F.softplus(torch.cat([m.dt_bias.detach() for m in mixers]))
    assert 0.99e-3 < float(dt.min()) < 1.2e-3 and 0.08 < float(dt.max()) < 0.1001
    assert abs(float(dt.log().mean()) - math.log(1e-2)) < 0.2  # log-uniform between 1e-3 and 1e-1
    assert all(bool((m.D == 1).all()) for m in mixers)
    inner = torch.stack([m.in_proj.weight.detach() for m in mixers]).std()
    outer = torch.stack([m.out_proj.weight.detach() for m in mixers]).std()
    assert float(inner) == pytest.approx(0.02, rel=0.05)
    assert float(outer) == pytest.approx(0.02 / 3, rel=0.05)
    conv = torch.stack([m.conv1d.weight.detach() for m in mixers])
    assert float(conv.abs().max()) <= 0.5 and float(conv.std()) == pytest.approx(1 / math.sqrt(12), rel=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(3)), TypeError, "input_ids: got dtype"),
        (lambda m: m(torch.zeros(1, 1, 1, dtype=torch.int64)), ValueError, "input_ids: got shape"),
        (lambda m: m(torch.tensor([0, 61])), ValueError, "input_ids: got ids from 0 to 61"),
        (lambda m: m(torch.tensor([-1])), ValueError, "input_ids: got ids from -1"),
        (lambda m: m(torch.tensor([1, 2]), cu_seqlens=torch.tensor([0, 2])), TypeError, "cu_seqlens: got dtype"),
        (lambda m: m(torch.tensor([1, 2]), cu_seqlens=torch.tensor([0, 3]).int()), ValueError, "cu_seqlens: got"),
        (lambda m: m(torch.tensor([1, 2]), cu_seqlens=torch.tensor([0, 2, 1, 2]).int()), ValueError, "cu_seqlens"),
        (
            lambda m: m(torch.ones(2, 2, dtype=torch.int64), cu_seqlens=torch.tensor([0, 4]).int()),
            ValueError,
            "input_ids: got shape",
        ),
        (lambda m: m.loss(torch.tensor([1, 2]), torch.tensor([1])), ValueError, "labels: got shape"),
        (lambda m: m(torch.tensor([1]), position_ids=torch.tensor([1, 2])), ValueError, "position_ids"),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make("*"))
