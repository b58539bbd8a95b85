"""The process groups of a folded mesh."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from foldscan.parallel.groups import Group

if TYPE_CHECKING:
    from foldscan.parallel.mesh import FoldedMesh, Grid

# Groups over several axes that a training step reduces over.
JOINT = ("dp-cp", "tp-cp", "tp-cp-dp", "tp-pp", "etp-ep", "etp-ep-pp")


class ProcessGroups:
    """A device mesh each for attention and the experts, and groups over several axes of either.

    A world of one needs no torch.distributed: its groups are of one rank each.

    Attributes:
        mesh: the `FoldedMesh`. rank: this process's. device_type: ``"cpu"`` or ``"cuda"``.
        attention, experts: ``DeviceMesh`` with named dimensions, slowest first; None in a world of one without
            torch.distributed.
    """

    def __init__(self, mesh: FoldedMesh, device_type: str = "cpu") -> None:
        self.mesh, self.rank, self.device_type = mesh, 0, device_type
        self.attention: DeviceMesh | None = None
        self.experts: DeviceMesh | None = None
        self._joint: dict[str, dist.ProcessGroup] = {}
        if not dist.is_initialized():
            if mesh.world_size == 1:
                return
            raise RuntimeError("init_process_groups: call torch.distributed.init_process_group first (torchrun does)")
        if dist.get_world_size() != mesh.world_size:
            raise ValueError(
                f"world_size: got a mesh of {mesh.world_size}, want {dist.get_world_size()} as there are ranks"
            )
        self.rank = dist.get_rank()
        self.attention = _device_mesh(mesh.attention, device_type)
        self.experts = _device_mesh(mesh.experts, device_type)
        for axes in JOINT:
            self._joint[axes], _ = dist.new_subgroups_by_enumeration([list(group) for group in mesh.ranks(axes)])

    def group(self, axes: str) -> Group:
        """This rank's group along one axis, or along one of the joint groups ``JOINT``."""
        ranks = self.mesh.group(axes, self.rank)
        return Group(axes, ranks, ranks.index(self.rank), self._process_group(axes))

    def _process_group(self, axes: str) -> dist.ProcessGroup | None:
        if axes in self._joint:
            return self._joint[axes]
        for mesh in (self.attention, self.experts):
            if mesh is None:
                return None
            if axes in (mesh.mesh_dim_names or ()):
                return mesh.get_group(axes)
        raise ValueError(f"axes: got {axes!r}, want one axis or one of {', '.join(JOINT)}")


def _device_mesh(grid: Grid, device_type: str) -> DeviceMesh:
    names, sizes = tuple(reversed(grid.sizes)), tuple(reversed(grid.sizes.values()))
    return DeviceMesh(device_type, torch.arange(prod(sizes)).view(sizes), mesh_dim_names=names)
