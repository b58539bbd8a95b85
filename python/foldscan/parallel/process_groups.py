"""The process groups of a folded mesh."""

from __future__ import annotations

import atexit
import gc
from datetime import timedelta
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from foldscan.parallel.groups import Group
from foldscan.parallel.mesh import ATTENTION

if TYPE_CHECKING:
    from foldscan.parallel.mesh import FoldedMesh, Grid

# Groups over several axes that a training step reduces over.
JOINT = ("dp-cp", "tp-cp", "tp-cp-dp", "tp-cp-dp-pp", "tp-pp", "etp-ep", "etp-ep-pp")


class ProcessGroups:
    """A device mesh each for attention and the experts, and groups over several axes of either.

    A world of one needs no torch.distributed: its groups are of one rank each.

    Attributes:
        mesh: the `FoldedMesh`. rank: this process's. device_type: ``"cpu"`` or ``"cuda"``.
        attention, experts: ``DeviceMesh`` with named dimensions, slowest first; None in a world of one without
            torch.distributed.
    """

    def __init__(self, mesh: FoldedMesh, device_type: str = "cpu", timeout: float | None = None) -> None:
        self.mesh, self.rank, self.device_type = mesh, 0, device_type
        self._made: dict[str, dist.ProcessGroup] = {}
        self.attention: DeviceMesh | None = None
        self.experts: DeviceMesh | None = None
        if not dist.is_initialized():
            if mesh.world_size == 1:
                return
            raise RuntimeError("init_process_groups: call torch.distributed.init_process_group first (torchrun does)")
        if dist.get_world_size() != mesh.world_size:
            raise ValueError(
                f"world_size: got a mesh of {mesh.world_size}, want {dist.get_world_size()} as there are ranks"
            )
        self.rank = dist.get_rank()
        self._made = {
            axes: _process_group(mesh.ranks(axes), timeout) for axes in (*ATTENTION, "etp", "ep", "edp", *JOINT)
        }
        self.attention = self._device_mesh(mesh.attention)
        self.experts = self._device_mesh(mesh.experts)

    def group(self, axes: str) -> Group:
        """This rank's group along one axis, or along one of the joint groups ``JOINT``."""
        ranks = self.mesh.group(axes, self.rank)
        if self.attention is None:
            return Group(axes, ranks, 0)
        if axes not in self._made:
            raise ValueError(f"axes: got {axes!r}, want one axis or one of {', '.join(JOINT)}")
        return Group(axes, ranks, ranks.index(self.rank), self._made[axes])

    def _device_mesh(self, grid: Grid) -> DeviceMesh:
        names, sizes = tuple(reversed(grid.sizes)), tuple(reversed(grid.sizes.values()))
        ranks = torch.arange(prod(sizes)).view(sizes)
        groups = [self._made[name] for name in names]
        return DeviceMesh.from_group(groups, self.device_type, mesh=ranks, mesh_dim_names=names)


def forget() -> None:
    """Let go of all process groups, so that they end with `destroy_process_group` and not with the interpreter."""
    global _world
    _known.clear()
    _world = None


_world: dist.ProcessGroup | None = None
_known: dict[tuple[tuple[tuple[int, ...], ...], float | None], dist.ProcessGroup] = {}


def _process_group(ranks: tuple[tuple[int, ...], ...], timeout: float | None) -> dist.ProcessGroup:
    """This rank's process group of a division of the world; axes that divide it alike share one (a communicator is dear
    on a GPU). Every rank asks for the same divisions in the same order."""
    global _world
    if _world is not dist.group.WORLD:  # the default group was made anew, and its subgroups are gone
        _known.clear()
        _world = dist.group.WORLD
    key = ranks, timeout
    if key not in _known:
        # A group's threads end with its last owner. Left to the interpreter's own end, they now and then abort a
        # process that is done; the models and schedules that own groups, too, are in cycles.
        atexit.unregister(_end)
        atexit.register(_end)
        limit = None if timeout is None else timedelta(seconds=timeout)
        _known[key], _ = dist.new_subgroups_by_enumeration([list(group) for group in ranks], timeout=limit)
    return _known[key]


def _end() -> None:
    forget()
    gc.collect()
