"""How long a training step takes: rooflines for what computes, bandwidth and latency for what communicates.

BF16, a backward pass of twice the forward GEMMs, no recomputation. The model is that of docs/planner.md; its constants
are in constants.yaml, which was committed before the calibration table and is not tuned to it since.
"""

from __future__ import annotations

from dataclasses import dataclass

from foldscan.parallel.planner.cluster import Cluster, Constants
from foldscan.parallel.planner.mapping import Mapping, Workload
from foldscan.parallel.planner.shapes import SCAN_CHUNK, ModelShape
from foldscan.parallel.planner.step_volumes import stage_parameters, virtual_stages
from foldscan.parallel.planner.volumes import (
    Traffic,
    all_to_all,
    context_scan_volume,
    deduplicated,
    expected_ranks,
    gather,
)

# Terms of a step, in the order in which they are shown.
TERMS = {
    "attention": "attention: projections and scores",
    "mamba": "Mamba-2: projections and scan",
    "experts": "routed experts",
    "dense FFN": "shared experts and MLPs",
    "memory-bound": "norms, residuals, permutation, activation: bytes over HBM",
    "fixed": "fixed time a layer",
    "head": "logits",
    "EP": "expert-parallel exchange",
    "ETP": "expert-tensor-parallel gather and reduce-scatter",
    "TP": "tensor-parallel gather and reduce-scatter, exposed",
    "CP": "context-parallel exchange, exposed",
    "FSDP": "parameter gathers and gradient reduce-scatters, exposed",
    "bubble": "pipeline bubble",
    "DP": "gradients and parameters of the distributed optimizer, exposed",
}
COMPUTE = ("attention", "mamba", "experts", "dense FFN", "memory-bound", "fixed")
# The scan's backward pass moves 4 to 5 times the bytes of the forward pass; what is memory-bound is counted twice.
SCAN_BYTES = (1 + 4.5) / 2
# Ring attention hides behind the scores: 2.1 of the 3 passes over them are long enough to count.
RING_HIDDEN = 2.1


@dataclass(frozen=True)
class Machine:
    """A cluster and the constants of its kernels: seconds for a primitive."""

    cluster: Cluster
    constants: Constants

    def gemm(self, rows: float, columns: float, depth: float, times: float = 1) -> float:
        """``times`` products of (rows, depth) with (depth, columns). Small ones are less efficient than large ones."""
        c = self.constants
        if not rows * columns * depth * times:
            return 0.0
        efficiency = c.gemm_efficiency * rows / (rows + c.rows_half)
        efficiency *= columns / (columns + c.columns_half) * depth / (depth + c.columns_half)
        return 2 * rows * columns * depth * times / (self.cluster.peak * efficiency)

    def collective(self, traffic: Traffic) -> float:
        """Bytes inside the node and across nodes move at the same time, each at its bandwidth and with its latency."""
        if not traffic.total:
            return 0.0
        c, share = self.cluster, self.constants
        intra = traffic.intra / (c.nvlink * share.nvlink_share) + c.nvlink_latency
        if not traffic.inter:
            return intra
        return max(intra, traffic.inter / (c.infiniband * share.infiniband_share) + c.infiniband_latency)

    def all_to_all(self, payload: float, ranks: int, stride: int) -> float:
        return self.collective(all_to_all(payload, ranks, stride, self.cluster.gpus_per_node))

    def gather(self, shard: float, ranks: int, stride: int) -> float:
        return self.collective(gather(shard, ranks, stride, self.cluster.gpus_per_node))


