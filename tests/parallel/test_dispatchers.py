"""Token dispatchers on gloo, every folding of a small world, against a loop over tokens and slots of the whole."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dispatch_oracle import LIMIT, Case, Here, canonical, check_against_oracle, same, through
from foldscan.parallel import FoldedMesh

NAMES = ("allgather", "alltoall", "dedup")


def cases(block: int, few: bool) -> list[Case]:
    """Routings of a block of ranks; ``few`` for large worlds."""
    even, uneven = [6] * block, [(5 * r + 3) % 9 for r in range(block)]
    alone = [0] * block
    alone[-1] = 7
    found = []
    for dtype in LIMIT:
        found += [("random", uneven, 4, dtype), ("holes", uneven, 5, dtype), ("random", alone, 2, dtype)]
        if few:
            continue
        found += [("skewed", uneven, 3, dtype)]
        if dtype == torch.float32:
            found += [
                ("random", even, 3, dtype),
                ("one", even, 1, dtype),
                ("one", uneven, 3, dtype),  # the same expert in all slots of a token
                ("empty", uneven, 2, dtype),
                ("all", uneven, 8, dtype),
                ("nobody", [0] * block, 2, dtype),
            ]
    return [Case(kind, tokens, slots, 8, dtype) for kind, tokens, slots, dtype in found]


def check_case(here: Here, case: Case) -> None:
    case.draw()
    results = {name: through(name, here, case) for name in NAMES}
    about = (case.kind, case.tokens, case.slots, case.dtype, here.ep.size, here.etp.size)
    check_against_oracle(here, case, results["alltoall"])
    if case.dtype == torch.float64:  # products of the reference may depend on the number of rows
        for name in NAMES:
            check_against_oracle(here, case, results[name])
            alone = through(name, here, case, each_alone=True)
            same(alone, through("alltoall", here, case, each_alone=True), (name, *about))
        return
    for name in NAMES:
        same(results[name], results["alltoall"], (name, *about))
        same(through(name, here, case), results[name], (name, "again", *about))
    same(list(canonical(here, case)), results["dedup"][:2], ("order", *about))
    if len(set(case.tokens)) == 1:
        for name in NAMES:
            same(through(name, here, case, tokens_per_rank=case.tokens[0]), results[name], (name, "known", *about))
    # Enough for the largest load of any rank.
    most = max(int(torch.bincount(e.reshape(-1) + 1, minlength=2)[1:].max()) for e in case.experts.split(case.tokens))
    for name in NAMES:
        same(through(name, here, case, capacity=most), results[name], (name, "padded", *about))


MESHES = {
    4: (
        FoldedMesh(4),
        FoldedMesh(4, cp=2, ep=2),
        FoldedMesh(4, tp=2, etp=2),
        FoldedMesh(4, tp=4, ep=2, etp=2),
        FoldedMesh(4, tp=2, cp=2, ep=4),
        FoldedMesh(4, etp=4),
    ),
    8: (
        FoldedMesh(8, tp=2, cp=2, ep=8),
        FoldedMesh(8, cp=4, ep=4, etp=2),
        FoldedMesh(8, tp=8, ep=2, etp=4),
        FoldedMesh(8, etp=8),
    ),
}


def worker(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    for mesh in MESHES[world]:
        groups = mesh.init_process_groups()
        here = Here(groups.group("ep"), groups.group("etp"))
        for case in cases(mesh.ep * mesh.etp, few=world > 4):
            check_case(here, case)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", MESHES)
def test_every_dispatcher_on_every_folding(tmp_path: Path, world: int) -> None:
    mp.start_processes(worker, (str(tmp_path), world), world, start_method="spawn")
