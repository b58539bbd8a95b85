"""Bytes that a rank sends in a step, or for one block, under a mapping of a model."""

from __future__ import annotations

from collections import Counter
from typing import Any

from foldscan.parallel.planner.mapping import Mapping, Workload
from foldscan.parallel.planner.shapes import ModelShape
from foldscan.parallel.planner.volumes import (
    Volume,
    context_gather_volume,
    context_ring_volume,
    context_scan_volume,
    dispatch_volumes,
    optimizer_volume,
    pipeline_volume,
    sharded_volume,
    tensor_volume,
    vocabulary_volumes,
)


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
        ``ep``, ``etp``, ``probs``, ``metadata``, ``tp``, ``vocabulary`` (spread evenly over the stages), ``cp``,
        ``pp``, ``dp`` and ``edp`` (dense and expert gradients and parameters; under FSDP its gathers). Zero where a
        mapping has none.
    """
    stage = max(model.stages(mapping.pp), key=len)
    microbatches = work.gbs // (mapping.dp * work.mbs)
    names = ("ep", "etp", "probs", "metadata", "tp", "vocabulary", "cp", "pp", "dp", "edp")
    found = {name: Volume() for name in names}
    sizes = {"element_bytes": element_bytes, "node": node}
    for letter, times in Counter(stage).items():
        for name, volume in block_volumes(model, letter, mapping, work, dispatcher=dispatcher, **sizes).items():
            found[name] += volume * (times * microbatches)
    tokens = work.mbs * work.seq / (mapping.tp * mapping.cp)
    for volume in vocabulary_volumes(tokens, model.hidden, mapping.tp, **sizes).values():
        found["vocabulary"] += volume * (microbatches / mapping.pp)
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
    sizes: dict[str, Any] = {"element_bytes": element_bytes, "node": node}
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
            heads, model.mamba_head_dim, model.state, channels, model.conv, cp, stride=tp, **sizes
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
