"""How a training run is divided over ranks, as a dataclass of plain values."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foldscan.parallel.mesh import FoldedMesh

DISPATCHERS = ("allgather", "alltoall", "dedup")


@dataclass
class ParallelConfig:
    """A folded mesh and what runs on it.

    Attributes:
        tp, cp, ep, etp, pp: sizes of the axes (`FoldedMesh`); dp and edp are what is left of the world.
        order: of the ranks along the axes, fastest first.
        dispatcher: how tokens travel to their experts: ``"alltoall"``, ``"allgather"`` or ``"dedup"``; the same bits.
        attention: how context parallelism shares keys: ``"ring"``, or ``"all_gather"``, which sliding windows need.
        zigzag: context ranks hold a piece from the front and one from the back, so that causal attention costs the same
            on each.
        stages_per_rank: pipeline stages on one rank; above 1 the schedule is interleaved 1F1B, else 1F1B.
        capacity_factor: 0 for dropless; else an expert keeps ``ceil(tokens k / experts * factor)`` assignments in
            training. An evaluation drops nothing.
        drop_policy: which: ``"probs"`` the most probable, ``"position"`` the earliest.
        drop_scope: ``"sequence"`` decides over all ranks that share a batch, the same for any tp and cp; with
            ``"rank"`` each decides by itself.
        pad_to_capacity: send exactly the capacity to every expert, so that all shapes are fixed; with scope ``"rank"``.
        timeout: seconds after which a collective that does not end stops the job.
    """

    tp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1
    order: str = "tp-cp-ep-dp-pp"
    dispatcher: str = "alltoall"
    attention: str = "ring"
    zigzag: bool = True
    stages_per_rank: int = 1
    capacity_factor: float = 0.0
    drop_policy: str = "probs"
    drop_scope: str = "sequence"
    pad_to_capacity: bool = False
    timeout: float = 300.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dispatcher", DISPATCHERS),
            ("attention", ("ring", "all_gather")),
            ("drop_policy", ("probs", "position")),
            ("drop_scope", ("sequence", "rank")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want {' or '.join(map(repr, allowed))}")
        if self.stages_per_rank < 1:
            raise ValueError(f"stages_per_rank: got {self.stages_per_rank}, want at least 1")
        if self.stages_per_rank > 1 and self.pp == 1:
            raise ValueError(f"stages_per_rank: got {self.stages_per_rank} with pp 1, want 1")
        if self.capacity_factor < 0:
            raise ValueError(f"capacity_factor: got {self.capacity_factor}, want 0 (dropless) or more")
        if self.pad_to_capacity and not (self.capacity_factor and self.drop_scope == "rank"):
            raise ValueError("pad_to_capacity: want a capacity_factor and drop_scope 'rank' with it")
        if not self.timeout > 0:
            raise ValueError(f"timeout: got {self.timeout}, want a number of seconds")

    def alone(self) -> ParallelConfig:
        """The same for one process: no axis, but the same capacity."""
        return replace(self, tp=1, cp=1, ep=1, etp=1, pp=1, stages_per_rank=1)

    def mesh(self, world_size: int) -> FoldedMesh:
        """The mesh of a world.

        Raises:
            ValueError: the sizes do not divide it.
        """
        return FoldedMesh(world_size, tp=self.tp, cp=self.cp, ep=self.ep, etp=self.etp, pp=self.pp, order=self.order)
