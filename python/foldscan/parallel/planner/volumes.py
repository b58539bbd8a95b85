"""Bytes that a rank sends, per collective, inside its node and out of it.

Every function counts what leaves one rank: an all-gather of one shard each from n ranks sends n - 1 shards, a
reduce-scatter as many, an all-to-all everything but the rank's own part. Routing is balanced. Formulas:
arXiv:2504.14960 sections 3.2 and 3.3, with the sizes of `foldscan.parallel`'s own exchanges.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import comb

from foldscan.parallel.planner.mapping import DISPATCHERS, Mapping, Workload
from foldscan.parallel.planner.shapes import ModelShape

PROBABILITY_BYTES = 4  # fp32
STATE_BYTES = 4  # the scan's state, fp32


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends to ranks of its own node and to ranks of others."""

    intra: float = 0.0
    inter: float = 0.0

    @property
    def total(self) -> float:
        return self.intra + self.inter

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.intra + other.intra, self.inter + other.inter)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.intra * times, self.inter * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Volume:
    """What a collective sends in the forward and in the backward pass."""

    forward: Traffic = Traffic()
    backward: Traffic = Traffic()

    @property
    def total(self) -> Traffic:
        return self.forward + self.backward

    def __add__(self, other: Volume) -> Volume:
        return Volume(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Volume:
        return Volume(self.forward * times, self.backward * times)


def local_ranks(ranks: int, stride: int, node: int = 8) -> int:
    """Ranks of a group of ``ranks``, ``stride`` apart, that share a node of ``node``: the asking one among them."""
    return max(1, min(node // stride, ranks))


def all_to_all(payload: float, ranks: int, stride: int = 1, node: int = 8) -> Traffic:
    """An all-to-all of ``payload`` bytes a rank, its own part included, spread evenly."""
    local = local_ranks(ranks, stride, node)
    return Traffic(payload * (local - 1) / ranks, payload * (ranks - local) / ranks)


def gather(shard: float, ranks: int, stride: int = 1, node: int = 8) -> Traffic:
    """An all-gather of ``shard`` bytes a rank, or the reduce-scatter that is its adjoint.

    Across nodes it is hierarchical: a shard goes to every other node once and is passed on inside.
    """
    nodes = ranks // local_ranks(ranks, stride, node)
    return Traffic((ranks - nodes) * shard, (nodes - 1) * shard)


def expected_ranks(experts: int, top_k: int, ranks: int) -> float:
    """Distinct ranks (or nodes) among ``ranks`` that a token's ``top_k`` of ``experts`` live on, own one included.

    u = N (1 - C(E - E/N, K) / C(E, K)): choices are uniform without replacement, every rank has E/N experts.
    """
    if experts % ranks:
        raise ValueError(f"ranks: got {ranks}, want a divisor of experts = {experts}")
    return ranks * (1 - comb(experts - experts // ranks, top_k) / comb(experts, top_k))


def deduplicated(
    row: float, top_k: int, experts: int, ranks: int, stride: int = 1, node: int = 8, *, by_node: bool = False
) -> Traffic:
    """A token of ``row`` bytes to the ranks that have its experts, once to each.

    Args:
        by_node: once to each node, to the rank there that stands as the sender does; that one passes it on.
    """
    local = local_ranks(ranks, stride, node)
    distinct = expected_ranks(experts, top_k, ranks) * row
    if not by_node:
        return all_to_all(distinct, ranks, stride, node)
    nodes = ranks // local
    hops = expected_ranks(experts, top_k, nodes) * row
    return Traffic(distinct * (local - 1) / local, hops * (nodes - 1) / nodes)


def dispatch_volumes(
    tokens: float,
    top_k: int,
    hidden: int,
    *,
    experts: int,
    ep: int,
    etp: int = 1,
    dispatcher: str = "alltoall",
    element_bytes: int = 2,
    ep_stride: int | None = None,
    node: int = 8,
) -> dict[str, Volume]:
    """One expert layer and micro-batch: dispatch and combine, forward and backward.

    Args:
        tokens: T, of this rank at the layer's input, the same on all.
        top_k, hidden, experts: K, H and E.
        ep, etp: group sizes. Ranks of an etp group are neighbours.
        dispatcher: ``"alltoall"`` sends T K rows of H each way; ``"allgather"`` gathers the T tokens of all ranks;
            ``"dedup"`` sends a token once to every rank that has an expert of it, ``"dedup-node"`` once to every node,
            where it is passed on.
        element_bytes: of a feature.
        ep_stride: ranks between neighbours of the ep group; etp by default, as folded.
        node: GPUs of a node.

    Returns:
        ``"ep"`` and ``"etp"``, and ``"probs"``: the fp32 probabilities that travel with the tokens and their gradients
        that come back. The backward pass is the adjoint: it sends as much as the forward pass.
    """
    if dispatcher not in DISPATCHERS:
        raise ValueError(f"dispatcher: got {dispatcher!r}, want one of {', '.join(DISPATCHERS)}")
    stride = etp if ep_stride is None else ep_stride
    row, scalars = hidden * element_bytes, top_k * PROBABILITY_BYTES
    arriving = tokens * top_k * row  # expert rows of this rank before etp, on average
    gathered, probs_gathered = arriving, tokens * scalars
    probs = all_to_all(tokens * scalars, ep, stride, node)
    if dispatcher == "alltoall":
        exchange = all_to_all(arriving, ep, stride, node)
    elif dispatcher != "allgather":
        by_node = dispatcher == "dedup-node"
        exchange = deduplicated(tokens * row, top_k, experts, ep, stride, node, by_node=by_node)
    else:
        exchange = gather(tokens * row, ep, stride, node)
        probs = gather(tokens * scalars, ep, stride, node)
        gathered, probs_gathered = ep * tokens * row, ep * tokens * scalars
    tensor = gather(gathered, etp, 1, node) + gather(arriving, etp, 1, node)
    probs = probs + gather(probs_gathered, etp, 1, node)
    return {
        "ep": Volume(exchange * 2, exchange * 2),
        "etp": Volume(tensor, tensor),
        "probs": Volume(probs, probs),
    }


def tensor_volume(
    tokens: float, hidden: int, tp: int, *, regather: bool = True, element_bytes: int = 2, node: int = 8
) -> Volume:
    """A column- and row-parallel pair with sequence parallelism: gather and reduce-scatter of the T local tokens.

    Args:
        regather: the backward pass gathers the input again for the weight gradient (Megatron-LM: five passes in all),
            or it was kept (four).
    """
    once = gather(tokens * hidden * element_bytes, tp, 1, node)
    return Volume(once * 2, once * (3 if regather else 2))


def context_ring_volume(
    tokens: float, kv_width: float, cp: int, *, stride: int = 1, element_bytes: int = 2, node: int = 8
) -> Volume:
    """Ring attention: keys and values of the other ranks pass by; on the way back their gradients travel as well.

    Args:
        tokens: of the rank's part of the sequences, on all heads of the rank.
        kv_width: features of the keys, or of the values, of the rank.
    """
    forward = gather(2 * tokens * kv_width * element_bytes, cp, stride, node)
    return Volume(forward, forward * 2)


def context_gather_volume(
    tokens: float,
    kv_width: float,
    cp: int,
    *,
    regather: bool = False,
    stride: int = 1,
    element_bytes: int = 2,
    node: int = 8,
) -> Volume:
    """Attention that gathers all keys and values; their gradients are reduce-scattered.

    Args:
        regather: the backward pass gathers keys and values again, instead of keeping them.
    """
    forward = gather(2 * tokens * kv_width * element_bytes, cp, stride, node)
    return Volume(forward, forward * (1 + regather))


def context_scan_volume(
    sequences: int,
    heads: float,
    head_dim: int,
    state: int,
    conv_channels: float,
    conv: int,
    cp: int,
    *,
    stride: int = 1,
    element_bytes: int = 2,
    node: int = 8,
) -> Volume:
    """Mamba-2 over context parallelism: the convolution's halo to the next rank, and every rank's state and decay.

    A rank's part of a sequence maps the state affinely, so that heads (P N + 1) fp32 a sequence are all it has to tell.
    """
    if cp == 1:
        return Volume()
    halo = sequences * (conv - 1) * conv_channels * element_bytes
    crosses = local_ranks(cp, stride, node) < cp
    forward = gather(sequences * heads * (head_dim * state + 1) * STATE_BYTES, cp, stride, node)
    forward = forward + Traffic(0 if crosses else halo, halo if crosses else 0)
    return Volume(forward, forward)


def pipeline_volume(
    tokens: float, hidden: int, pp: int, chunks: int = 1, *, stride: int = 1, element_bytes: int = 2, node: int = 8
) -> Volume:
    """A micro-batch from a stage in the middle: activations forward and gradients back, once a chunk.

    Counted for a rank at the edge of its node, where there is one.
    """
    if pp == 1:
        return Volume()
    once = chunks * tokens * hidden * element_bytes
    crosses = local_ranks(pp, stride, node) < pp
    traffic = Traffic(0.0 if crosses else once, once if crosses else 0.0)
    return Volume(traffic, traffic)


def optimizer_volume(
    parameters: float,
    ranks: int,
    *,
    stride: int = 1,
    gradient_bytes: int = 4,
    parameter_bytes: int = 2,
    node: int = 8,
) -> Volume:
    """A step of a distributed optimizer: gradients are reduce-scattered, then parameters gathered.

    Returns:
        The gather as forward, the reduce-scatter as backward.
    """
    shard = parameters / ranks
    return Volume(
        gather(shard * parameter_bytes, ranks, stride, node), gather(shard * gradient_bytes, ranks, stride, node)
    )


def sharded_volume(parameters: float, ranks: int, *, stride: int = 1, element_bytes: int = 2, node: int = 8) -> Volume:
    """FSDP, a micro-batch: parameters gathered in both passes, gradients reduce-scattered."""
    once = gather(parameters / ranks * element_bytes, ranks, stride, node)
    return Volume(once, once * 2)


def step_volumes(
    model: ModelShape,
    mapping: Mapping,
    work: Workload,
    *,
    dispatcher: str = "alltoall",
    element_bytes: int = 2,
    node: int = 8,
) -> dict[str, Volume]:
    """Bytes that a rank of the longest pipeline stage sends in one step, by collective.

    Args:
        element_bytes: of activations. Gradients go in fp32 and parameters in bf16; with FSDP both in bf16.

    Returns:
        ``ep``, ``etp``, ``probs``, ``tp``, ``cp``, ``pp``, ``dp`` and ``edp`` (dense and expert gradients and
        parameters; under FSDP its gathers). Zero where a mapping has none.
    """
    stage = max(model.stages(mapping.pp), key=len)
    microbatches = work.gbs // (mapping.dp * work.mbs)
    found = {name: Volume() for name in ("ep", "etp", "probs", "tp", "cp", "pp", "dp", "edp")}
    sizes = {"element_bytes": element_bytes, "node": node}
    for letter, times in Counter(stage).items():
        for name, volume in block_volumes(model, letter, mapping, work, dispatcher=dispatcher, **sizes).items():
            found[name] += volume * (times * microbatches)
    tokens = work.mbs * work.seq / (mapping.tp * mapping.cp)
    chunks = virtual_stages(model, mapping, work)
    stride = mapping.gpus // mapping.pp
    found["pp"] = pipeline_volume(tokens, model.hidden, mapping.pp, chunks, stride=stride, **sizes) * microbatches
    dense, expert = stage_parameters(model, mapping)
    kind, times = (sharded_volume, microbatches) if mapping.sharded else (optimizer_volume, 1)
    found["dp"] = kind(dense, mapping.dp * mapping.cp, stride=mapping.tp, node=node) * times
    found["edp"] = kind(expert, mapping.edp, stride=mapping.ep * mapping.etp, node=node) * times
    return found


def block_volumes(
    model: ModelShape,
    letter: str,
    mapping: Mapping,
    work: Workload,
    *,
    dispatcher: str = "alltoall",
    element_bytes: int = 2,
    node: int = 8,
) -> dict[str, Volume]:
    """Bytes that a rank sends for one block and micro-batch, by collective."""
    tp, cp = mapping.tp, mapping.cp
    part = work.mbs * work.seq / cp
    tokens = part / tp
    sizes = {"element_bytes": element_bytes, "node": node}
    found = {}
    if letter == "E":
        found = dispatch_volumes(
            tokens,
            model.top_k,
            model.hidden,
            experts=model.experts,
            ep=mapping.ep,
            etp=mapping.etp,
            dispatcher=dispatcher,
            ep_stride=mapping.ep_stride,
            **sizes,
        )
    if letter != "E" or model.shared_ffn:
        found["tp"] = tensor_volume(tokens, model.hidden, tp, regather=work.tp_regather, **sizes)
    if letter == "*":
        exchange = context_ring_volume if work.context == "ring" else context_gather_volume
        found["cp"] = exchange(part, model.kv_width / tp, cp, stride=tp, **sizes)
    if letter == "M":
        channels = (model.mamba_width + 2 * model.mamba_groups * model.state) / tp
        heads = model.mamba_heads / tp
        found["cp"] = context_scan_volume(
            work.mbs, heads, model.mamba_head_dim, model.state, channels, model.conv, cp, stride=tp, **sizes
        )
    return found


def virtual_stages(model: ModelShape, mapping: Mapping, work: Workload) -> int:
    """Model chunks of a pipeline stage: as asked, or as many as the smallest stage has layers."""
    if work.vpp is not None:
        return work.vpp
    return max(1, model.layers // mapping.pp)


def stage_parameters(model: ModelShape, mapping: Mapping) -> tuple[float, float]:
    """Most dense and most expert parameters of any rank, before sharding over data parallelism.

    Embedding and head are spread evenly over the stages, as arXiv:2504.14960's memory figures have it.
    """
    stages = set(model.stages(mapping.pp))
    dense = max(model.dense_parameters(stage) for stage in stages) + model.vocabulary_parameters / mapping.pp
    expert = max(model.expert_parameters(stage) for stage in stages)
    return dense / mapping.tp, expert / (mapping.ep * mapping.etp)
