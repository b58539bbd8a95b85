"""Folded meshes: attention and experts divide the same ranks in two ways (MoE Parallel Folding, arXiv:2504.14960).

Attention works on sequences and has the axes tp, cp, dp and pp; an expert works on single tokens and has etp, ep, edp
and pp. The two grids are independent, but for one thing: a pipeline stage is the same set of ranks in both, so their pp
groups must be the same. The paper's Listing 1 violates that where cp tp differs from ep etp; here, as in Megatron-Core,
both grids are laid out by one order string, and a mapping whose pp groups differ is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foldscan.parallel.process_groups import ProcessGroups

ATTENTION = ("tp", "cp", "dp", "pp")
EXPERTS = ("etp", "ep", "edp", "pp")
# What an axis of the order string is called in the grid of the experts; attention has no ep, experts have no cp.
_IN_EXPERTS = {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}
_ORDERED = ("tp", "cp", "ep", "dp", "pp")


class Grid:
    """Ranks 0 .. n - 1 counted along named axes, the first axis fastest.

    Args:
        sizes: by axis, fastest first.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.strides: dict[str, int] = {}
        stride = 1
        for axis, size in sizes.items():
            self.strides[axis] = stride
            stride *= size
        self.world_size = stride

    def offsets(self, axes: Sequence[str]) -> list[int]:
        """Ranks of the group of ``axes`` that rank 0 is in, ascending."""
        found = [0]
        for axis, size in self.sizes.items():
            if axis in axes:
                found = [i * self.strides[axis] + r for i in range(size) for r in found]
        return found

    def groups(self, axes: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """All groups along ``axes``, each ascending, ordered by their first rank."""
        members = self.offsets(axes)
        firsts = self.offsets([axis for axis in self.sizes if axis not in axes])
        return tuple(tuple(first + r for r in members) for first in firsts)

    def position(self, rank: int) -> dict[str, int]:
        """Index of a rank along every axis."""
        return {axis: rank // self.strides[axis] % size for axis, size in self.sizes.items()}


class FoldedMesh:
    """Two grids over the same ranks: ``tp x cp x dp x pp`` for attention, ``etp x ep x edp x pp`` for the experts.

    Pure Python: needs no process group, so a mesh of any size can be made anywhere.

    Args:
        world_size: ranks in all.
        tp, cp, pp: tensor, context and pipeline parallelism. dp is what is left: ``world_size / (tp cp pp)``.
        ep, etp: expert parallelism, and tensor parallelism inside an expert; edp is ``world_size / (etp ep pp)``.
        order: axes of both grids, fastest first, with tp for etp and dp for edp as well. Axes of size 1 may be missing.

    Attributes:
        dp, edp: the derived sizes. attention, experts: the two `Grid`.

    Raises:
        TypeError: a size is no integer. ValueError: a size below 1, a product that does not divide the world (with what
        would), an order that lacks an axis, or pp groups that differ between the grids.
    """

    def __init__(
        self,
        world_size: int,
        *,
        tp: int = 1,
        cp: int = 1,
        ep: int = 1,
        etp: int = 1,
        pp: int = 1,
        order: str = "tp-cp-ep-dp-pp",
    ) -> None:
        for name, size in (("world_size", world_size), ("tp", tp), ("cp", cp), ("ep", ep), ("etp", etp), ("pp", pp)):
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name}: got {size!r}, want an integer")
            if size < 1:
                raise ValueError(f"{name}: got {size}, want at least 1")
        self.world_size, self.tp, self.cp, self.ep, self.etp, self.pp = world_size, tp, cp, ep, etp, pp
        self.dp = _left_over(world_size, {"tp": tp, "cp": cp, "pp": pp})
        self.edp = _left_over(world_size, {"etp": etp, "ep": ep, "pp": pp})
        self.order = order
        names = _complete(order, {"tp": max(tp, etp), "cp": cp, "ep": ep, "dp": max(self.dp, self.edp), "pp": pp})
        self.attention = Grid({name: getattr(self, name) for name in names if name != "ep"})
        self.experts = Grid({_IN_EXPERTS[n]: getattr(self, _IN_EXPERTS[n]) for n in names if n != "cp"})
        ours, theirs = self.attention.strides["pp"], self.experts.strides["pp"]
        if pp > 1 and ours != theirs:
            raise ValueError(
                f"order: with {order!r} neighbouring pipeline stages are {ours} ranks apart in attention "
                f"({_product(self.attention, 'pp')}) and {theirs} for the experts ({_product(self.experts, 'pp')}), so "
                "their pp groups differ; want these products equal, or an order that ends in pp"
            )
        self._groups: dict[str, tuple[tuple[int, ...], ...]] = {}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in ("tp", "cp", "ep", "etp", "pp"))
        return f"FoldedMesh({self.world_size}, {sizes}, order={self.order!r})"

    def ranks(self, axes: str) -> tuple[tuple[int, ...], ...]:
        """All groups along an axis (``"tp"``, ``"edp"``) or several of one grid (``"dp-cp"``, ``"etp-ep-pp"``).

        Every rank is in exactly one group. Groups are ascending and ordered by their first rank, whatever the order in
        which the axes are named.

        Raises:
            ValueError: unknown axes, an axis twice, or axes of both grids.
        """
        if axes not in self._groups:
            grid, names = self._grid_of(axes)
            self._groups[axes] = grid.groups(names)
        return self._groups[axes]

    def group(self, axes: str, rank: int) -> tuple[int, ...]:
        """The group along ``axes`` that ``rank`` is in."""
        self._check_rank(rank)
        grid, names = self._grid_of(axes)
        first = rank - sum(i * grid.strides[a] for a, i in grid.position(rank).items() if a in names)
        return tuple(first + r for r in grid.offsets(names))

    def position(self, rank: int) -> dict[str, int]:
        """Where a rank is: its index along tp, cp, dp, pp, etp, ep and edp."""
        self._check_rank(rank)
        return self.attention.position(rank) | self.experts.position(rank)

    def init_process_groups(self, device_type: str = "cpu", timeout: float | None = None) -> ProcessGroups:
        """Device meshes and process groups of this mesh; every rank of the default process group has to call it.

        Args:
            device_type: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL).
            timeout: seconds that a collective waits for a rank; None for torch.distributed's default.

        Raises:
            RuntimeError: torch.distributed is not initialised. ValueError: it has another world size.
        """
        from foldscan.parallel.process_groups import ProcessGroups

        return ProcessGroups(self, device_type, timeout)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank: got {rank}, want 0 .. {self.world_size - 1}")

    def _grid_of(self, axes: str) -> tuple[Grid, list[str]]:
        names = axes.split("-")
        if len(set(names)) == len(names):
            for grid in (self.attention, self.experts):
                if all(name in grid.sizes for name in names):
                    return grid, names
        raise ValueError(
            f"axes: got {axes!r}, want some of {'-'.join(ATTENTION)} or some of {'-'.join(EXPERTS)}, each once"
        )


