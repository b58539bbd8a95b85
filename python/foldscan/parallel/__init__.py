"""Parallel training of hybrid models: experts divide the ranks in their own way (MoE Parallel Folding).

Here are the mesh and its configuration; what runs on it is imported where it is used: `foldscan.parallel.model`,
`dispatchers`, `context`, `vocabulary`, `optimizer`, `pipeline`, `checkpoint`, and `planner`, which needs no ranks.
"""

from foldscan.parallel.config import ParallelConfig
from foldscan.parallel.groups import Group
from foldscan.parallel.mesh import FoldedMesh
from foldscan.parallel.process_groups import ProcessGroups

__all__ = ["FoldedMesh", "Group", "ParallelConfig", "ProcessGroups"]
