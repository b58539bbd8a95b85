"""Memory of the fullest rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from foldscan.parallel.planner.mapping import Mapping, Workload
from foldscan.parallel.planner.shapes import SCAN_CHUNK, ModelShape
from foldscan.parallel.planner.step_volumes import stage_parameters, virtual_stages

PARAMETER_BYTES = 2  # bf16
GRADIENT_BYTES = 4  # fp32
OPTIMIZER_BYTES = 12  # fp32 parameter and both Adam moments
LOGIT_BYTES = 6  # bf16 and fp32 beside each other


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        dense, experts: parameters, gradients and optimizer states.
        activations: what the backward pass needs of every micro-batch in flight; on the last stage with the logits.
        buffers: what lives during one layer only: expert outputs in transit; under FSDP gathered parameters.
    """

    dense: float
    experts: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        return self.dense + self.experts + self.activations + self.buffers

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


def memory(model: ModelShape, mapping: Mapping, work: Workload) -> Memory:
    """Memory of a rank on the fullest pipeline stage, no recomputation.

    Parameters and optimizer (distributed Adam): P (2 + 4 + 12 / n), n = DP CP for dense parameters and EDP for experts;
    18 P / n under FSDP.
    """
    dense, expert = stage_parameters(model, mapping)
    ranks = mapping.dp * mapping.cp
    buffers = 4 * expert_rows(model, mapping, work) * model.hidden  # fc2's output and what combine receives
    if mapping.sharded:
        blocks = model.pattern[: model.blocks_per_layer]
        layer = model.dense_parameters(blocks) / mapping.tp
        layer += model.expert_parameters(blocks) / (mapping.ep * mapping.etp)
        # The layer at work and the one being gathered, and a layer's gradients before they are scattered.
        buffers += layer * (2 * PARAMETER_BYTES + GRADIENT_BYTES)
        whole = PARAMETER_BYTES + GRADIENT_BYTES + OPTIMIZER_BYTES
        states = (dense * whole / ranks, expert * whole / mapping.edp)
    else:
        held = PARAMETER_BYTES + GRADIENT_BYTES
        states = (dense * (held + OPTIMIZER_BYTES / ranks), expert * (held + OPTIMIZER_BYTES / mapping.edp))
    return Memory(*states, activations(model, mapping, work), buffers)


def expert_rows(model: ModelShape, mapping: Mapping, work: Workload) -> float:
    """Rows that the busiest rank's experts work on in a micro-batch, dropless."""
    tokens = work.mbs * work.seq / (mapping.tp * mapping.cp)
    return tokens * model.top_k * mapping.etp * work.skew if "E" in model.pattern else 0.0


def block_activations(model: ModelShape, letter: str, mapping: Mapping, work: Workload) -> float:
    """Bytes that the backward pass of a block and micro-batch needs, bf16.

    Every block keeps its input and the normed input (4 T H, sequence parallel). Attention: q, k, v and the output.
    Experts: their input rows, both up-projections and what goes into the down-projection; its output is not needed, as
    probabilities are multiplied before it; router scores in fp32. Mamba-2: in_proj's output, the convolved x, B, C, the
    output before and after the gated norm, and a state a chunk in fp32.
    """
    part = work.mbs * work.seq / mapping.cp
    tp, hidden = mapping.tp, model.hidden
    kept = 4 * part / tp * hidden
    if letter == "*":
        kept += 2 * part * (2 * model.q_width + 2 * model.kv_width) / tp
    elif letter == "M":
        channels = model.mamba_width + 2 * model.mamba_groups * model.state
        kept += 2 * part * (model.mamba_projected + channels + 2 * model.mamba_width) / tp
        kept += 4 * part * model.mamba_width * model.state / (SCAN_CHUNK * tp)
    elif letter == "-":
        kept += 2 * part * (2 + model.gated_mlp) * model.mlp_ffn / tp
    else:
        matrices = 2 + model.gated_experts
        width = hidden + matrices * model.ffn / mapping.etp
        kept += 2 * expert_rows(model, mapping, work) * width + 4 * part / tp * model.experts
        kept += 2 * part * matrices * model.shared_ffn / tp
    return kept


def activations(model: ModelShape, mapping: Mapping, work: Workload) -> float:
    """Bytes of the micro-batches in flight on the fullest stage, with an interleaved 1F1B schedule.

    Stage r of PP holds 2 (PP - 1 - r) + (VPP - 1) PP + 1 chunks at most, and PP - r where VPP = 1.
    """
    pp, chunks = mapping.pp, virtual_stages(model, mapping, work)
    microbatches = work.gbs // (mapping.dp * work.mbs)
    logits = LOGIT_BYTES * work.mbs * work.seq * model.vocab / (mapping.cp * mapping.tp)
    of_block = {letter: block_activations(model, letter, mapping, work) for letter in set(model.pattern)}
    fullest = 0.0
    for rank, stage in enumerate(model.stages(pp)):
        in_flight = 2 * (pp - 1 - rank) + (chunks - 1) * pp + 1 if chunks > 1 else pp - rank
        whole = sum(stage.count(letter) * size for letter, size in of_block.items())
        held = whole * min(in_flight, microbatches * chunks) / chunks
        fullest = max(fullest, held + (logits if rank == pp - 1 else 0))
    return fullest
