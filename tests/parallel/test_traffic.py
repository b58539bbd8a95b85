"""Bytes counted in real steps on 8 ranks equal the planner's formulas, to the byte, in and out of a node of four."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import traffic
from foldscan.parallel import collectives
from foldscan.parallel.planner.volumes import Traffic, Volume
from traffic import CASES, MICROBATCHES, NODE, WORLD

# Ranks of a cp group differ in these: the first and the last have fewer neighbours. The plan is of the rank that sends
# most, at the edge of its node.
UNEVEN = {("halo", "cp"), ("states", "cp"), ("kv+dkv", "cp")}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    found = [traffic.measure(case) for case in CASES]
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """By case, then by rank."""
    folder = tmp_path_factory.mktemp("traffic")
    mp.start_processes(worker, (str(folder),), WORLD, start_method="spawn")
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD)]
    return [list(each) for each in zip(*ranks)]


def together(records: list[dict[str, Any]], keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Traffic]:
    """Traffic by (label, axes) as the plan names them; what it does not name by its own name."""
    groups = {(a, b): key for key in keys for a in key[0].split("+") for b in key[1].split("+")}
    found: dict[tuple[str, str], Traffic] = {}
    for r in records:
        if r["bytes"]:
            key = groups.get((r["label"], r["axes"]), (r["label"], r["axes"]))
            found[key] = found.get(key, Traffic()) + Traffic(r["intra"], r["inter"])
    return found


def check(got: list[dict[tuple[str, str], Traffic]], want: list[dict[tuple[str, str], Traffic]], about: str) -> None:
    """Got equals want by rank, where all ranks are alike; else the busiest rank does."""
    for rank, (sent, plan) in enumerate(zip(got, want)):
        plan = {key: t for key, t in plan.items() if t.total}
        assert set(sent) - UNEVEN == set(plan) - UNEVEN, (about, rank)
        for key in set(plan) - UNEVEN:
            assert sent[key] == plan[key], (about, rank, key)
    for key in UNEVEN:
        if any(key in plan for plan in want):
            found = [sent.get(key, Traffic()) for sent in got]
            most = max(found, key=lambda t: (t.total, t.inter))
            assert most == max((p.get(key, Traffic()) for p in want), key=lambda t: t.total), (about, key, found)
        else:
            assert not any(key in sent for sent in got), (about, key)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_bytes_of_a_step_are_the_planned_ones(number: int, measured: list[list[dict[str, Any]]]) -> None:
    case, ranks = CASES[number], measured[number]
    plans = [traffic.planned(case, r["letters"], r["ends"]) for r in ranks]
    times = MICROBATCHES // case.options.mesh(WORLD).dp
    for phase in ("both",) if case.options.pp > 1 else ("forward", "backward"):

        def part(volume: Volume, phase: str = phase) -> Traffic:
            whole = {"both": volume.total, "forward": volume.forward, "backward": volume.backward}
            return whole[phase] * times

        got = [together(r[phase], plan) for r, plan in zip(ranks, plans)]
        check(got, [{key: part(volume) for key, volume in plan.items()} for plan in plans], f"{case} {phase}")
    updates = [traffic.planned_update(case, r["parameters"]) for r in ranks]
    got = [together(r["update"], plan) for r, plan in zip(ranks, updates)]
    check(got, [{key: volume.total for key, volume in plan.items()} for plan in updates], f"{case} update")


@pytest.mark.parametrize("number", range(len(CASES)))
def test_groups_lie_where_the_plan_puts_them(number: int) -> None:
    """Neighbours of an ep group are etp ranks apart when folded, tp cp when not."""
    case = CASES[number]
    ranks = case.options.mesh(WORLD).group("ep", 0)
    assert list(ranks) == list(range(0, len(ranks) * case.mapping.ep_stride, case.mapping.ep_stride))


def test_a_step_of_the_plan_is_a_step_of_the_run(measured: list[list[dict[str, Any]]]) -> None:
    """`step_volumes`, what `foldscan plan` prints, by its names; the optimizer's lack norms, routers and the scan's and
    the convolution's own parameters."""
    names = {
        "ep": [("tokens", "ep")],
        "etp": [("tokens", "etp")],
        "probs": [("probs", "ep"), ("probs", "etp")],
        "metadata": [(label, axes) for label in ("counts", "metadata") for axes in ("ep", "etp")],
        "tp": [("activations", "tp")],
        "vocabulary": [(label, "tp") for label in ("embedding", "head", "loss")],
        "cp": [(label, "cp") for label in ("kv", "dkv", "halo", "states")],
    }
    checked = 0
    for case, ranks in zip(CASES, measured):
        o = case.options
        if o.pp > 1 or o.dispatcher == "dedup" or case.precision == "bf16" or not o.zigzag:
            continue
        plan = traffic.planned_step(case)
        for name, keys in names.items():
            sent = [
                sum(
                    r["bytes"]
                    for phase in ("forward", "backward")
                    for r in one[phase]
                    if (r["label"], r["axes"]) in keys
                )
                for one in ranks
            ]
            # In a cp group the one that sends most states forward gets most of them, and so sends fewest backward.
            slack = 2 * MICROBATCHES * 21 * 8 * 4 if name == "cp" else 0
            assert plan[name].total.total - slack <= max(sent) <= plan[name].total.total, (case, name)
        checked += 1
    assert checked >= 3


def test_folding_keeps_the_exchange_in_the_node(measured: list[list[dict[str, Any]]]) -> None:
    """The same attention mapping: tp2 cp2 with experts over data parallelism, and folded into the node."""
    inter = [
        sum(r["inter"] for one in ranks for r in one["forward"] + one["backward"] if r["axes"] == "ep")
        for ranks in measured[:2]
    ]
    assert [case.unfolded for case in CASES[:2]] == [True, False] and NODE == 4
    assert inter[0] > 0 and inter[1] == 0


def test_records_count_a_gathered_shard_once_a_node() -> None:
    """Rank 1 of nodes of two: 10 bytes to each of four ranks by a gather leave for node 1 once, for node 2 once; what
    an all-to-all sends is different for every receiver."""
    sent = {
        (kind, "dp", kind, receiver): size
        for kind, size in (("all_gather", 10), ("all_to_all", 3))
        for receiver in (0, 2, 3, 4)
    }
    calls = {("all_gather", "dp", "all_gather"): 2, ("all_to_all", "dp", "all_to_all"): 1}
    gathered, exchanged = collectives.Traffic(sent, calls).records(1, 2)
    assert gathered == {
        "collective": "all_gather",
        "axes": "dp",
        "label": "all_gather",
        "calls": 2,
        "bytes": 40,
        "intra": 20,
        "inter": 20,
    }
    assert (exchanged["bytes"], exchanged["intra"], exchanged["inter"]) == (12, 3, 9)
