"""What every operator was meant to reach: ratios to peers and fractions of the roofline, set before it was measured."""

from __future__ import annotations

from typing import Any

L3 = 32 << 20  # bytes of the last-level cache of the machine of the tables: beyond it memory is the floor

Shape = dict[str, int]


def _state_bytes(shape: Shape) -> int:
    return 4 * shape["B"] * shape["H"] * shape["P"] * shape["N"]


def _cache_bytes(shape: Shape, dtype: str) -> int:
    return 2 * shape["batch"] * shape["keys"] * shape["Hkv"] * shape["D"] * (4 if dtype == "float32" else 2)


def speedup(op: str, shape: Shape, dtype: str, mode: str, peer: str) -> float | None:
    """How many times slower than ours the peer should be; None where nothing was asked."""
    single, forward = dtype == "float32", mode == "fwd"
    if op == "scan":
        if peer == "transformers":
            return 8.0 if forward else 6.0
        return (2.0 if forward else 1.7) if single else (3.0 if forward else 2.5)
    if op == "scan_pruned":
        return 0.9
    if op == "causal_conv1d" and forward:
        return 15.0 if single else 6.0
    if op == "selective_state_update":
        return 4.0
    if op == "rmsnorm_gated":
        if peer == "torch eager":
            return 15.0 if forward else 6.0
        return 4.0 if forward else 2.5
    if op == "attention_causal":
        if single:
            return 1.2 if shape["Hq"] == shape["Hkv"] else 2.0
        return 1.7 if forward else 1.5
    if op == "attention_varlen":
        return 2.0
    if op == "attention_decode" and peer == "torch SDPA":
        return 6.0 if single else 20.0
    if op.startswith("moe_mlp"):
        return 2.0 if shape["T"] <= 16 else 1.4
    if op in ("linear_cross_entropy", "linear_logprob", "linear_logprob_entropy") and not forward:
        return 4.0 if "chunked" in peer else 1.3
    if op == "linear_kl_div":
        return 1.5
    if op == "linear_2_4" and peer == "torch, dense":
        return 1.4
    if op in ("linear_decode", "linear_prefill"):
        if shape["M"] >= 512:
            return 0.95
        return 1.5 if single and shape["M"] in (4, 16) else 1.0
    return None


def roofline(op: str, shape: Shape, dtype: str, mode: str) -> float | None:
    """The fraction of the roofline that ours should reach; None where nothing was asked."""
    if op == "scan":
        return 0.55 if dtype == "float32" else 0.45
    if op == "causal_conv1d" or (op == "rmsnorm_gated" and mode == "fwd"):
        return 0.55
    if (op == "selective_state_update" and _state_bytes(shape) > L3) or (
        op == "attention_decode" and _cache_bytes(shape, dtype) > L3
    ):
        return 0.6
    return None


def missed(key: tuple[Any, ...], ours: float, ratios: dict[str, float]) -> list[tuple[str, float, float, float]]:
    """The goals of a case that were not reached.

    Args:
        key: op, shape items, dtype, mode.
        ours: fraction of the roofline that was reached.
        ratios: how many times slower each peer was.

    Returns:
        (against, goal, reached, the fraction of the roofline that the goal needs) of each.
    """
    op, items, dtype, mode = key
    shape = dict(items)
    found = []
    for peer, ratio in ratios.items():
        goal = speedup(op, shape, dtype, mode, peer)
        if goal is not None and ratio < goal:
            found.append((peer, goal, ratio, ours * goal / ratio))
    goal = roofline(op, shape, dtype, mode)
    if goal is not None and ours < goal:
        found.append(("roofline", goal, ours, goal))
    return found
