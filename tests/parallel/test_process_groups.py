"""Process groups of a mesh, on four processes with gloo."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from foldscan.parallel import FoldedMesh
from foldscan.parallel.process_groups import JOINT

WORLD = 4
AXES = ("tp", "cp", "dp", "pp", "etp", "ep", "edp", *JOINT)


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        FoldedMesh(2).init_process_groups()
    except ValueError as error:
        assert "want 4 as there are ranks" in str(error)
    else:
        raise AssertionError("a mesh of another world was taken")
    # Attention splits sequences over pairs of neighbours, the experts spread over all four.
    for mesh in (FoldedMesh(WORLD, cp=2, ep=4), FoldedMesh(WORLD, tp=2, ep=2, pp=2)):
        groups = mesh.init_process_groups()
        for device_mesh in (groups.attention, groups.experts):
            names = device_mesh.mesh_dim_names or ()
            assert device_mesh is not None
            assert list(device_mesh.get_coordinate() or ()) == [mesh.position(rank)[axis] for axis in names]
        for axes in AXES:
            members = torch.zeros(WORLD)
            members[rank] = 1
            group = groups.group(axes)
            assert group.ranks == mesh.group(axes, rank) and group.ranks[group.index] == rank
            dist.all_reduce(members, group=group.process_group)
            assert tuple(members.nonzero().flatten().tolist()) == mesh.group(axes, rank), (axes, rank)
    dist.destroy_process_group()


def test_groups_reduce_over_the_ranks_of_the_mesh(tmp_path: Path) -> None:
    mp.start_processes(worker, (str(tmp_path),), WORLD, start_method="spawn")
