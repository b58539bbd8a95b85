"""Bytes that a rank sends, per collective, inside its node and out of it.

Every function counts what leaves one rank: an all-gather of one shard each from n ranks sends n - 1 shards, a
reduce-scatter as many, an all-to-all everything but the rank's own part. Routing is balanced. Formulas:
arXiv:2504.14960 sections 3.2 and 3.3, with the sizes of `foldscan.parallel`'s own exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from foldscan.parallel.planner.mapping import DISPATCHERS

FLOAT_BYTES = 4  # fp32: probabilities, states of the scan, parts of the loss
CHOICE_BYTES = 4  # an expert's number beside a token, int32
COUNT_BYTES = 8  # a number of rows, int64


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


def next_door(payload: float, ranks: int, stride: int = 1, node: int = 8) -> Traffic:
    """``payload`` bytes to the next rank of a group, from a rank at the edge of its node, where the group leaves it."""
    crosses = local_ranks(ranks, stride, node) < ranks
    return Traffic(0.0 if crosses else payload, payload if crosses else 0.0)


def expected_ranks(experts: int, top_k: int, ranks: int) -> float:
    """Distinct ranks (or nodes) among ``ranks`` that a token's ``top_k`` of ``experts`` live on, own one included.

    u = N (1 - C(E - E/N, K) / C(E, K)): choices are uniform without replacement, every rank has E/N experts.
    """
    if experts % ranks:
        raise ValueError(f"ranks: got {ranks}, want a divisor of experts = {experts}")
    return ranks * (1 - comb(experts - experts // ranks, top_k) / comb(experts, top_k))


def deduplicated(
    row: float,
    top_k: int,
    experts: int,
    ranks: int,
    stride: int = 1,
    node: int = 8,
    *,
    by_node: bool = False,
    distinct: float | None = None,
) -> Traffic:
    """A token of ``row`` bytes to the ranks that have its experts, once to each.

    Args:
        by_node: once to each node, to the rank there that stands as the sender does; that one passes it on.
        distinct: ranks that a token needs, own one included, where it is known; else `expected_ranks`.
    """
    local = local_ranks(ranks, stride, node)
    copies = row * (expected_ranks(experts, top_k, ranks) if distinct is None else distinct)
    if not by_node:
        return all_to_all(copies, ranks, stride, node)
    nodes = ranks // local
    hops = expected_ranks(experts, top_k, nodes) * row
    return Traffic(copies * (local - 1) / local, hops * (nodes - 1) / nodes)


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
    distinct: float | None = None,
) -> dict[str, Volume]:
    """One expert layer and micro-batch, dropless: dispatch and combine, forward and backward.

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
        distinct: ranks of the ep group that a token needs, own one included, as the deduplicating dispatchers find
            them; by default `expected_ranks`.

    Returns:
        ``"ep"`` and ``"etp"``; ``"probs"``: the fp32 probabilities that travel with the tokens and their gradients that
        come back; ``"metadata"``: what ranks tell each other about the rows, forward only. Where tokens travel rather
        than rows, all K probabilities and choices of a token go with it. The backward pass is the adjoint: it sends as
        much as the forward pass.
    """
    if dispatcher not in DISPATCHERS:
        raise ValueError(f"dispatcher: got {dispatcher!r}, want one of {', '.join(DISPATCHERS)}")
    stride = etp if ep_stride is None else ep_stride
    row, slots = hidden * element_bytes, top_k
    rows = tokens * top_k  # of this rank's experts before etp, on average
    if dispatcher == "alltoall":
        travelling, slots = rows, 1

        def exchange(size: float) -> Traffic:
            return all_to_all(rows * size, ep, stride, node)

        told = [(experts, ep, stride), (experts, etp, 1)]
    elif dispatcher == "allgather":
        travelling = ep * tokens

        def exchange(size: float) -> Traffic:
            return gather(tokens * size, ep, stride, node)

        told = []
    else:
        known = expected_ranks(experts, top_k, ep) if distinct is None else distinct
        travelling, by_node = known * tokens, dispatcher == "dedup-node"

        def exchange(size: float) -> Traffic:
            return deduplicated(tokens * size, top_k, experts, ep, stride, node, by_node=by_node, distinct=known)

        told = [(ep, ep, stride), (1, etp, 1)]

    def with_etp(size: float) -> Traffic:
        """One way of ``size`` bytes beside every travelling token or row."""
        return exchange(size) + gather(travelling * size, etp, 1, node)

    tensor = gather(travelling * row, etp, 1, node) + gather(rows * row, etp, 1, node)
    probs = with_etp(slots * FLOAT_BYTES)
    metadata = with_etp(slots * CHOICE_BYTES) if dispatcher != "alltoall" else Traffic()
    for numbers, ranks, apart in told:
        metadata += gather(numbers * COUNT_BYTES, ranks, apart, node)
    return {
        "ep": Volume(exchange(row) * 2, exchange(row) * 2),
        "etp": Volume(tensor, tensor),
        "probs": Volume(probs, probs),
        "metadata": Volume(metadata),
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

    A rank sends to the next one only: counted for a rank at the edge of its node, where the ring leaves it.

    Args:
        tokens: of the rank's part of the sequences, on all heads of the rank.
        kv_width: features of the keys, or of the values, of the rank.
    """
    forward = next_door((cp - 1) * 2 * tokens * kv_width * element_bytes, cp, stride, node)
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
    heads: float,
    head_dim: int,
    state: int,
    conv_channels: float,
    conv: int,
    cp: int,
    *,
    zigzag: bool = True,
    stride: int = 1,
    element_bytes: int = 2,
    node: int = 8,
) -> Volume:
    """Mamba-2 over context parallelism: the convolution's halo to the neighbours, and states and decays to all.

    A piece of a sequence maps the state affinely, so that heads (P N + 1) fp32 are all it has to tell. A micro-batch is
    cut as a whole, so a cut is inside one sequence at most, however many there are. Counted for the rank that sends
    most, and at the edge of its node, where there is one; a cut between two sequences costs nothing.

    Args:
        zigzag: a rank holds two pieces of the micro-batch, one from either half, or one.
    """
    if cp == 1:
        return Volume()
    pieces = 2 if zigzag else 1
    halo = (conv - 1) * conv_channels * element_bytes
    states = gather(pieces * heads * (head_dim * state + 1) * FLOAT_BYTES, cp, stride, node)
    forward = states + next_door(halo, cp, stride, node)
    if zigzag and cp > 2:  # to the rank before as well; in a group of two that is the same rank, for the other piece
        local = local_ranks(cp, stride, node)
        forward += Traffic(halo, 0.0) if local > 1 else Traffic(0.0, halo)
    return Volume(forward, forward)


