"""Which dispatcher suits the expert layers of a mapping, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from foldscan.parallel.planner.mapping import DISPATCHERS, Mapping, Workload
from foldscan.parallel.planner.shapes import ModelShape
from foldscan.parallel.planner.step_time import Machine, StepModel
from foldscan.parallel.planner.volumes import dispatch_volumes, expected_ranks, local_ranks

WORTH = 0.1  # share of the exchange time that a less simple dispatcher has to save


@dataclass(frozen=True)
class Advice:
    """A recommendation for every expert layer of the model: they have one shape.

    Attributes:
        dispatcher: one of ``DISPATCHERS``.
        reason: in words.
        seconds: predicted exchange time of a layer and micro-batch, forward and backward, by dispatcher.
        sent: bytes that a rank sends in it, and those of them that leave the node, by dispatcher.
    """

    dispatcher: str
    reason: str
    seconds: dict[str, float]
    sent: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def recommend(model: ModelShape, mapping: Mapping, work: Workload, machine: Machine) -> Advice | None:
    """The simplest dispatcher that no other beats by more than a tenth of the exchange time; None without experts.

    Gathering all tokens sends (EP - 1) T H, a copy for every chosen expert (EP - 1) / EP K T H: at ETP = 1 the first is
    less exactly where EP < K. One copy for every rank with a chosen expert sends (EP - 1) / EP u T H, where u is
    `expected_ranks`; where a group spans nodes, one copy for every node saves more.
    """
    if "E" not in model.pattern:
        return None
    ep, k = mapping.ep, model.top_k
    node = machine.cluster.gpus_per_node
    tokens = work.mbs * work.seq / (mapping.tp * mapping.cp)
    seconds, sent = {}, {}
    for name in DISPATCHERS:
        step = StepModel(model, mapping, work, machine, name)
        seconds[name] = sum(step.exchanges(2 * step.tokens * k * model.hidden))
        volumes = dispatch_volumes(
            tokens,
            k,
            model.hidden,
            experts=model.experts,
            ep=ep,
            etp=mapping.etp,
            dispatcher=name,
            ep_stride=mapping.ep_stride,
            node=node,
        )
        both = volumes["ep"].total + volumes["etp"].total
        sent[name] = (both.total, both.inter)
    least = min(seconds.values())
    chosen = next(name for name in DISPATCHERS if seconds[name] * (1 - WORTH) <= least)
    distinct = expected_ranks(model.experts, k, ep)
    saved = 1 - least / seconds["alltoall"] if seconds["alltoall"] else 0.0
    if ep == 1:
        reason = "ep is 1: no token leaves its expert-parallel rank, whichever dispatcher is used"
    elif chosen == "allgather":
        why = f"EP {ep} < K {k}" if ep < k else f"EP {ep} and K {k}"
        reason = (
            f"{why}: gathering every token sends {ep - 1} T H a pass, a copy an expert "
            f"{_short((ep - 1) / ep * k)} T H; {saved:.0%} of the exchange time"
        )
    elif chosen == "dedup-node":
        nodes = ep // local_ranks(ep, mapping.ep_stride, node)
        reason = (
            f"the {k} experts of a token live on {expected_ranks(model.experts, k, nodes):.2f} of {nodes} nodes on "
            f"average: one copy for each, passed on inside, saves {saved:.0%} of the exchange time"
        )
    elif chosen == "dedup":
        reason = (
            f"the {k} experts of a token live on {distinct:.2f} of {ep} ranks on average: one copy for each instead of "
            f"{k} saves {saved:.0%} of the exchange time"
        )
    else:
        reason = (
            f"EP {ep}, K {k}: the experts of a token live on {distinct:.2f} ranks on average, so neither gathering all "
            f"tokens nor leaving out duplicates saves more than {WORTH:.0%} of the exchange time"
        )
    local = local_ranks(ep, mapping.ep_stride, node)
    if local < ep and chosen != "dedup-node":
        nodes = ep // local
        hops = expected_ranks(model.experts, k, nodes)
        reason += f"; the group spans {nodes} nodes, of which a token needs {hops:.2f} on average"
    return Advice(chosen, reason, seconds, sent)


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
