"""Upcycled models compute what the dense model computed, whatever the router chooses, and their experts can part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foldscan.models import HybridConfig, HybridLM, upcycle


def dense(**changes: Any) -> HybridLM:
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "pattern": "M-*-",
        "vocab_size": 53,
        "hidden_size": 32,
        "mamba_num_heads": 2,
        "mamba_head_dim": 16,
        "state_size": 8,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "initializer_range": 0.1,
    }
    return HybridLM(HybridConfig(**(values | changes)))


@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize(("experts", "k", "granularity"), [(4, 1, 1), (4, 2, 1), (3, 3, 1), (4, 2, 3), (8, 1, 4)])
def test_logits_are_the_dense_models(activation: str, experts: int, k: int, granularity: int) -> None:
    model = dense(mlp_activation=activation)
    sparse = upcycle(model, experts, k, granularity=granularity)
    assert sparse.config.pattern == "ME*E"
    assert sparse.config.num_experts == experts * granularity
    ids = torch.randint(0, 53, (2, 40), generator=torch.Generator().manual_seed(1))
    want, got = model.logits(model(ids)), sparse.logits(sparse(ids))
    assert float((want - got).detach().abs().max() / want.abs().max()) < 1e-5


def test_chosen_layers_only_and_nothing_shared() -> None:
    model = dense()
    sparse = upcycle(model, 4, 2, layers=[3])
    assert sparse.config.pattern == "M-*E"
    before = model.layers[1].mixer.up_proj.weight.clone()
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(1.0)
    assert torch.equal(model.layers[1].mixer.up_proj.weight, before)


def test_experts_part_when_trained() -> None:
    """The copies get different gradients, because they see different tokens."""
    sparse = upcycle(dense(), 4, 2)
    ids = torch.randint(0, 53, (4, 64), generator=torch.Generator().manual_seed(1))
    sparse.loss(ids, ids.roll(-1, 1)).backward()
    grads = sparse.layers[1].mixer.experts.up_proj.grad
    norms = grads.flatten(1).norm(dim=1)
    assert (norms > 0).sum() > 1 and norms.std() > 0
    assert float(sparse.layers[1].mixer.gate.weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"layers": [0]}, r"layers: got \[0\], want some of the MLP layers \[1, 3\]"),
        ({}, {"granularity": 5}, "granularity: got 5, want a divisor of intermediate_size = 48"),
        ({"mlp_bias": True}, {}, "MLP with biases"),
        ({"pattern": "M-E"}, {}, "want one without expert layers"),
        ({"pattern": "M*"}, {}, r"layers: got \[\]"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(dense(**changes), 4, 2, **arguments)


def test_more_per_token_than_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="experts_per_token: got 5, want at most"):
        upcycle(dense(), 4, 5)
