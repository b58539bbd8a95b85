"""Routing of Mixture-of-Experts layers: top-k choice, sorting tokens by expert and back, balancing losses."""

from __future__ import annotations

from typing import Any, Literal

import torch

from foldscan.ops import _checks
from foldscan.ops._backend import use_native
from foldscan.ops._library import is_recording, kernels, register
from foldscan.reference import moe as reference
from foldscan.reference.moe import Permutation

_INTS = (torch.int32, torch.int64)


def topk_route(
    logits: torch.Tensor,
    k: int,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    pre_softmax: bool = False,
    bias: torch.Tensor | None = None,
    num_groups: int | None = None,
    groups_topk: int | None = None,
    scaling: float = 1.0,
    normalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts of every token and their probabilities, differentiable in ``logits``.

    Args:
        logits: (T, E); computed in fp32.
        k: experts per token.
        score: ``"softmax"`` or ``"sigmoid"``.
        pre_softmax: softmax over all experts before the choice instead of over the chosen ones after it.
        bias: (E), added to the values that the choice is made on (logits, or with ``pre_softmax`` probabilities, or
            sigmoids), never to the probabilities; no gradient (DeepSeek-V3, arXiv:2412.19437, equation 16).
        num_groups, groups_topk: choose only within the best ``groups_topk`` of ``num_groups`` equal groups of experts.
            A group's score is the sum of its best ``max(1, k // groups_topk)`` values.
        scaling: factor on the probabilities, after normalisation.
        normalize: divide the chosen probabilities by their sum (sigmoid: by the sum + 1e-20), for every k, one
            included. A softmax over the chosen experts is normalised by itself.

    Returns:
        ``probs`` (T, k) fp32 and ``experts`` (T, k) int64, best first; of equal values the lower expert wins.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, or k and the groups do not fit the experts.
    """
    _checks.tensor("logits", logits, dims=2)
    E = logits.shape[1]
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score: got {score!r}, want 'softmax' or 'sigmoid'")
    if score == "sigmoid" and pre_softmax:
        raise ValueError("pre_softmax: got True with score='sigmoid', want False")
    if not 1 <= k <= E:
        raise ValueError(f"k: got {k}, want 1 .. {E} for logits {tuple(logits.shape)}")
    if (num_groups is None) != (groups_topk is None):
        raise ValueError(f"groups_topk: got {groups_topk} with num_groups={num_groups}, want both or neither")
    groups, best_groups = num_groups or 1, groups_topk or 1
    if groups < 1 or E % groups:
        raise ValueError(f"num_groups: got {num_groups}, want a divisor of the {E} experts")
    if not 1 <= best_groups <= groups or best_groups * (E // groups) < k:
        raise ValueError(
            f"groups_topk: got {groups_topk}, want 1 .. {groups} groups that hold at least k={k} of {E} experts"
        )
    if bias is not None:
        _checks.tensor("bias", bias)
        _checks.shape("bias", bias, E)
    if not use_native(logits):
        return reference.topk_route(
            logits,
            k,
            score=score,
            pre_softmax=pre_softmax,
            bias=bias,
            num_groups=groups,
            groups_topk=best_groups,
            scaling=scaling,
            normalize=normalize,
        )
    steer = None if bias is None else bias.detach().float().contiguous()
    mode = (score == "sigmoid", pre_softmax, groups, best_groups, float(scaling), normalize)
    return kernels.moe_route(logits.float().contiguous(), steer, k, *mode)


def expert_capacity(num_tokens: int, k: int, num_experts: int, factor: float) -> int:
    """Rows an expert may take: ``ceil(tokens * k / experts * factor)`` (arXiv:2504.14960, section 3.1.1)."""
    return -int(-(num_tokens * k * factor) // num_experts)


def permute(
    tokens: torch.Tensor,
    experts: torch.Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: Literal["probs", "position"] = "probs",
    probs: torch.Tensor | None = None,
    pad_to_capacity: bool = False,
) -> tuple[torch.Tensor, Permutation]:
    """Copy tokens into expert order: a stable counting sort of the assignments.

    Args:
        tokens: (T, H).
        experts: (T, k) int32 or int64 in [-1, num_experts); -1 is an empty slot.
        capacity: most rows that an expert keeps, None for all (see `expert_capacity`).
        drop_policy: an expert above capacity keeps its most probable assignments, of equal ones the earlier
            (``"probs"``; needs ``probs``), or its first ones (``"position"``). Kept rows stay in token order.
        probs: (T, k), permuted along.
        pad_to_capacity: every expert gets exactly ``capacity`` rows, the free ones zero.

    Returns:
        permuted (R, H) and the `Permutation`. R depends on shapes alone: T * k without a capacity,
        min(T * k, num_experts * capacity) with one, num_experts * capacity when padded. Rows beyond ``offs[-1]`` are
        zero.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, an expert out of range, a missing argument.
    """
    _checks.tensor("tokens", tokens, dims=2)
    check_experts(experts, tokens.shape[0], num_experts)
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity: got {capacity}, want at least 0")
    if drop_policy not in ("probs", "position"):
        raise ValueError(f"drop_policy: got {drop_policy!r}, want 'probs' or 'position'")
    if pad_to_capacity and capacity is None:
        raise ValueError("capacity: got None with pad_to_capacity, want a number of rows")
    if probs is not None:
        _checks.tensor("probs", probs, dims=2)
        _checks.shape("probs", probs, *experts.shape)
    elif capacity is not None and drop_policy == "probs":
        raise ValueError("probs: got None, want (T, k) probabilities to drop by (or drop_policy='position')")
    if not use_native(tokens, probs):
        return reference.permute(tokens, experts, num_experts, capacity, drop_policy, probs, pad_to_capacity)
    rows, inverse, counts, offs = kernels.moe_sort(
        experts.long().contiguous(),
        None if probs is None else probs.detach().float().contiguous(),
        num_experts,
        -1 if capacity is None else capacity,
        drop_policy == "position",
        pad_to_capacity,
    )
    k = experts.shape[1]
    permuted = _gather(tokens, rows, inverse.view(-1, k), k)
    row_probs = None
    if probs is not None:
        row_probs = _gather(probs.float().reshape(-1, 1), rows, inverse.view(-1, 1), 1).view(-1)
    return permuted, Permutation(rows, inverse.view(-1, k), counts, offs, row_probs)


def unpermute(permuted: torch.Tensor, permutation: Permutation, probs: torch.Tensor | None = None) -> torch.Tensor:
    """Back to token order: every token is the sum of its rows, in the order of its slots, in fp32, rounded once.

    Args:
        permuted: (R, H) rows in expert order.
        permutation: from `permute`.
        probs: (T, k) weights of the sum, None for ones. Dropped assignments add nothing.

    Returns:
        (T, H) in the dtype of ``permuted``, differentiable in ``permuted`` and ``probs``.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes.
    """
    _checks.tensor("permuted", permuted, dims=2)
    if not isinstance(permutation, Permutation):
        raise TypeError(f"permutation: got {type(permutation).__name__}, want the Permutation that permute returned")
    _checks.shape("permuted", permuted, permutation.rows.shape[0], "H")
    if probs is not None:
        _checks.tensor("probs", probs)
        _checks.shape("probs", probs, *permutation.inverse.shape)
    if not use_native(permuted, probs):
        return reference.unpermute(permuted, permutation, probs)
    weights = None if probs is None else probs.float().contiguous()
    if permuted.dtype == torch.float16:
        return unpermute(permuted.float(), permutation, probs).half()
    return kernels.moe_combine(permuted.contiguous(), permutation.rows, permutation.inverse, weights)


def load_balancing_loss(
    logits: torch.Tensor,
    experts: torch.Tensor,
    num_experts: int | None = None,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    num_sequences: int = 1,
    mask: torch.Tensor | None = None,
    tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """``E / (k T^2) * sum_e n_e * sum_t p[t, e]``: 1 when load and probabilities are even, E when one expert gets all.

    The Switch Transformer's loss (arXiv:2101.03961, equations 4 to 6) as Megatron normalises it; Hugging Face's Mixtral
    and Qwen losses are k times this one. Multiply by your coefficient.

    Args:
        logits: (T, E), without the selection bias.
        experts: (T, k), the choice, no gradient; -1 is not counted.
        num_experts: E, to be checked against ``logits``.
        score: p is the softmax of the logits, or their sigmoids divided by their sum.
        num_sequences: the loss of every one of that many equal runs of tokens, averaged (sequence-level balance,
            arXiv:2405.04434).
        mask: (T,) bool, the tokens that count.
        tokens_per_expert: (E,) loads to use in place of those counted here, e.g. summed over ranks or micro-batches,
            scaled to T * k in all. Not with ``num_sequences`` > 1.

    Returns:
        scalar, fp32 (fp64 for fp64 logits); 0 when no token counts.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes.
    """
    _checks.tensor("logits", logits, dims=2)
    T, E = logits.shape
    if num_experts is not None and num_experts != E:
        raise ValueError(f"num_experts: got {num_experts}, want {E} for logits {tuple(logits.shape)}")
    check_experts(experts, T, E)
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score: got {score!r}, want 'softmax' or 'sigmoid'")
    if num_sequences < 1 or T % num_sequences:
        raise ValueError(f"num_sequences: got {num_sequences}, want a divisor of the {T} tokens")
    if mask is not None:
        _checks.tensor("mask", mask, dtypes=(torch.bool,), dims=1)
        _checks.shape("mask", mask, T)
    if tokens_per_expert is not None:
        if num_sequences > 1:
            raise ValueError("tokens_per_expert: got loads of the batch with num_sequences > 1, want None")
        _checks.shape("tokens_per_expert", tokens_per_expert, E)
    return reference.load_balancing_loss(logits, experts, score, num_sequences, mask, tokens_per_expert)


def router_z_loss(logits: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over tokens of ``logsumexp(logits)^2`` (ST-MoE, arXiv:2202.08906, equation 5). Multiply by your coefficient.

    Args:
        logits: (T, E).
        mask: (T,) bool, the tokens that count.

    Returns:
        scalar, fp32 (fp64 for fp64 logits); 0 when no token counts.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes.
    """
    _checks.tensor("logits", logits, dims=2)
    if mask is not None:
        _checks.tensor("mask", mask, dtypes=(torch.bool,), dims=1)
        _checks.shape("mask", mask, logits.shape[0])
    return reference.router_z_loss(logits, mask)


def check_experts(experts: torch.Tensor, num_tokens: int, num_experts: int) -> None:
    _checks.tensor("experts", experts, dtypes=_INTS, dims=2)
    _checks.shape("experts", experts, num_tokens, "k")
    if experts.shape[1] == 0:
        raise ValueError(f"experts: got shape {tuple(experts.shape)}, want at least one slot")
    if is_recording() or experts.numel() == 0 or experts.device.type != "cpu":
        return
    low, high = (int(v) for v in torch.aminmax(experts))
    if low < -1 or high >= num_experts:
        raise ValueError(f"experts: got indices in [{low}, {high}], want [-1, {num_experts})")


def _gather(tokens: torch.Tensor, rows: torch.Tensor, inverse: torch.Tensor, k: int) -> torch.Tensor:
    if tokens.dtype == torch.float16:
        return _gather(tokens.float(), rows, inverse, k).half()
    return kernels.moe_gather(tokens.contiguous(), rows, inverse, k)


def _fake_route(
    logits: torch.Tensor, bias: torch.Tensor | None, k: int, *mode: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    T = logits.shape[0]
    return logits.new_empty(T, k, dtype=torch.float32), logits.new_empty(T, k, dtype=torch.int64)


def _setup_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, _, _, sigmoid, pre_softmax, _, _, scaling, normalize = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])
    ctx.mode = (sigmoid, pre_softmax, scaling, normalize)