def pipeline_volume(
    tokens: float, hidden: int, pp: int, chunks: int = 1, *, stride: int = 1, element_bytes: int = 2, node: int = 8
) -> Volume:
    """A micro-batch from a stage in the middle: activations forward and gradients back, once a chunk.

    Counted for a rank at the edge of its node, where there is one.
    """
    if pp == 1:
        return Volume()
    traffic = next_door(chunks * tokens * hidden * element_bytes, pp, stride, node)
    return Volume(traffic, traffic)


def vocabulary_volumes(
    tokens: float,
    hidden: int,
    tp: int,
    *,
    element_bytes: int = 2,
    embedding_bytes: int | None = None,
    node: int = 8,
) -> dict[str, Volume]:
    """A micro-batch through an embedding and a head whose vocabulary is divided over tp.

    Args:
        tokens: T, of this rank.
        element_bytes: of the hidden rows that are gathered for the head.
        embedding_bytes: of the embedded rows; as many by default.

    Returns:
        ``"embedding"``: partial rows are reduce-scattered. ``"head"``: rows are gathered. ``"loss"``: every rank sends
        two fp32 numbers for each row of the others. The backward pass sends as much.
    """
    rows = {
        "embedding": gather(
            tokens * hidden * (element_bytes if embedding_bytes is None else embedding_bytes), tp, 1, node
        ),
        "head": gather(tokens * hidden * element_bytes, tp, 1, node),
        "loss": all_to_all(tp * tokens * 2 * FLOAT_BYTES, tp, 1, node),
    }
    return {name: Volume(traffic, traffic) for name, traffic in rows.items()}


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
