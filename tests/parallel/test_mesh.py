"""Folded meshes: groups against lists written down by hand and against the definition, and refusals."""

from __future__ import annotations

import itertools
import random

import pytest
from foldscan.parallel import FoldedMesh
from foldscan.parallel.mesh import ATTENTION, EXPERTS

ORDERS = ("tp-cp-ep-dp-pp", "tp-cp-pp-ep-dp")


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def mappings(world: int) -> list[dict[str, int]]:
    """Every (tp, cp, pp) whose product divides the world."""
    return [
        {"tp": tp, "cp": cp, "pp": pp}
        for pp in divisors(world)
        for tp in divisors(world // pp)
        for cp in divisors(world // pp // tp)
    ]


def legal(world: int, order: str, tp: int, cp: int, pp: int, ep: int, etp: int) -> bool:
    """The rule of the paper, from the definition: pipeline groups of both grids are the same."""

    def pipelines(stride: int) -> set[frozenset[int]]:
        return {
            frozenset(r for r in range(world) if r % stride == s % stride and r // (stride * pp) == s // (stride * pp))
            for s in range(world)
        }

    return order.endswith("pp") or pipelines(tp * cp) == pipelines(etp)


def test_sixteen_ranks_as_written_in_the_field() -> None:
    # tp 2, pp 4 on 16 ranks: the example that Megatron's parallel_state documents.
    mesh = FoldedMesh(16, tp=2, pp=4)
    assert mesh.ranks("tp") == tuple((i, i + 1) for i in range(0, 16, 2))
    assert mesh.ranks("pp") == ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
    assert mesh.ranks("dp") == ((0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15))


def test_the_papers_figure() -> None:
    # Four GPUs, tp = etp = 2 (arXiv:2504.14960, figure 2).
    mesh = FoldedMesh(4, tp=2, etp=2, ep=2)
    assert mesh.ranks("etp") == ((0, 1), (2, 3)) and mesh.ranks("ep") == ((0, 2), (1, 3))


def test_a_folded_node() -> None:
    # tp 2 cp 2 dp 2 on one node; the experts fold ep 8 over all three.
    mesh = FoldedMesh(16, tp=2, cp=2, ep=8, pp=2)
    assert (mesh.dp, mesh.edp) == (2, 1)
    assert mesh.ranks("ep") == (tuple(range(8)), tuple(range(8, 16)))
    assert mesh.ranks("cp") == ((0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15))
    assert mesh.ranks("dp-cp") == ((0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15))
    assert mesh.ranks("dp-cp") == mesh.ranks("cp-dp")
    assert mesh.ranks("etp-ep-pp") == (tuple(range(16)),)
    assert mesh.position(13) == {"tp": 1, "cp": 0, "dp": 1, "pp": 1, "etp": 0, "ep": 5, "edp": 0}
    assert mesh.group("dp-cp", 13) == (9, 11, 13, 15)


def test_thousands_of_ranks() -> None:
    # 1,344 nodes of 8: tp 8, pp 12, so dp 112; experts ep 16, so edp 56. The last stage begins at rank 9,856.
    mesh = FoldedMesh(1344 * 8, tp=8, ep=16, pp=12)
    assert (mesh.dp, mesh.edp) == (112, 56)
    assert mesh.ranks("pp")[5] == tuple(range(5, 10752, 896))
    assert mesh.ranks("tp")[-1] == tuple(range(10744, 10752)) and len(mesh.ranks("tp")) == 1344
    assert mesh.ranks("dp")[0] == tuple(range(0, 896, 8)) and mesh.ranks("dp")[-1] == tuple(range(9863, 10752, 8))
    assert mesh.ranks("ep")[1] == tuple(range(16, 32)) and mesh.ranks("edp")[-1] == tuple(range(9871, 10752, 16))
    # pp before dp: stages are tp ranks apart, so the experts need etp 8.
    inner = FoldedMesh(1344 * 8, tp=8, etp=8, ep=4, pp=12, order="tp-cp-pp-ep-dp")
    assert inner.ranks("pp")[9] == tuple(range(97, 192, 8)) and inner.ranks("ep")[0] == (0, 96, 192, 288)


@pytest.mark.parametrize("order", ORDERS)
def test_every_mapping_of_small_worlds(order: str) -> None:
    seen = 0
    for world in (1, 2, 6, 8, 12):
        for m, e in itertools.product(mappings(world), mappings(world)):
            if m["pp"] != e["pp"]:
                continue
            sizes = {**m, "etp": e["tp"], "ep": e["cp"]}
            if not legal(world, order, **sizes):
                with pytest.raises(ValueError, match="pp groups differ"):
                    FoldedMesh(world, **sizes, order=order)
                continue
            mesh = FoldedMesh(world, **sizes, order=order)
            seen += 1
            for axes in (ATTENTION, EXPERTS):
                for k in range(1, 5):
                    for names in itertools.combinations(axes, k):
                        check_groups(mesh, names)
    assert seen > 400


def check_groups(mesh: FoldedMesh, names: tuple[str, ...]) -> None:
    """Two ranks are in one group along some axes exactly if they agree on all other axes of that grid."""
    others = [a for a in (ATTENTION if set(names) <= set(ATTENTION) else EXPERTS) if a not in names]
    want: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.world_size):
        position = mesh.position(rank)
        want.setdefault(tuple(position[a] for a in others), []).append(rank)
    groups = mesh.ranks("-".join(names))
    assert sorted(groups) == sorted(tuple(g) for g in want.values())
    assert list(groups) == sorted(groups)


def test_worlds_up_to_512() -> None:
    """Every (tp, cp, pp) of every world, each beside another mapping of the experts with that pp."""
    draw = random.Random(0)
    for world in range(1, 513):
        by_pp: dict[int, list[tuple[int, int]]] = {}
        for m in mappings(world):
            by_pp.setdefault(m["pp"], []).append((m["tp"], m["cp"]))
        for pp, pairs in by_pp.items():
            experts = draw.sample(pairs, len(pairs))
            for (tp, cp), (etp, ep) in zip(pairs, experts):
                mesh = FoldedMesh(world, tp=tp, cp=cp, ep=ep, etp=etp, pp=pp)
                assert tp * cp * pp * mesh.dp == etp * ep * pp * mesh.edp == world
                rank = draw.randrange(world)
                position = mesh.position(rank)
                assert rank == sum(position[a] * mesh.attention.strides[a] for a in ATTENTION)
                assert rank == sum(position[a] * mesh.experts.strides[a] for a in EXPERTS)
                stage = range(position["pp"] * world // pp, (position["pp"] + 1) * world // pp)
                for axes, size in (("tp", tp), ("dp-cp", mesh.dp * cp), ("etp-ep", etp * ep), ("edp", mesh.edp)):
                    group = mesh.group(axes, rank)
                    assert len(group) == size and rank in group and all(r in stage for r in group)
                assert mesh.group("tp-cp-dp", rank) == mesh.group("etp-ep-edp", rank) == tuple(stage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 3}, r"tp, cp, pp: got 3 x 1 x 1 = 3, want a divisor of the 16 ranks; .* tp in \{1, 2, 4, 8, 16\}"),
        ({"ep": 8, "etp": 4}, r"etp, ep, pp: got 4 x 8 x 1 = 32, .* etp in \{1, 2\} or ep in \{1, 2, 4\}"),
        ({"tp": 0}, "tp: got 0, want at least 1"),
        ({"order": "tp-cp-dp-dp-pp"}, "order: got 'tp-cp-dp-dp-pp', want tp, cp, ep, dp, pp, each once"),
        ({"tp": 2, "order": "cp-dp-pp"}, "has no place for tp of size 2"),
        ({"tp": 2, "pp": 2, "order": "tp-cp-pp-ep-dp"}, r"2 ranks apart in attention \(tp 2\) and 1 for the experts"),
    ],
)
def test_illegal(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FoldedMesh(16, **options)  # type: ignore[arg-type]


def test_illegal_questions() -> None:
    mesh = FoldedMesh(8, tp=2, ep=4)
    for axes in ("tp-ep", "tp-tp", "fp", ""):
        with pytest.raises(ValueError, match=r"axes: got .* want some of tp-cp-dp-pp or some of etp-ep-edp-pp"):
            mesh.ranks(axes)
    with pytest.raises(ValueError, match=r"rank: got 8, want 0 \.\. 7"):
        mesh.position(8)
    with pytest.raises(TypeError, match=r"tp: got 2\.0, want an integer"):
        FoldedMesh(8, tp=2.0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        mesh.init_process_groups()
