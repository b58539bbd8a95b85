"""Placements against the model's own tensors: the parts of all ranks tile every tensor, as often as it has replicas."""

from __future__ import annotations

import pytest
import torch
from foldscan.models import HybridConfig, HybridLM
from foldscan.parallel import FoldedMesh
from foldscan.parallel.placement import local_config, placements

CONFIGS = {
    "all kinds": HybridConfig(
        pattern="M*-EP",
        vocab_size=101,
        hidden_size=16,
        mamba_num_heads=8,
        mamba_head_dim=4,
        mamba_num_groups=4,
        state_size=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=4,
        intermediate_size=24,
        num_experts=8,
        moe_intermediate_size=12,
    ),
    "all options": HybridConfig(
        pattern="M*-EP",
        vocab_size=64,
        hidden_size=16,
        tie_embeddings=True,
        mamba_num_heads=4,
        mamba_head_dim=4,
        mamba_num_groups=4,
        state_size=4,
        mamba_bias=True,
        num_heads=4,
        num_kv_heads=4,
        head_dim=4,
        attention_bias=True,
        qk_norm=True,
        intermediate_size=24,
        mlp_bias=True,
        num_experts=8,
        moe_intermediate_size=12,
        moe_activation="silu",
        moe_latent_size=8,
        shared_expert_intermediate_size=8,
        router_bias=True,
    ),
}
MESHES = [
    FoldedMesh(8, tp=4, ep=2, etp=2),
    FoldedMesh(8, tp=2, cp=2, ep=8),
    FoldedMesh(8, cp=4, etp=4),
    FoldedMesh(16, tp=2, ep=4, etp=2, pp=2),
]


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_the_models(name: str) -> None:
    state = HybridLM(CONFIGS[name]).state_dict()
    found = placements(CONFIGS[name])
    assert {n: tuple(t.shape) for n, t in state.items()} == {n: p.shape for n, p in found.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mesh", MESHES, ids=repr)
def test_parts_tile_the_whole(name: str, mesh: FoldedMesh) -> None:
    """Every element is on as many ranks of a stage as the replica group has, and each part is in its place."""
    for tensor, place in placements(CONFIGS[name]).items():
        whole = torch.arange(torch.Size(place.shape).numel()).view(place.shape)
        seen, stages = torch.zeros(place.shape, dtype=torch.int64), mesh.ranks("tp-cp-dp")
        for rank in stages[0]:
            part = place.take(whole, mesh, rank)
            assert part.shape == place.local_shape(mesh, rank)
            seen.view(-1)[part.reshape(-1)] += 1
        replicas = len(mesh.group(place.replicas, 0))
        assert (seen == replicas).all(), tensor
        for group in mesh.ranks(place.replicas):
            parts = [place.take(whole, mesh, rank) for rank in group]
            assert all(torch.equal(part, parts[0]) for part in parts), tensor


@pytest.mark.parametrize("name", CONFIGS)
def test_local_modules_have_the_local_shapes(name: str) -> None:
    mesh = FoldedMesh(4, tp=4)
    local = HybridLM(local_config(CONFIGS[name], mesh)).state_dict()
    for tensor, place in placements(CONFIGS[name]).items():
        if not tensor.startswith(("embeddings", "lm_head")):  # the vocabulary is cut outside of the layers
            assert tuple(local[tensor].shape) == place.local_shape(mesh, 2), tensor


def test_a_mamba_rank_has_whole_groups() -> None:
    """Rows of in_proj are z | x | B | C | dt: rank 1 of 2 has the second half of each."""
    place = placements(CONFIGS["all kinds"])["layers.0.mixer.in_proj.weight"]
    rows = torch.cat([torch.full((n,), i) * 100 + torch.arange(n) for i, n in enumerate((32, 32, 16, 16, 8))])
    part = place.take(rows[:, None].expand(-1, 16), FoldedMesh(2, tp=2), 1)[:, 0].tolist()
    assert part == [*range(16, 32), *range(116, 132), *range(208, 216), *range(308, 316), *range(404, 408)]


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (FoldedMesh(8, tp=8), "tp: got 8, want a divisor of mamba_num_groups = 4"),
        (FoldedMesh(16, ep=16), "ep: got 16, want a divisor of num_experts = 8"),
        (FoldedMesh(8, etp=8), "etp: got 8, want a divisor of moe_intermediate_size = 12"),
    ],
)
def test_cuts_through_heads_and_experts_are_refused(mesh: FoldedMesh, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_config(CONFIGS["all kinds"], mesh)


def test_experts_need_an_expert_layer() -> None:
    config = HybridConfig(pattern="*-", vocab_size=8, hidden_size=16, head_dim=4)
    with pytest.raises(ValueError, match="ep, etp: got 2 and 1, want 1"):
        local_config(config, FoldedMesh(2, ep=2))