def _backward_route(ctx: Any, dprobs: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    logits, experts = ctx.saved_tensors
    dlogits = kernels.moe_route_backward(dprobs.contiguous(), logits, experts, *ctx.mode)
    return (dlogits, *[None] * 8)


def _fake_sort(
    experts: torch.Tensor, probs: torch.Tensor | None, num_experts: int, capacity: int, by_position: bool, pad: bool
) -> tuple[torch.Tensor, ...]:
    n = experts.numel()
    size = num_experts * capacity if pad else n if capacity < 0 else min(n, num_experts * capacity)
    return (
        experts.new_empty(size),
        experts.new_empty(n),
        experts.new_empty(num_experts),
        experts.new_empty(num_experts, dtype=torch.int32),
    )


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward_gather(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, inverse = ctx.saved_tensors
    return kernels.moe_combine(dout.contiguous(), rows, inverse, None), None, None, None


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_combine(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    permuted, rows, inverse, probs = ctx.saved_tensors
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    grads = kernels.moe_combine_backward(dout.contiguous(), permuted, rows, inverse, probs, *needs)
    return grads[0] if needs[0] else None, None, None, grads[1] if needs[1] else None


def _fake_combine_backward(
    dout: torch.Tensor,
    permuted: torch.Tensor,
    rows: torch.Tensor,
    inverse: torch.Tensor,
    probs: torch.Tensor | None,
    need_permuted: bool,
    need_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    R, H = permuted.shape
    T, k = inverse.shape
    return (
        permuted.new_empty(R if need_permuted else 0, H),
        permuted.new_empty(T if need_probs else 0, k, dtype=torch.float32),
    )


register("moe_route", _fake_route, _setup_route, _backward_route)
register("moe_route_backward", lambda dprobs, logits, *_: torch.empty_like(logits))
register("moe_sort", _fake_sort)
register(
    "moe_gather",
    lambda tokens, rows, inverse, k: tokens.new_empty(rows.shape[0], tokens.shape[1]),
    _setup_gather,
    _backward_gather,
)
register(
    "moe_combine",
    lambda permuted, rows, inverse, probs: permuted.new_empty(inverse.shape[0], permuted.shape[1]),
    _setup_combine,
    _backward_combine,
)
register("moe_combine_backward", _fake_combine_backward)
