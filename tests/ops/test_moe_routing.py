"""topk_route, permute, unpermute and the router's losses: exact choices, ties, capacity, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from foldscan import ops
from helpers import assert_budget, check_op, relative_rmse
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16]
MODES: list[dict[str, Any]] = [
    {},
    {"pre_softmax": True},
    {"pre_softmax": True, "normalize": False, "scaling": 16.0},
    {"score": "sigmoid", "scaling": 2.5},
    {"score": "sigmoid", "normalize": False},
]


def route_oracle(
    logits: torch.Tensor,
    k: int,
    *,
    score: str = "softmax",
    pre_softmax: bool = False,
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    groups_topk: int = 1,
    scaling: float = 1.0,
    normalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token and one expert at a time, by Python's sort."""
    all_probs, all_experts = [], []
    for row in logits:
        E = row.shape[0]
        if score == "sigmoid":
            scores = 1 / (1 + torch.exp(-row))
        else:
            scores = torch.exp(row - row.max()) / torch.exp(row - row.max()).sum() if pre_softmax else row
        value = [float(scores[e].detach()) + (0.0 if bias is None else float(bias[e])) for e in range(E)]
        allowed = list(range(E))
        if num_groups > 1:
            size = E // num_groups
            counted = max(1, k // groups_topk)
            totals = [sum(sorted(value[g * size : (g + 1) * size], reverse=True)[:counted]) for g in range(num_groups)]
            best = sorted(range(num_groups), key=lambda g: (-totals[g], g))[:groups_topk]
            allowed = [e for e in range(E) if e // size in best]
        chosen = sorted(allowed, key=lambda e: (-value[e], e))[:k]
        p = scores[chosen]
        if score == "softmax" and not pre_softmax:
            p = torch.exp(p - p.max()) / torch.exp(p - p.max()).sum()
        elif normalize:
            p = p / p.sum()
        all_probs.append(p * scaling)
        all_experts.append(torch.tensor(chosen))
    return torch.stack(all_probs), torch.stack(all_experts)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_choice_probabilities_and_gradient(mode: dict[str, Any], biased: bool, groups: tuple[int, int]) -> None:
    torch.manual_seed(0)
    T, E, k = 19, 24, 5
    logits, grad = torch.randn(T, E, dtype=torch.float64) * 2, torch.randn(T, k, dtype=torch.float64)
    bias = torch.randn(E) * 0.3 if biased else None
    limit = {} if groups == (1, 1) else {"num_groups": groups[0], "groups_topk": groups[1]}
    truth_in = logits.float().double().requires_grad_()
    probs, experts = route_oracle(truth_in, k, bias=bias, **mode, **limit)
    probs.backward(grad)
    ours_in = logits.float().requires_grad_()
    ours, chosen = ops.topk_route(ours_in, k, bias=bias, **mode, **limit)
    ours.backward(grad.float())
    assert torch.equal(chosen, experts)
    assert ours.dtype == torch.float32
    assert relative_rmse(ours, probs) < 1e-6
    assert truth_in.grad is not None and ours_in.grad is not None
    assert relative_rmse(ours_in.grad, truth_in.grad) < 3e-6


@pytest.mark.parametrize(("T", "E", "k"), [(0, 4, 2), (1, 1, 1), (3, 17, 17), (5, 130, 8), (2, 512, 10)])
def test_route_odd_shapes(T: int, E: int, k: int) -> None:
    logits = torch.randn(T, E)
    probs, experts = ops.topk_route(logits, k)
    assert probs.shape == experts.shape == (T, k)
    if T:
        want, chosen = route_oracle(logits.double(), k)
        assert torch.equal(experts, chosen)
        assert relative_rmse(probs, want) < 1e-6
    if k == E and T:
        assert torch.equal(experts.sort(-1).values, torch.arange(E).expand(T, E))


def test_ties_go_to_the_lower_expert_and_a_nan_shows() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-math.inf, -math.inf, 0.0, 0.0, 0.0]])
    assert ops.topk_route(logits, 2)[1].tolist() == [[1, 2], [0, 1], [2, 3]]
    assert ops.topk_route(logits, 4, score="sigmoid")[1].tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [2, 3, 4, 0]]
    groups = ops.topk_route(torch.zeros(1, 8), 2, num_groups=4, groups_topk=2)[1]
    assert groups.tolist() == [[0, 1]]
    logits[0, 3] = math.nan
    probs, experts = ops.topk_route(logits, 2)
    assert experts[0].tolist() == [3, 1]
    assert probs[0].isnan().any()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, and NaN in the same places."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("E", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65])
