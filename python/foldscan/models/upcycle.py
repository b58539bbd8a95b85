"""A dense model made into a Mixture of Experts that computes the same, to be trained on (sparse upcycling)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from foldscan.models.config import HybridConfig
from foldscan.models.hybrid_lm import Block, HybridLM
from foldscan.nn import MLP, MoE


def upcycle(
    model: HybridLM,
    num_experts: int,
    experts_per_token: int,
    *,
    granularity: int = 1,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> HybridLM:
    """Replace MLP layers by experts that are copies of them (arXiv:2212.05055), or slices of copies.

    With granularity G every copy is cut into G experts of 1/G of its width, and a token chooses G times as many. The
    router gives the slices of a copy the same score, so that a copy is chosen whole, and scales its probabilities by G
    (virtual groups, arXiv:2410.07524, section 3.2). The logits are those of the dense model up to rounding.

    Args:
        model: with MLP layers (``-``), all without biases.
        num_experts: copies of a layer; experts are G times as many.
        experts_per_token: copies that a token uses. With one, its probability is 1 and the router learns from the
            balancing loss alone.
        layers: numbers of the layers to replace; None for all MLP layers.
        seed: of the routers' initial weights.

    Returns:
        A new model; the old one shares no memory with it.

    Raises:
        ValueError: a layer that is no MLP, biases, a width that G does not divide, more experts per token than experts.
    """
    old = model.config
    mlps = [i for i, kind in enumerate(old.pattern) if kind == "-"]
    chosen = mlps if layers is None else list(layers)
    wrong = [i for i in chosen if i not in mlps]
    if wrong or not chosen:
        raise ValueError(f"layers: got {wrong or chosen}, want some of the MLP layers {mlps} of {old.pattern!r}")
    if "E" in old.pattern:
        raise ValueError(f"model: got pattern {old.pattern!r}, want one without expert layers")
    if old.mlp_bias:
        raise ValueError("model: got an MLP with biases, want one without (experts have none)")
    if granularity < 1 or old.intermediate_size % granularity:
        want = f"a divisor of intermediate_size = {old.intermediate_size}"
        raise ValueError(f"granularity: got {granularity}, want {want}")
    config = dataclasses.replace(
        old,
        pattern="".join("E" if i in chosen else kind for i, kind in enumerate(old.pattern)),
        num_experts=num_experts * granularity,
        experts_per_token=experts_per_token * granularity,
        moe_intermediate_size=old.intermediate_size // granularity,
        moe_activation=old.mlp_activation,
        shared_expert_intermediate_size=0,
        router_score="softmax",
        router_pre_softmax=False,
        router_scaling=float(granularity),
    )
    weight = model.embeddings.weight
    new = HybridLM(config, init=False).to(weight.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        state = {name: tensor for name, tensor in model.state_dict().items() if _layer_of(name) not in chosen}
        new.load_state_dict(state, strict=False)
        for i in chosen:
            before, after = model.layers[i], new.layers[i]
            assert isinstance(before, Block) and isinstance(after, Block)
            after.norm.load_state_dict(before.norm.state_dict())
            _copy(before.mixer, after.mixer, config, num_experts, granularity, generator)
    return new.train(model.training)


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def _copy(
    dense: object, sparse: object, config: HybridConfig, copies: int, granularity: int, generator: torch.Generator
) -> None:
    assert isinstance(dense, MLP) and isinstance(sparse, MoE)
    width = config.moe_intermediate_size
    pairs = [(dense.up_proj.weight, sparse.experts.up_proj)]
    if dense.gate_proj is not None and sparse.experts.gate_proj is not None:
        pairs.append((dense.gate_proj.weight, sparse.experts.gate_proj))
    for source, target in pairs:  # (F, d) to (copies * G, F / G, d)
        target.copy_(source.view(granularity, width, -1).repeat(copies, 1, 1))
    down = dense.down_proj.weight  # (d, F) to (copies * G, d, F / G)
    sparse.experts.down_proj.copy_(down.view(-1, granularity, width).permute(1, 0, 2).repeat(copies, 1, 1))
    rows = torch.randn(copies, config.hidden_size, generator=generator) * config.initializer_range
    sparse.gate.weight.copy_(rows.repeat_interleave(granularity, 0))