@dataclass(frozen=True)
class StepModel:
    """Step time of one mapping.

    Args:
        model, mapping, work: what runs, and how.
        machine: on what.
        dispatcher: of the expert layers.
    """

    model: ModelShape
    mapping: Mapping
    work: Workload
    machine: Machine
    dispatcher: str = "alltoall"

    @property
    def part(self) -> float:
        """Tokens of a micro-batch in a tensor-parallel group: rows of its GEMMs."""
        return self.work.mbs * self.work.seq / self.mapping.cp

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on a rank, outside of the tensor-parallel GEMMs."""
        return self.part / self.mapping.tp

    def attention(self) -> dict[str, float]:
        """Of an attention block, forward and backward, a micro-batch."""
        m, tp, part, machine = self.model, self.mapping.tp, self.part, self.machine
        peak = machine.cluster.peak * machine.constants.attention_efficiency
        scores = 4 * part * m.mean_keys(self.work.seq) * m.q_width / tp / peak
        projections = machine.gemm(part, (m.q_width + 2 * m.kv_width) / tp, m.hidden)
        projections += machine.gemm(part, m.hidden, m.q_width / tp)
        exchange = machine.gather(4 * part * m.kv_width / tp, self.mapping.cp, tp)
        if self.work.context == "ring":
            exposed = max(0.0, 3 * exchange - RING_HIDDEN * scores)
        else:
            exposed = 2 * exchange  # nothing can start before it is there
        return {
            "attention": 3 * (projections + scores),
            "TP": self.tensor_parallel(),
            "CP": exposed,
        }

    def mamba(self) -> dict[str, float]:
        """Of a Mamba-2 block: GEMMs at their efficiency, the chunked scan by the bytes that it moves.

        Bytes a token of the forward scan, unfused, bf16 in and out and fp32 states:
        6 H P + 8 G N + 8 G Q + 12 H P N / Q + 26 H, and 4 (H P + 2 G N) for the convolution.
        """
        m, tp, part, machine = self.model, self.mapping.tp, self.part, self.machine
        groups_state = m.mamba_groups * m.state
        scanned: float = 6 * m.mamba_width + 8 * groups_state + 8 * m.mamba_groups * SCAN_CHUNK
        scanned += 12 * m.mamba_width * m.state / SCAN_CHUNK + 26 * m.mamba_heads
        scanned += 4 * (m.mamba_width + 2 * groups_state)
        projections = machine.gemm(part, m.mamba_projected / tp, m.hidden)
        projections += machine.gemm(part, m.hidden, m.mamba_width / tp)
        scan = SCAN_BYTES * scanned * part / tp / machine.cluster.hbm
        states = context_scan_volume(
            m.mamba_heads / tp,
            m.mamba_head_dim,
            m.state,
            (m.mamba_width + 2 * groups_state) / tp,
            m.conv,
            self.mapping.cp,
            stride=tp,
            node=machine.cluster.gpus_per_node,
        )
        return {
            "mamba": 3 * projections + 2 * scan,
            "TP": self.tensor_parallel(),
            "CP": machine.collective(states.forward) + machine.collective(states.backward),
        }

    def mlp(self) -> dict[str, float]:
        """Of an MLP block."""
        return {
            "dense FFN": 3 * self.feed_forward(self.model.mlp_ffn, self.model.gated_mlp),
            "TP": self.tensor_parallel(),
        }

    def experts(self) -> dict[str, float]:
        """Of an expert layer: routed and shared experts, permutations, exchanges."""
        m, mapping, machine = self.model, self.mapping, self.machine
        local = m.experts // mapping.ep
        rows = self.tokens * m.top_k * mapping.etp / local * self.work.skew  # an expert's, on the busiest rank
        width, up = m.ffn / mapping.etp, 1 + m.gated_experts
        routed = machine.gemm(rows, up * width, m.hidden, local) + machine.gemm(rows, m.hidden, width, local)
        sent = 2 * self.tokens * m.top_k * m.hidden
        moved = 2 * (2 * self.tokens * m.hidden + sent) + 4 * up * rows * local * width
        if local > 1:
            moved += 4 * sent * mapping.etp * self.work.skew  # sort by expert, and back
        ep, etp = self.exchanges(sent)
        times = {
            "experts": 3 * routed,
            "memory-bound": 2 * moved / machine.cluster.hbm,
            "EP": ep,
            "ETP": etp,
        }
        if m.shared_ffn:
            times["dense FFN"] = 3 * self.feed_forward(m.shared_ffn, m.gated_experts)
            times["TP"] = self.tensor_parallel()
        return times

    def exchanges(self, sent: float) -> tuple[float, float]:
        """Time of the EP and the ETP exchanges: dispatch and combine, forward and backward."""
        m, mapping, machine, skew = self.model, self.mapping, self.machine, self.work.skew
        token_bytes = 2 * self.tokens * m.hidden
        gathered, arriving = sent * skew, sent * skew
        if self.dispatcher == "alltoall":
            ep = machine.all_to_all(sent * skew, mapping.ep, mapping.ep_stride)
        elif self.dispatcher == "allgather":
            ep = machine.gather(token_bytes, mapping.ep, mapping.ep_stride)
            gathered = mapping.ep * token_bytes
        else:
            node, by_node = machine.cluster.gpus_per_node, self.dispatcher == "dedup-node"
            traffic = deduplicated(
                token_bytes * skew, m.top_k, m.experts, mapping.ep, mapping.ep_stride, node, by_node=by_node
            )
            ep = machine.collective(traffic)
            gathered = expected_ranks(m.experts, m.top_k, mapping.ep) * token_bytes * skew
        etp = machine.gather(gathered, mapping.etp, 1) + machine.gather(arriving, mapping.etp, 1)
        return 4 * ep, 2 * etp

    def feed_forward(self, width: int, gated: bool) -> float:
        """The two GEMMs of an MLP divided by tp, forward."""
        tp, hidden = self.mapping.tp, self.model.hidden
        up = self.machine.gemm(self.part, (1 + gated) * width / tp, hidden)
        return up + self.machine.gemm(self.part, hidden, width / tp)

    def tensor_parallel(self) -> float:
        passes = 5 if self.work.tp_regather else 4
        once = self.machine.gather(2 * self.tokens * self.model.hidden, self.mapping.tp, 1)
        return passes * once * (1 - self.machine.constants.tp_overlap)

    def layer(self, blocks: str) -> dict[str, float]:
        """Seconds of the blocks of one layer, a micro-batch, by term."""
        kinds = {"*": self.attention, "M": self.mamba, "-": self.mlp, "E": self.experts}
        # A layer of two blocks passes 24 T H bytes through norms and residuals, and takes the fixed time.
        share = len(blocks) / 2
        times = dict.fromkeys(TERMS, 0.0)
        times["memory-bound"] = share * 2 * 24 * self.tokens * self.model.hidden / self.machine.cluster.hbm
        times["fixed"] = share * self.machine.constants.fixed
        for letter in blocks:
            for term, seconds in kinds[letter]().items():
                times[term] += seconds
        if self.mapping.sharded:
            dense, expert = self.model.dense_parameters(blocks), self.model.expert_parameters(blocks)
            times["FSDP"] = self.fsdp(dense, expert, sum(times[term] for term in COMPUTE))
        return times

    def fsdp(self, dense: float, expert: float, compute: float) -> float:
        """Two gathers and a reduce-scatter of a layer's parameters, bf16, as far as compute does not hide them."""
        mapping = self.mapping
        ranks, width = mapping.dp * mapping.cp, mapping.ep * mapping.etp
        once = self.machine.gather(2 * dense / mapping.tp / ranks, ranks, mapping.tp)
        once += self.machine.gather(2 * expert / width / mapping.edp, mapping.edp, width)
        return max(0.0, 3 * once - self.machine.constants.fsdp_overlap * compute)

    def optimizer(self) -> float:
        """Gradients (fp32) and parameters (bf16) once a step, exposed."""
        mapping = self.mapping
        dense, expert = stage_parameters(self.model, mapping)
        ranks, width = mapping.dp * mapping.cp, mapping.ep * mapping.etp
        total = 0.0
        for size in (4, 2):
            total += self.machine.gather(size * dense / ranks, ranks, mapping.tp)
            total += self.machine.gather(size * expert / mapping.edp, mapping.edp, width)
        return (1 - self.machine.constants.dp_overlap) * total

    def step(self) -> dict[str, float]:
        """Seconds of a whole step by term; their sum is the step's time.

        The slowest pipeline stage sets the pace. Interleaved 1F1B: the bubble is (PP - 1) / (VPP n) of n micro-batches.
        """
        model, mapping, work = self.model, self.mapping, self.work
        width = model.blocks_per_layer
        layers: dict[str, dict[str, float]] = {}
        stages = []
        for stage in set(model.stages(mapping.pp)):
            times = dict.fromkeys(TERMS, 0.0)
            for start in range(0, len(stage), width):
                blocks = stage[start : start + width]
                if blocks not in layers:
                    layers[blocks] = self.layer(blocks)
                for term, seconds in layers[blocks].items():
                    times[term] += seconds
            stages.append(times)
        times = max(stages, key=lambda found: (sum(found.values()), *found.values()))
        times["head"] = 3 * self.machine.gemm(self.part, model.vocab / mapping.tp, model.hidden) / mapping.pp
        microbatches = work.gbs // (mapping.dp * work.mbs)
        times = {term: seconds * microbatches for term, seconds in times.items()}
        chunks = virtual_stages(model, mapping, work)
        times["bubble"] = sum(times.values()) * (mapping.pp - 1) / (chunks * microbatches)
        if not mapping.sharded:
            times["DP"] = self.optimizer()
        return times


def mfu(model: ModelShape, mapping: Mapping, work: Workload, seconds: float, cluster: Cluster) -> float:
    """Model FLOP/s over the peak: 3 x forward FLOPs of the batch, whatever was recomputed or padded."""
    flop = 3 * model.flop_per_token(work.seq) * work.gbs * work.seq
    return flop / (seconds * mapping.gpus * cluster.peak)
