"""Token dispatchers of MoE layers: three ways to the experts and back, with the same results bit for bit."""

from foldscan.parallel.dispatchers.allgather import AllGatherDispatcher
from foldscan.parallel.dispatchers.alltoall import AllToAllDispatcher
from foldscan.parallel.dispatchers.contract import State, TokenDispatcher, run
from foldscan.parallel.dispatchers.dedup import DedupDispatcher
from foldscan.parallel.dispatchers.dropping import Dropping
from foldscan.parallel.groups import Group

DISPATCHERS: dict[str, type[TokenDispatcher]] = {
    "allgather": AllGatherDispatcher,
    "alltoall": AllToAllDispatcher,
    "dedup": DedupDispatcher,
}


def make_dispatcher(name: str, num_experts: int, ep: Group, etp: Group) -> TokenDispatcher:
    """The dispatcher of that name: ``"allgather"``, ``"alltoall"`` or ``"dedup"``.

    Raises:
        ValueError: an unknown name, or experts that do not divide over ``ep``.
    """
    if name not in DISPATCHERS:
        raise ValueError(f"name: got {name!r}, want one of {', '.join(DISPATCHERS)}")
    return DISPATCHERS[name](num_experts, ep, etp)


__all__ = [
    "AllGatherDispatcher",
    "AllToAllDispatcher",
    "DedupDispatcher",
    "Dropping",
    "State",
    "TokenDispatcher",
    "make_dispatcher",
    "run",
]