def _left_over(world_size: int, sizes: dict[str, int]) -> int:
    """world_size over the product of the sizes."""
    whole = prod(sizes.values())
    if world_size % whole == 0:
        return world_size // whole
    legal = []
    for name, size in sizes.items():
        others = whole // size
        fits = [d for d in range(1, world_size // others + 1) if world_size % (others * d) == 0]
        if fits:
            shown = ", ".join(map(str, fits[:8])) + (", .." if len(fits) > 8 else "")
            legal.append(f"{name} in {{{shown}}}")
    hint = f"; with the other two as they are: {' or '.join(legal)}" if legal else ""
    raise ValueError(
        f"{', '.join(sizes)}: got {' x '.join(map(str, sizes.values()))} = {whole}, want a divisor of the {world_size} "
        f"ranks{hint}"
    )


def _complete(order: str, sizes: dict[str, int]) -> list[str]:
    """The axes of an order string, with those of size 1 that it does not name at the end."""
    names = order.split("-")
    missing = [name for name in _ORDERED if name not in names]
    if len(set(names)) != len(names) or set(names) - set(_ORDERED):
        raise ValueError(f"order: got {order!r}, want {', '.join(_ORDERED)}, each once, joined by '-'")
    for name in missing:
        if sizes[name] > 1:
            raise ValueError(f"order: got {order!r}, which has no place for {name} of size {sizes[name]}")
    return names + missing


def _product(grid: Grid, axis: str) -> str:
    """What stands before an axis: "tp 2 x cp 4"."""
    before = [f"{a} {s}" for a, s in grid.sizes.items() if grid.strides[a] < grid.strides[axis] and s > 1]
    return " x ".join(before) or "nothing before pp"
