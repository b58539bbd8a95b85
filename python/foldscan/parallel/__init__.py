"""Parallel training: how ranks are divided between attention and experts."""

from foldscan.parallel.mesh import FoldedMesh
from foldscan.parallel.process_groups import ProcessGroups

__all__ = ["FoldedMesh", "ProcessGroups"]
