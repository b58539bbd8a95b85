"""Bytes a rank sends: against counting by hand, and against the figures derived from arXiv:2504.14960."""

from itertools import combinations, pairwise
from math import comb

import pytest
from foldscan.parallel import FoldedMesh
from foldscan.parallel.planner import Mapping, Workload, load_model
from foldscan.parallel.planner.step_volumes import block_volumes, step_volumes
from foldscan.parallel.planner.volumes import (
    Traffic,
    Volume,
    all_to_all,
    context_gather_volume,
    context_ring_volume,
    context_scan_volume,
    dispatch_volumes,
    expected_ranks,
    gather,
    local_ranks,
    optimizer_volume,
    pipeline_volume,
    sharded_volume,
    tensor_volume,
    vocabulary_volumes,
)

POWERS = [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_local_ranks_are_those_of_the_mesh(tp: int, cp: int) -> None:
    """Rank 0's group of every axis: how many of its ranks are below 8, in a world of 64."""
    mesh = FoldedMesh(64, tp=tp, cp=cp, ep=8, etp=tp)
    for axes, ranks, stride in (("tp", tp, 1), ("cp", cp, tp), ("ep", 8, tp), ("dp", mesh.dp, tp * cp)):
        assert local_ranks(ranks, stride) == sum(rank < 8 for rank in mesh.group(axes, 0)), axes


@pytest.mark.parametrize("ranks", POWERS)
@pytest.mark.parametrize("stride", POWERS)
def test_exchanges_against_counting_every_peer(ranks: int, stride: int) -> None:
    """An all-to-all peer by peer. An all-gather: each shard once to each other node, the rest inside."""
    node, payload, shard = 8, 1024.0, 7.0
    mine = list(range(0, ranks * stride, stride))
    intra = sum(payload / ranks for r in mine[1:] if r // node == 0)
    inter = sum(payload / ranks for r in mine[1:] if r // node != 0)
    assert all_to_all(payload, ranks, stride) == Traffic(intra, inter)
    nodes = len({r // node for r in mine})
    assert gather(shard, ranks, stride) == Traffic((ranks - nodes) * shard, (nodes - 1) * shard)


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks"), [(8, 2, 4), (8, 2, 8), (8, 3, 2), (12, 4, 3), (6, 6, 3), (5, 1, 5)]
)
def test_expected_ranks_is_the_mean_over_every_choice(experts: int, top_k: int, ranks: int) -> None:
    choices = list(combinations(range(experts), top_k))
    distinct = [len({e // (experts // ranks) for e in choice}) for choice in choices]
    assert expected_ranks(experts, top_k, ranks) == pytest.approx(sum(distinct) / comb(experts, top_k), rel=1e-12)


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks", "distinct"),
    [(64, 8, 8, 5.43), (128, 8, 8, 5.34), (256, 8, 8, 5.29), (256, 8, 64, 7.68), (128, 6, 8, 4.47), (8, 2, 8, 2.0)],
)
def test_expected_ranks_of_known_models(experts: int, top_k: int, ranks: int, distinct: float) -> None:
    assert round(expected_ranks(experts, top_k, ranks), 2) == distinct


def test_expected_ranks_refuses_an_uneven_division() -> None:
    with pytest.raises(ValueError, match="ranks: got 3, want a divisor of experts = 8"):
        expected_ranks(8, 2, 3)


def count_rows(dispatcher: str, tokens: int, top_k: int, ep: int, experts: int) -> int:
    """Rows that leave rank 0 on dispatch, with routing dealt out so that every expert gets as many tokens."""
    sent = 0
    for token in range(tokens):
        owners = [(token * top_k + j) % experts // (experts // ep) for j in range(top_k)]
        if dispatcher == "alltoall":
            sent += sum(owner != 0 for owner in owners)
        elif dispatcher == "dedup":
            sent += len(set(owners) - {0})
        else:
            sent += ep - 1
    return sent


@pytest.mark.parametrize(("ep", "experts", "top_k"), [(1, 4, 2), (2, 4, 2), (4, 8, 2), (4, 4, 3), (8, 8, 8)])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_dispatch_of_balanced_tokens_counted_one_by_one(dispatcher: str, ep: int, experts: int, top_k: int) -> None:
    hidden, tokens, size = 5, 24, 4
    rows = count_rows(dispatcher, tokens, top_k, ep, experts)
    found = dispatch_volumes(
        tokens, top_k, hidden, experts=experts, ep=ep, dispatcher=dispatcher, element_bytes=size, node=8
    )
    # The combine sends as much as the dispatch, the backward pass as much as the forward pass.
    assert found["ep"].forward.total == 2 * rows * hidden * size
    assert found["ep"].backward == found["ep"].forward
    assert found["etp"].total.total == 0
    # Scalars: each of the exchanged rows brings its probability; gathered tokens bring all of theirs.
    scalars = rows * (top_k if dispatcher == "allgather" else 1)
    assert found["probs"].forward.total == 4 * scalars


def test_dedup_where_every_choice_of_experts_comes_once() -> None:
    """All C(8, 3) choices as tokens: rank 0 sends each to the ranks but itself that own an expert of it."""
    experts, top_k, ep, hidden = 8, 3, 4, 16
    choices = list(combinations(range(experts), top_k))
    rows = [len({e // 2 for e in choice} - {0}) for choice in choices]
    found = dispatch_volumes(len(choices), top_k, hidden, experts=experts, ep=ep, dispatcher="dedup")
    assert found["ep"].forward.total == pytest.approx(2 * sum(rows) * hidden * 2, rel=1e-12)


def test_dedup_by_node_where_every_choice_of_experts_comes_once() -> None:
    """Twelve experts on 6 ranks, 3 nodes of 2. A token goes to the rank of the same place in every other node that it
    needs, and from there, or from its own rank at home, to the other rank of the node."""
    choices = list(combinations(range(12), 3))
    off_node = in_node = 0
    for choice in choices:
        ranks = {e // 2 for e in choice}
        off_node += len({rank // 2 for rank in ranks} - {0})
        in_node += sum(rank % 2 == 1 for rank in ranks)
    found = dispatch_volumes(len(choices), 3, 16, experts=12, ep=6, dispatcher="dedup-node", node=2)["ep"].forward
    assert found.inter == pytest.approx(2 * off_node * 32, rel=1e-12)
    assert found.intra == pytest.approx(2 * in_node * 32, rel=1e-12)
    inside = {name: dispatch_volumes(4, 3, 16, experts=12, ep=6, dispatcher=name) for name in ("dedup", "dedup-node")}
    assert inside["dedup"]["ep"].total.total == pytest.approx(inside["dedup-node"]["ep"].total.total)


@pytest.mark.parametrize("etp", [1, 2, 4])
def test_etp_stage(etp: int) -> None:
    """Dispatch gathers what arrived: T K rows, the EP T tokens, or the u T of them that are wanted here; combine
    reduce-scatters T K rows. Every way of the tokens is a way of their probabilities, one a row or all K of a token."""
    tokens, top_k, hidden, ep = 6, 2, 10, 4
    wanted = tokens * expected_ranks(8, top_k, ep)
    for dispatcher, gathered, slots, out in (
        ("alltoall", tokens * top_k, 1, tokens * top_k * (ep - 1) / ep),
        ("dedup", wanted, top_k, wanted * (ep - 1) / ep),
        ("allgather", ep * tokens, top_k, (ep - 1) * tokens),
    ):
        found = dispatch_volumes(tokens, top_k, hidden, experts=8, ep=ep, etp=etp, dispatcher=dispatcher)
        rows = (etp - 1) * (gathered + tokens * top_k)
        assert found["etp"].forward.total == pytest.approx(rows * hidden * 2, rel=1e-12)
        assert found["etp"].backward == found["etp"].forward
        beside = 4 * slots * (out + (etp - 1) * gathered)
        assert found["probs"].forward.total == pytest.approx(beside, rel=1e-12)
        assert found["probs"].backward == found["probs"].forward
        # Rows are told by a count for every expert; tokens bring their choices, and where it differs how many they are.
        told = {
            "alltoall": 8 * 8 * (ep - 1 + etp - 1),
            "allgather": beside,
            "dedup": beside + 8 * (ep * (ep - 1) + etp - 1),
        }
        assert found["metadata"].forward.total == pytest.approx(told[dispatcher], rel=1e-12)
        assert found["metadata"].backward == Traffic()


def test_dedup_with_a_known_number_of_ranks() -> None:
    """Every token's two experts on one rank: half of what all-to-all sends, and half as much over ETP."""
    rows, pairs = (
        dispatch_volumes(12, 2, 5, experts=8, ep=4, etp=2, dispatcher=name, distinct=1.0)
        for name in ("alltoall", "dedup")
    )
    assert 2 * pairs["ep"].total.total == rows["ep"].total.total == 4 * 12 * 2 * 3 / 4 * 5 * 2
    assert pairs["etp"].forward.total == (12 + 12 * 2) * 5 * 2


def test_unknown_dispatcher_is_named() -> None:
    with pytest.raises(
        ValueError, match="dispatcher: got 'hybrid', want one of alltoall, allgather, dedup, dedup-node"
    ):
        dispatch_volumes(4, 2, 8, experts=8, ep=2, dispatcher="hybrid")


def test_zero_tokens_send_nothing() -> None:
    found = dispatch_volumes(0, 2, 8, experts=8, ep=4, etp=2)
    assert all(found[name] == Volume() for name in ("ep", "etp", "probs"))
    assert found["metadata"].forward.total == 8 * 8 * (3 + 1)  # counts are exchanged even so


def test_tensor_and_context_parallel() -> None:
    tokens, hidden, n = 12, 10, 4
    shard = tokens * hidden * 2
    assert tensor_volume(tokens, hidden, n).forward.total == 2 * (n - 1) * shard
    assert tensor_volume(tokens, hidden, n).backward.total == 3 * (n - 1) * shard
    assert tensor_volume(tokens, hidden, n, regather=False).total.total == 4 * (n - 1) * shard
    pair = 2 * tokens * 6 * 2  # keys and values of width 6
    assert context_ring_volume(tokens, 6, n).forward.total == (n - 1) * pair
    assert context_ring_volume(tokens, 6, n).total.total == 3 * (n - 1) * pair
    assert context_gather_volume(tokens, 6, n).total.total == 2 * (n - 1) * pair
    assert context_gather_volume(tokens, 6, n, regather=True).total.total == 3 * (n - 1) * pair
    # Two nodes: the rank at the edge of one passes everything to the other.
    assert context_ring_volume(tokens, 6, 4, stride=4).forward == Traffic(0, 3 * pair)
    assert context_gather_volume(tokens, 6, 4, stride=4).forward == Traffic(2 * pair, pair)


def scan_bytes(cp: int, zigzag: bool, node: int) -> list[Traffic]:
    """What each rank sends for a sequence: from every piece that goes on its state (21 numbers a head, 3 heads) to all
    other ranks, across nodes once a node, and three rows of 30 channels to the holder of the next piece."""
    pieces = [*range(cp), *reversed(range(cp))] if zigzag else [*range(cp)]
    found = [Traffic()] * cp
    for holder, following in pairwise(pieces):
        nodes = -(-cp // node)
        found[holder] += Traffic((cp - nodes) * 3 * 21 * 4, (nodes - 1) * 3 * 21 * 4)
        if following != holder:
            same = following // node == holder // node
            found[holder] += Traffic(3 * 30 * 2 if same else 0, 0 if same else 3 * 30 * 2)
    return found


@pytest.mark.parametrize("cp", [2, 4, 8])
@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("node", [1, 2, 8])
def test_context_parallel_scan_sends_states_and_halo(cp: int, zigzag: bool, node: int) -> None:
    found = context_scan_volume(3, 4, 5, 30, 4, cp, zigzag=zigzag, node=node)
    each = scan_bytes(cp, zigzag, node)
    assert found.forward.total == max(one.total for one in each)
    assert found.forward.inter == max(one.inter for one in each if one.total == found.forward.total)
    assert found.backward == found.forward
    assert context_scan_volume(3, 4, 5, 30, 4, 1) == Volume()


def test_divided_vocabulary() -> None:
    """Six tokens a rank, width 10, four ranks: three shards of partial sums, of rows, and of two numbers a row."""
    found = vocabulary_volumes(6, 10, 4, embedding_bytes=4)
    want = {"embedding": 3 * 6 * 10 * 4, "head": 3 * 6 * 10 * 2, "loss": 3 * 6 * 8}
    assert {name: volume.forward.total for name, volume in found.items()} == want
    assert all(volume.forward == volume.backward for volume in found.values())
    assert all(volume == Volume() for volume in vocabulary_volumes(6, 10, 1).values())


def test_pipeline_optimizer_and_fsdp() -> None:
    assert pipeline_volume(8, 10, 1, 4) == Volume()
    assert pipeline_volume(8, 10, 4, 3, stride=2).total == Traffic(2 * 3 * 8 * 10 * 2, 0)
    assert pipeline_volume(8, 10, 4, 3, stride=4).forward == Traffic(0, 3 * 8 * 10 * 2)
    step = optimizer_volume(800, 8)
    assert (step.forward.total, step.backward.total) == (7 / 8 * 800 * 2, 7 / 8 * 800 * 4)
    assert sharded_volume(800, 8).total.total == 3 * 7 / 8 * 800 * 2


# MB a GPU, layer and micro-batch, forward and backward: A2A in the node, A2A off it, ETP, TP.
G8T8 = "mixtral-8x22b-g8t8"
PAIRS = [
    ("mixtral-8x22b", {"gpus": 128, "tp": 2, "etp": 2, "ep": 4, "pp": 8, "method": "unfolded"}, (151, 0, 201, 126)),
    ("mixtral-8x22b", {"gpus": 128, "tp": 2, "ep": 8, "pp": 8}, (176, 0, 0, 126)),
    ("qwen2-57b-a14b", {"gpus": 64, "tp": 2, "etp": 2, "ep": 4, "pp": 4, "method": "unfolded"}, (352, 0, 470, 147)),
    ("qwen2-57b-a14b", {"gpus": 64, "tp": 2, "ep": 4, "pp": 4}, (352, 0, 0, 147)),
    (
        "mixtral-8x22b-g8t8",
        {"gpus": 128, "tp": 2, "etp": 2, "ep": 8, "pp": 8, "method": "unfolded"},
        (302, 403, 805, 126),
    ),
    (G8T8, {"gpus": 128, "tp": 4, "ep": 8, "pp": 8}, (352, 0, 0, 189)),
    ("llama3-8x70b", {"gpus": 256, "tp": 8, "etp": 8, "ep": 4, "pp": 8, "method": "unfolded"}, (0, 50, 470, 294)),
    ("llama3-8x70b", {"gpus": 256, "tp": 8, "ep": 8, "pp": 16}, (59, 0, 0, 294)),
]


@pytest.mark.parametrize(("name", "sizes", "megabytes"), PAIRS)
def test_volumes_of_the_published_mappings(name: str, sizes: dict, megabytes: tuple[int, ...]) -> None:
    model, mapping, work = load_model(name), Mapping(**sizes), Workload()
    experts = block_volumes(model, "E", mapping, work)
    tensor = block_volumes(model, "*", mapping, work)["tp"].total + experts.get("tp", Volume()).total
    ep = experts["ep"].total
    found = (ep.intra, ep.inter, experts["etp"].total.total, tensor.total)
    assert tuple(round(x / 1e6) for x in found) == megabytes


@pytest.mark.parametrize(("name", "off_node"), [("mixtral-8x22b", (101, 151, 176, 176)), (G8T8, (403, 604, 705, 705))])
def test_context_parallelism_drives_the_unfolded_exchange_off_the_node(name: str, off_node: tuple[int, ...]) -> None:
    """TP2 EP8 ETP1 with 4096 tokens a rank of cp: the ep group's stride is tp cp unfolded, and 1 folded."""
    model = load_model(name)
    for cp, megabytes in zip((1, 2, 4, 8), off_node):
        tokens = 2048
        shape = {"experts": model.experts, "ep": 8}
        unfolded = dispatch_volumes(tokens, model.top_k, model.hidden, ep_stride=2 * cp, **shape)["ep"].total
        assert round(unfolded.inter / 1e6) == megabytes
        folded = Mapping(1024, tp=2, cp=cp, ep=8, pp=8)
        volumes = block_volumes(model, "E", folded, Workload(seq=4096 * cp))
        assert volumes["ep"].total.inter == 0
        assert volumes["ep"].total.total == pytest.approx(unfolded.total)


def test_step_is_the_sum_of_its_blocks() -> None:
    """Mixtral, PP8 on 128 GPUs: 7 layers of either kind, 32 micro-batches, and the optimizer once."""
    model, mapping, work = load_model("mixtral-8x22b"), Mapping(128, tp=2, ep=8, pp=8), Workload()
    found = step_volumes(model, mapping, work)
    for name in ("ep", "etp", "probs"):
        assert found[name] == block_volumes(model, "E", mapping, work)[name] * 224
    assert found["tp"] == block_volumes(model, "*", mapping, work)["tp"] * 224
    assert found["pp"].forward == Traffic(0, 32 * 7 * 2048 * 6144 * 2)
    expert = 7 * 8 * 3 * 6144 * 16384 / 8
    assert found["edp"] == optimizer_volume(expert, 2, stride=8)
    assert found["edp"].total.inter == expert / 2 * 6
    dense = 7 * 2 * 6144 * (6144 + 1024) / 2 + 2 * 6144 * 32768 / 16
    assert found["dp"].total.total == pytest.approx(dense * 7 / 8 * 6)


def test_fsdp_moves_parameters_every_micro_batch() -> None:
    model, work = load_model("mixtral-8x22b"), Workload()
    mapping = Mapping(128, tp=2, etp=2, ep=8, method="fsdp-ep")
    expert = model.expert_parameters(model.pattern) / 16
    assert step_volumes(model, mapping, work)["edp"].total.total == pytest.approx(4 * 3 * expert * 7 / 8 * 2)


def test_four_passes_and_gathered_keys_when_asked() -> None:
    model, mapping = load_model("mixtral-8x22b"), Mapping(64, tp=2, cp=2, ep=8)
    five = block_volumes(model, "*", mapping, Workload())
    four = block_volumes(model, "*", mapping, Workload(tp_regather=False, context="allgather"), element_bytes=4)
    assert four["tp"].total.total == 2 * 4 / 5 * five["tp"].total.total
    assert four["cp"].total.total == 2 * 2 / 3 * five["cp"].total.total
