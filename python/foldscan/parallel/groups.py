"""A group of ranks that talk to each other, as one of them sees it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """Ranks along one axis of a mesh, or along several.

    Attributes:
        axes: which, as in ``FoldedMesh.ranks``.
        ranks: the members in the whole world, ascending.
        index: this rank's place among them.
        process_group: what torch.distributed calls it; None in a world without process groups, where every group is of
            one rank.
    """

    axes: str
    ranks: tuple[int, ...]
    index: int
    process_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.index < len(self.ranks):
            raise ValueError(f"index: got {self.index}, want a place among the {len(self.ranks)} ranks of {self.axes}")
        if len(self.ranks) > 1 and self.process_group is None:
            raise ValueError(f"process_group: got None for {len(self.ranks)} ranks of {self.axes}")

    @property
    def size(self) -> int:
        return len(self.ranks)


def shares(total: int, parts: int) -> list[int]:
    """``total`` divided over ``parts`` as evenly as it goes: part i ends at ``(i + 1) total // parts``."""
    ends = [i * total // parts for i in range(parts + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]
