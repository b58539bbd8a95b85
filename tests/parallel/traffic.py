"""Training steps whose routing is dealt out evenly, the bytes that ranks count in them, and what the planner says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from foldscan import ops
from foldscan.data.sampler import PackedBatch
from foldscan.models import HybridConfig
from foldscan.parallel.collectives import count_traffic
from foldscan.parallel.config import ParallelConfig
from foldscan.parallel.model import FoldedLM, microbatches_of
from foldscan.parallel.optimizer import DistributedOptimizer
from foldscan.parallel.pipeline import Pipeline
from foldscan.parallel.planner import Mapping, ModelShape, Workload
from foldscan.parallel.planner import volumes as v
from foldscan.parallel.planner.step_volumes import step_volumes
from foldscan.training.evaluate import autocast

WORLD, NODE = 8, 4
MICROBATCHES, TOKENS = 8, 64
# Token t of a rank takes experts t, t + 1, t + 4 and t + 5: on 2 ranks or on 4 of 4, on 2 of 2, on 4 of 8.
PATTERN = (0, 1, 4, 5)

CONFIG = HybridConfig(
    pattern="M*-E",
    vocab_size=64,
    hidden_size=16,
    mamba_num_heads=8,
    mamba_head_dim=4,
    mamba_num_groups=8,
    state_size=4,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    rope_theta=1e4,
    intermediate_size=24,
    num_experts=8,
    experts_per_token=len(PATTERN),
    moe_intermediate_size=16,
    moe_activation="silu",
    shared_expert_intermediate_size=8,
    load_balancing_coef=0.1,
    router_z_coef=0.01,
)
SHAPE = ModelShape.from_config(CONFIG)


@dataclass(frozen=True)
class Case:
    """How to divide a step; ``unfolded`` with an order that puts expert parallelism inside data parallelism."""

    options: ParallelConfig
    precision: str = "fp32"
    unfolded: bool = False

    @property
    def mapping(self) -> Mapping:
        o = self.options
        method = "unfolded" if self.unfolded else "folded"
        return Mapping(WORLD, tp=o.tp, cp=o.cp, ep=o.ep, etp=o.etp, pp=o.pp, method=method)


def case(precision: str = "fp32", unfolded: bool = False, **options: Any) -> Case:
    order = "tp-cp-dp-ep-pp" if unfolded else "tp-cp-ep-dp-pp"
    return Case(ParallelConfig(**options, order=order), precision, unfolded)


CASES = [
    case(tp=2, cp=2, ep=2, etp=2, unfolded=True),
    case(tp=2, cp=2, ep=4, etp=1),
    case(tp=2, cp=2, ep=8, etp=1, dispatcher="dedup", attention="all_gather", precision="bf16"),
    case(tp=2, ep=4, etp=2, dispatcher="dedup"),
    case(cp=4, ep=2, etp=4, dispatcher="allgather", zigzag=False),
    case(cp=4, tp=2, ep=4, etp=2, dispatcher="allgather", precision="bf16"),
    case(cp=8, ep=2, etp=4, dispatcher="dedup"),
    case(tp=8, ep=8, etp=1),
    case(tp=4, etp=4, ep=2, unfolded=True, dispatcher="dedup"),
    case(ep=8, dispatcher="allgather"),
    case(tp=2, ep=4, pp=2),
    case(tp=2, etp=2, ep=2, pp=2, dispatcher="allgather", unfolded=True),
]


@contextmanager
def dealt_out() -> Iterator[None]:
    """Every expert gets as many tokens of every rank."""

    def route(logits: torch.Tensor, k: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        experts = (torch.arange(logits.shape[0])[:, None] + torch.tensor(PATTERN)) % CONFIG.num_experts
        return logits.softmax(1).gather(1, experts), experts

    with mock.patch.object(ops, "topk_route", route):
        yield


def distinct_ranks(ep: int) -> float:
    """How many of the ep ranks a token needs, on average."""
    local = CONFIG.num_experts // ep
    starts = range(CONFIG.num_experts)
    return sum(len({(t + o) % CONFIG.num_experts // local for o in PATTERN}) for t in starts) / len(starts)


def batches() -> list[PackedBatch]:
    """One sequence a micro-batch."""
    generator = torch.Generator().manual_seed(5)
    cu = torch.tensor([0, TOKENS], dtype=torch.int32)
    draw = torch.randint(0, CONFIG.vocab_size, (MICROBATCHES, TOKENS), generator=generator)
    return [PackedBatch(ids, ids.roll(-1), cu) for ids in draw]


def measure(chosen: Case) -> dict[str, Any]:
    """A step of the case on this rank: records of its traffic by phase, and its parameters by replica group."""
    mesh = chosen.options.mesh(WORLD)
    groups = mesh.init_process_groups()
    torch.manual_seed(3)
    model = FoldedLM(CONFIG, groups, chosen.options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    optimizer = DistributedOptimizer(
        model.named_parameters(), model.placements, groups.group, lambda named: torch.optim.SGD([p for _, p in named])
    )
    shards = [model.shard(batch) for batch in microbatches_of(batches(), groups)]
    found: dict[str, Any] = {}
    with dealt_out(), autocast(chosen.precision):
        if mesh.pp > 1:
            with count_traffic() as both:
                Pipeline(model).forward_backward(shards, MICROBATCHES)
            found["both"] = both.records(groups.rank, NODE)
        else:
            totals = model.new_totals()
            with count_traffic() as forward:
                losses = [model.loss(model.run_stage(0, None, shard, totals, 1.0), shard) for shard in shards]
            with count_traffic() as backward:
                for loss in losses:
                    loss.backward()
            found |= {"forward": forward.records(groups.rank, NODE), "backward": backward.records(groups.rank, NODE)}
    with count_traffic() as update:
        optimizer.reduce_gradients()
        optimizer.norm()
        optimizer.step()
    found["update"] = update.records(groups.rank, NODE)
    parameters: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        axes = model.placements[name].replicas
        parameters[axes] = parameters.get(axes, 0) + parameter.numel()
    letters = "".join(CONFIG.pattern[i] for numbers in model.stage_layers.values() for i in numbers)
    return {**found, "parameters": parameters, "letters": letters, "ends": [model.has_first, model.has_last]}


def planned(chosen: Case, letters: str, ends: list[bool]) -> dict[tuple[str, str], v.Volume]:
    """By (label, axes), the planner's bytes of a micro-batch's blocks; labels that belong together as ``a+b``."""
    o, m = chosen.options, chosen.mapping
    size = 2 if chosen.precision == "bf16" else 4
    part = TOKENS // o.cp
    tokens = part // o.tp
    sizes: Any = {"element_bytes": size, "node": NODE}
    context: Any = {**sizes, "stride": o.tp}
    found: dict[tuple[str, str], v.Volume] = {}

    def add(label: str, axes: str, volume: v.Volume) -> None:
        if volume.total.total:
            found[label, axes] = found.get((label, axes), v.Volume()) + volume

    for letter in letters:
        add("activations", "tp", v.tensor_volume(tokens, CONFIG.hidden_size, o.tp, regather=False, **sizes))
        if letter == "*":
            exchange = v.context_ring_volume if o.attention == "ring" else v.context_gather_volume
            add("kv+dkv", "cp", exchange(part, SHAPE.kv_width // o.tp, o.cp, **context))
        if letter == "M":
            heads, groups_state = SHAPE.mamba_heads // o.tp, SHAPE.mamba_groups * SHAPE.state
            channels = (SHAPE.mamba_width + 2 * groups_state) // o.tp
            scan: Any = {**context, "zigzag": o.zigzag}
            add("halo", "cp", v.context_scan_volume(0, SHAPE.mamba_head_dim, SHAPE.state, channels, 4, o.cp, **scan))
            add("states", "cp", v.context_scan_volume(heads, SHAPE.mamba_head_dim, SHAPE.state, 0, 4, o.cp, **scan))
        if letter == "E":
            volumes = v.dispatch_volumes(
                tokens,
                SHAPE.top_k,
                SHAPE.hidden,
                experts=SHAPE.experts,
                ep=o.ep,
                etp=o.etp,
                dispatcher=o.dispatcher,
                ep_stride=m.ep_stride,
                distinct=distinct_ranks(o.ep),
                **sizes,
            )
            add("tokens", "ep", volumes["ep"])
            add("tokens", "etp", volumes["etp"])
            add("probs", "ep+etp", volumes["probs"])
            add("counts+metadata", "ep+etp", volumes["metadata"])
            # The loads of E experts as 64-bit integers, summed over those who share the batch; not in the plan.
            add("loads", "tp-cp", v.Volume(v.gather(8 * SHAPE.experts, o.tp * o.cp, 1, NODE)))
    vocabulary = v.vocabulary_volumes(tokens, SHAPE.hidden, o.tp, embedding_bytes=4, **sizes)
    for label, here in (("embedding", ends[0]), ("head", ends[1]), ("loss", ends[1])):
        if here:
            add(label, "tp", vocabulary[label])
    return found


def planned_update(chosen: Case, parameters: dict[str, int]) -> dict[tuple[str, str], v.Volume]:
    """The optimizer's, from the local parameters of every replica group; fp32 both ways here."""
    mesh = chosen.options.mesh(WORLD)
    found = {("norm", "tp-cp-dp-pp"): v.Volume(v.gather(8, WORLD, 1, NODE))}
    for axes, count in parameters.items():
        ranks = mesh.group(axes, 0)
        if len(ranks) > 1:
            stride = ranks[1] - ranks[0]
            both = v.optimizer_volume(count, len(ranks), stride=stride, parameter_bytes=4, node=NODE)
            found["parameters", axes] = v.Volume(both.forward)
            found["gradients", axes] = v.Volume(both.backward)
    return found


def planned_step(chosen: Case) -> dict[str, v.Volume]:
    """`step_volumes` of the case, for balanced routing on a stack like this one."""
    o = chosen.options
    context = "ring" if o.attention == "ring" else "allgather"
    work = Workload(gbs=MICROBATCHES, seq=TOKENS, tp_regather=False, context=context)
    return step_volumes(SHAPE, chosen.mapping, work, dispatcher=o.dispatcher, element_bytes=4, node=NODE)