def test_choice_at_the_edges_of_blocks_and_lists(E: int) -> None:
    """Many equal logits, infinities and NaN; a row has the same bits alone as anywhere in a batch."""
    g = torch.Generator().manual_seed(E)
    for T in (1, 4, 15, 16, 17, 33):
        logits = torch.randint(-2, 3, (T, E), generator=g) / 2
        logits[torch.rand(T, E, generator=g) < 0.15] = -math.inf
        odd = logits.clone()
        odd[torch.rand(T, E, generator=g) < 0.1] = math.nan
        bias = torch.randint(-2, 3, (E,), generator=g) / 4
        for k in sorted({1, 2, 3, 4, 5, 8, 9, 16, 17, E} & set(range(1, E + 1))):
            for x, steer in ((logits, None), (logits, bias), (odd, bias)):
                probs, experts = ops.topk_route(x, k, bias=steer)
                value = (x if steer is None else x + steer).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
                assert torch.equal(experts, value.sort(dim=-1, descending=True, stable=True).indices[:, :k])
                want = torch.softmax(x.double().gather(1, experts), -1)
                assert torch.equal(probs.isnan(), want.isnan())
                assert (probs - want).nan_to_num(0.0).abs().max() < 3e-7
                for t in {0, T // 2, T - 1}:
                    alone = ops.topk_route(x[t : t + 1], k, bias=steer)
                    assert same_bits(alone[0], probs[t : t + 1])
                    assert torch.equal(alone[1], experts[t : t + 1])


@pytest.mark.parametrize("mode", MODES)
def test_a_token_has_the_same_route_in_every_place(mode: dict[str, Any]) -> None:
    logits, bias = torch.randn(53, 40, generator=torch.Generator().manual_seed(0)), torch.linspace(-0.1, 0.1, 40)
    for k in (2, 7, 12, 20):
        full = ops.topk_route(logits, k, bias=bias, **mode)
        # Where all groups are chosen, all experts are scanned token by token.
        groups = ops.topk_route(logits, k, bias=bias, num_groups=2, groups_topk=2, **mode)
        for part in (slice(0, 1), slice(5, 22), slice(37, 53), slice(50, 53)):
            for a, b, c in zip(full, ops.topk_route(logits[part], k, bias=bias, **mode), groups):
                assert torch.equal(a[part], b)
                assert torch.equal(a, c)


def test_more_experts_than_lists_in_lanes_are_made_for() -> None:
    logits = torch.randn(17, 4100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.topk_route(logits, 3)[1], logits.topk(3).indices)
    assert torch.equal(ops.topk_route(logits[:, :4096], 3)[1], logits[:, :4096].topk(3).indices)


def test_bias_steers_the_choice_and_nothing_else() -> None:
    logits, bias = torch.randn(40, 8), torch.zeros(8)
    bias[3] = 10.0
    probs, experts = ops.topk_route(logits, 2, score="sigmoid", normalize=False, bias=bias)
    assert (experts[:, 0] == 3).all()
    assert relative_rmse(probs, torch.sigmoid(logits.double()).gather(1, experts)) < 1e-6


def test_route_takes_half_precision_and_does_not_depend_on_other_tokens() -> None:
    logits = torch.randn(300, 33)
    full = ops.topk_route(logits, 4)
    for a, b in zip(full, ops.topk_route(logits[7:8], 4)):
        assert torch.equal(a[7:8], b)
    torch.set_num_threads(1)
    for a, b in zip(full, ops.topk_route(logits.t().contiguous().t(), 4)):
        assert torch.equal(a, b)
    for dtype in (torch.bfloat16, torch.float16):
        low = logits.to(dtype).requires_grad_()
        probs, experts = ops.topk_route(low, 4)
        assert torch.equal(experts, ops.topk_route(low.detach().float(), 4)[1])
        probs[:, 0].sum().backward()
        assert low.grad is not None and low.grad.dtype == dtype


def permute_oracle(
    experts: list[list[int]], E: int, capacity: int | None, policy: str, probs: torch.Tensor | None
) -> list[list[tuple[int, int]]]:
    """(token, slot) pairs that every expert keeps, in order."""
    kept = []
    for e in range(E):
        mine = [(t, j) for t, row in enumerate(experts) for j, x in enumerate(row) if x == e]
        if capacity is not None and len(mine) > capacity:
            if policy == "probs":
                assert probs is not None
                mine = sorted(sorted(mine, key=lambda a: (-float(probs[a]), a))[:capacity])
            else:
                mine = mine[:capacity]
        kept.append(mine)
    return kept


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 30),
    E=st.integers(1, 7),
    k=st.integers(1, 4),
    capacity=st.one_of(st.none(), st.integers(0, 9)),
    policy=st.sampled_from(["probs", "position"]),
    pad=st.booleans(),
    ties=st.booleans(),
    seed=st.integers(0, 5),
)
def test_permute_keeps_exactly_what_the_policy_says(
    T: int, E: int, k: int, capacity: int | None, policy: Any, pad: bool, ties: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    pad = pad and capacity is not None
    tokens = torch.randn(T, 5, generator=g)
    experts = torch.randint(-1, E, (T, k), generator=g)
    probs = torch.randint(0, 3, (T, k), generator=g) / 2 if ties else torch.rand(T, k, generator=g)
    permuted, p = ops.permute(
        tokens, experts, E, capacity=capacity, drop_policy=policy, probs=probs, pad_to_capacity=pad
    )
    kept = permute_oracle(experts.tolist(), E, capacity, policy, probs)
    assert p.counts.tolist() == [len(x) for x in kept]
    assert p.probs is not None
    begin = 0
    where = {}
    for e, mine in enumerate(kept):
        for i, (t, j) in enumerate(mine):
            where[t, j] = begin + i
            assert p.rows[begin + i] == t * k + j
            assert torch.equal(permuted[begin + i], tokens[t])
            assert p.probs[begin + i] == probs[t, j]
        end = begin + (capacity if pad and capacity is not None else len(mine))
        assert p.rows[begin + len(mine) : end].tolist() == [-1] * (end - begin - len(mine))
        assert permuted[begin + len(mine) : end].abs().sum() == 0
        assert p.offs[e] == end
        begin = end
    assert permuted[begin:].abs().sum() == 0
    assert p.inverse.tolist() == [[where.get((t, j), -1) for j in range(k)] for t in range(T)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("capacity", [None, 4])
def test_round_trip_and_gradients(capacity: int | None, weighted: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    T, E, k, H = 23, 5, 3, 37
    experts, probs = torch.randint(0, E, (T, k)), torch.rand(T, k)
    tokens, grad = torch.randn(T, H).to(dtype), torch.randn(T, H).to(dtype)
    kept = permute_oracle(experts.tolist(), E, capacity, "probs", probs)
    mask = torch.zeros(T, k, dtype=torch.float64)
    for mine in kept:
        for a in mine:
            mask[a] = 1

    def oracle(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * ((w if weighted else torch.ones_like(w)) * mask.to(w.dtype)).sum(1, keepdim=True).to(x.dtype)

    results = []
    for cast in (dtype, torch.float64):
        x = tokens.to(cast).clone().requires_grad_()
        w = probs.to(torch.promote_types(cast, torch.float32)).clone().requires_grad_()
        oracle(x, w).backward(grad.to(cast))
        results.append((oracle(x, w).detach(), x.grad, w.grad))
    x, w = tokens.clone().requires_grad_(), probs.clone().requires_grad_()
    permuted, p = ops.permute(x, experts, E, capacity=capacity, probs=w)
    out = ops.unpermute(permuted, p, w if weighted else None)
    out.backward(grad)
    names = ("output", "tokens", "probs") if weighted else ("output", "tokens")
    for name, ours, eager, truth in zip(names, (out.detach(), x.grad, w.grad), *results):
        assert ours is not None and eager is not None and truth is not None
        assert_budget(name, ours, eager, truth)


@pytest.mark.parametrize("H", [0, 1, 15, 16, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_copied_bit_by_bit_and_summed_in_order(dtype: torch.dtype, H: int) -> None:
    g = torch.Generator().manual_seed(H)
    tokens = torch.randn(9, H, generator=g).to(dtype)
    tokens[0], tokens[1] = math.inf, -0.0
    experts, probs = torch.randint(-1, 4, (9, 3), generator=g), torch.rand(9, 3, generator=g)
    permuted, p = ops.permute(tokens, experts, 4, capacity=6, probs=probs, pad_to_capacity=True)
    ints = torch.int16 if dtype == torch.bfloat16 else torch.int32
    for r, row in enumerate(p.rows.tolist()):
        want = torch.zeros(H, dtype=dtype) if row < 0 else tokens[row // 3]
        assert torch.equal(permuted[r].view(ints), want.view(ints))
    out = ops.unpermute(permuted, p)
    for t in range(9):
        total = torch.zeros(H)
        for r in p.inverse[t].tolist():
            total = total + permuted[r].float() if r >= 0 else total
        assert torch.equal(out[t], total.to(dtype))


def test_permuted_probs_carry_their_gradient_and_padding_changes_nothing() -> None:
    experts, probs = torch.tensor([[0, 1], [0, 2], [0, 1]]), torch.tensor([[0.5, 0.1], [0.9, 0.2], [0.7, 0.3]])
    tokens = torch.randn(3, 4)
    for pad in (False, True):
        w = probs.clone().requires_grad_()
        permuted, p = ops.permute(tokens, experts, 4, capacity=2, probs=w, pad_to_capacity=pad)
        assert p.probs is not None
        assert permuted.shape[0] == (8 if pad else 6)
        p.probs.square().sum().backward()
        assert w.grad is not None
        # Expert 0 keeps its two most probable: token 0 is dropped there.
        assert w.grad[0, 0] == 0
        assert torch.equal(w.grad[1:], 2 * probs[1:])
        out = ops.unpermute(permuted, p, probs)
        assert relative_rmse(out, tokens * torch.tensor([[0.1], [1.1], [1.0]])) < 1e-6


def test_expert_capacity_rounds_up() -> None:
    assert [ops.expert_capacity(*a) for a in ((10, 2, 8, 1.0), (16, 2, 8, 1.0), (0, 2, 8, 1.0), (7, 1, 2, 1.25))] == [
        3,
        4,
        0,
        5,
    ]


def test_permute_then_grouped_mm_equals_the_fused_layer() -> None:
    torch.manual_seed(0)
    T, E, k, H, F = 60, 6, 2, 32, 48
    x, up, down = torch.randn(T, H), torch.randn(E, F, H) / 6, torch.randn(E, H, F) / 7
    probs, experts = ops.topk_route(torch.randn(T, E), k)
    permuted, p = ops.permute(x, experts, E)
    hidden = torch.relu(ops.grouped_mm(permuted, up.transpose(1, 2), p.offs)).square()
    out = ops.unpermute(ops.grouped_mm(hidden, down.transpose(1, 2), p.offs), p, probs)
    assert relative_rmse(ops.moe_mlp(x, probs, experts, up, down, activation="relu2"), out) < 1e-6


def test_load_balancing_loss() -> None:
    T, E, k = 24, 4, 2
    even = torch.arange(T * k).view(T, k) % E
    assert ops.load_balancing_loss(torch.zeros(T, E), even, E).item() == pytest.approx(1.0)
    one = torch.zeros(T, 1, dtype=torch.long)
    peaked = torch.tensor([50.0, 0, 0, 0]).expand(T, E)
    assert ops.load_balancing_loss(peaked, one).item() == pytest.approx(E)

    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    experts = torch.randint(0, E, (T, k))
    experts[3, 1] = -1
    mask = torch.rand(T) > 0.3
    for score in ("softmax", "sigmoid"):
        want, n = 0.0, mask.sum().item()
        p = torch.softmax(logits, -1) if score == "softmax" else torch.sigmoid(logits)
        p = p / p.sum(-1, keepdim=True)
        for e in range(E):
            load = sum(int(mask[t]) * int(experts[t, j] == e) for t in range(T) for j in range(k))
            want = want + load * p[mask, e].sum() * E / (k * n * n)
        got = ops.load_balancing_loss(logits, experts, score=score, mask=mask)  # type: ignore[arg-type]
        assert torch.allclose(got, want, rtol=1e-12)  # type: ignore[arg-type]
        assert torch.autograd.gradcheck(lambda x, s=score: ops.load_balancing_loss(x, experts, score=s), logits)

    halves = [ops.load_balancing_loss(logits[i : i + 12], experts[i : i + 12]) for i in (0, 12)]
    both = ops.load_balancing_loss(logits, experts, num_sequences=2)
    assert torch.allclose(both, (halves[0] + halves[1]) / 2, rtol=1e-12)
    counts = torch.bincount(experts[experts >= 0], minlength=E)
    given_counts = ops.load_balancing_loss(logits, experts, tokens_per_expert=counts)
    assert torch.allclose(given_counts, ops.load_balancing_loss(logits, experts), rtol=1e-12)
    assert ops.load_balancing_loss(logits, experts, mask=torch.zeros(T, dtype=torch.bool)).item() == 0.0


def test_router_z_loss() -> None:
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(9) % 3 == 0
    want = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits[mask].tolist()) / 3
    assert ops.router_z_loss(logits, mask=mask).item() == pytest.approx(want, rel=1e-12)
    assert ops.router_z_loss(torch.full((7, 4), 2.0)).item() == pytest.approx((2 + math.log(4)) ** 2, rel=1e-6)
    assert torch.autograd.gradcheck(ops.router_z_loss, logits)
    assert ops.router_z_loss(logits[:0]).item() == 0.0


def test_every_backend_gives_the_same_routing_and_permutation() -> None:
    torch.manual_seed(0)
    logits, tokens, bias = torch.randn(30, 12), torch.randn(30, 6), torch.randn(12) * 0.1
    kwargs: dict[str, Any] = {"score": "sigmoid", "bias": bias, "num_groups": 3, "groups_topk": 2}
    probs, experts = ops.topk_route(logits, 4, **kwargs)
    permuted, p = ops.permute(tokens, experts, 12, capacity=8, probs=probs)
    out = ops.unpermute(permuted, p, probs)
    with ops.backend("reference"):
        probs2, experts2 = ops.topk_route(logits, 4, **kwargs)
        permuted2, p2 = ops.permute(tokens, experts, 12, capacity=8, probs=probs)
        assert relative_rmse(ops.unpermute(permuted2, p2, probs), out) < 1e-6
    assert torch.equal(experts, experts2)
    assert relative_rmse(probs, probs2) < 1e-6
    assert torch.equal(permuted, permuted2)
    for a, b in zip(p, p2):
        assert a is not None and b is not None
        assert torch.equal(a, b)


def test_bad_arguments_are_named() -> None:
    logits, tokens, experts = torch.randn(4, 6), torch.randn(4, 3), torch.zeros(4, 2, dtype=torch.long)
    cases: list[tuple[str, Any]] = [
        ("k: got 7", lambda: ops.topk_route(logits, 7)),
        ("num_groups: got 4", lambda: ops.topk_route(logits, 2, num_groups=4, groups_topk=1)),
        ("groups_topk: got None", lambda: ops.topk_route(logits, 2, num_groups=3)),
        ("groups_topk: got 1", lambda: ops.topk_route(logits, 3, num_groups=3, groups_topk=1)),
        ("score: got 'tanh'", lambda: ops.topk_route(logits, 2, score="tanh")),  # type: ignore[arg-type]
        ("pre_softmax: got True", lambda: ops.topk_route(logits, 2, score="sigmoid", pre_softmax=True)),
        ("bias: got shape", lambda: ops.topk_route(logits, 2, bias=torch.zeros(5))),
        ("experts: got indices", lambda: ops.permute(tokens, experts + 3, 3)),
        ("experts: got shape", lambda: ops.permute(tokens, experts[:2], 3)),
        ("capacity: got -1", lambda: ops.permute(tokens, experts, 3, capacity=-1)),
        ("capacity: got None", lambda: ops.permute(tokens, experts, 3, pad_to_capacity=True)),
        ("probs: got None", lambda: ops.permute(tokens, experts, 3, capacity=2)),
        ("drop_policy: got", lambda: ops.permute(tokens, experts, 3, drop_policy="random")),  # type: ignore[arg-type]
        ("permuted: got shape", lambda: ops.unpermute(tokens, ops.permute(tokens, experts, 3)[1])),
        ("num_experts: got 5", lambda: ops.load_balancing_loss(logits, experts, 5)),
        ("num_sequences: got 3", lambda: ops.load_balancing_loss(logits, experts, num_sequences=3)),
        ("mask: got shape", lambda: ops.router_z_loss(logits, mask=torch.ones(3, dtype=torch.bool))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="permutation: got tuple"):
        ops.unpermute(tokens, (1, 2))  # type: ignore[arg-type]


def test_opcheck_and_compile() -> None:
    torch.manual_seed(0)
    k = torch.ops.foldscan
    logits = torch.randn(9, 6, requires_grad=True)
    check_op(
        k.moe_route,
        (logits, torch.zeros(6), 2, True, False, 3, 2, 2.5, True),
        public=ops.topk_route,
        public_args=(logits, 2),
        public_kwargs={"score": "sigmoid", "bias": torch.zeros(6), "num_groups": 3, "groups_topk": 2},
    )
    tokens, probs = torch.randn(9, 4, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    experts = torch.randint(0, 6, (9, 2))
    for capacity, pad in ((-1, False), (2, False), (2, True)):
        torch.library.opcheck(k.moe_sort, (experts, probs.detach(), 6, capacity, False, pad))
    rows, inverse, _, _ = k.moe_sort(experts, None, 6, -1, True, False)
    torch.library.opcheck(k.moe_gather, (tokens, rows, inverse.view(9, 2), 2))
    torch.library.opcheck(k.moe_combine, (torch.randn(18, 4, requires_grad=True), rows, inverse.view(9, 2), probs))

    def both(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        permuted, p = ops.permute(x, experts, 6, capacity=3, probs=w)
        return ops.unpermute(permuted, p, w) + ops.router_z_loss(x) + ops.load_balancing_loss(x, experts % 4)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(both(tokens, probs), compiled(tokens, probs))
    grads = [torch.autograd.grad(f(tokens, probs).square().sum(), (tokens, probs)) for f in (both, compiled)]
    for a, b in zip(*grads):
        assert torch.equal(a, b)
