"""Pruning: scores of channels from activations, selection within groups, and 2:4 sparse linear layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from foldscan.ops import _checks
from foldscan.ops._backend import current_backend, use_native
from foldscan.ops._library import compute_dtype, is_recording, kernels, register

STATISTICS = 8  # rows of a statistics state
PANEL = 64  # outputs that a compressed weight stores together
REDUCTIONS = (("mean_abs", "l2"), ("mean_abs", "mean"), ("l2", "l2"), ("l2", "mean"))


class Compressed24(NamedTuple):
    """A 2:4 sparse weight (out, in).

    Outputs come in panels of 64 (zeros beyond ``out_features``), each panel stored along its outputs.

    values: (ceil(out / 64), in / 2, 64): the kept elements; rows 2 g and 2 g + 1 belong to inputs 4 g to 4 g + 3.
    codes: (ceil(out / 64), ceil(in / 8), 64) uint8: the low nibble for group 2 b, the high one for 2 b + 1: i0 + 4 i1
    with the places i0 < i1 of the two elements in their group.
    """

    values: torch.Tensor
    codes: torch.Tensor
    out_features: int

    def to_dense(self) -> torch.Tensor:
        """The weight (out, in) with its zeros."""
        from foldscan.reference.pruning import decompress_2_4

        return decompress_2_4(self.values, self.codes, self.out_features)


def channel_scores(x: torch.Tensor, *, reduce: tuple[str, str] = ("mean_abs", "l2")) -> torch.Tensor:
    """Importance of channels from activations, in one pass and without gradient.

    Args:
        x: (batch, seqlen, *channels), fp32, bf16, fp16 or fp64.
        reduce: first over the tokens of a sequence, then over sequences: ("mean_abs", "l2") takes the mean of |x| and
            then the root of the sum of squares (Minitron, arXiv:2407.14679, section 2.2; group-aware pruning,
            arXiv:2504.11409, equation 19); also ("mean_abs", "mean"), ("l2", "l2") and ("l2", "mean").

    Returns:
        (*channels) fp64. Sums are taken in fp64, token by token: the threads do not change a bit. For data that comes
        in pieces there is ``foldscan.pruning.ScoreAccumulator``.

    Raises:
        TypeError, ValueError: wrong arguments.
    """
    _checks.tensor("x", x)
    if x.dim() < 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (batch, seqlen, *channels)")
    state = score_state(math.prod(x.shape[2:]), x.device)
    cu_seqlens = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]
    score_update(x.flatten(0, 1), cu_seqlens, state, first=True)
    sequences = x.shape[0] if x.shape[1] > 0 else 0
    return finish_scores(state, sequences, reduce).view(x.shape[2:])


def score_state(channels: int, device: torch.device | str | None = None) -> torch.Tensor:
    """An empty statistics state: (8, channels) fp64, the rows named in csrc/pruning/pruning.h."""
    return torch.zeros(STATISTICS, channels, dtype=torch.float64, device=device)


def score_update(x: torch.Tensor, cu_seqlens: torch.Tensor, state: torch.Tensor, *, first: bool) -> None:
    """Add packed sequences x (tokens, *channels) to ``state``, in place. ``first``: no token was added before."""
    rows = x.detach().reshape(x.shape[0], state.shape[1])
    if not use_native(rows):
        from foldscan.reference import pruning as reference

        return reference.score_update(rows, cu_seqlens, first, state)
    if rows.dtype == torch.float16:
        rows = rows.float()
    kernels.score_update(rows if rows.stride(1) == 1 else rows.contiguous(), cu_seqlens, first, state)


def finish_scores(state: torch.Tensor, sequences: int, reduce: tuple[str, str]) -> torch.Tensor:
    """The scores (channels) fp64 that a state holds."""
    if tuple(reduce) not in REDUCTIONS:
        raise ValueError(f"reduce: got {reduce}, want one of {', '.join(map(str, REDUCTIONS))}")
    within, across = reduce
    if across == "l2":
        return (state[6] if within == "mean_abs" else state[1]).sqrt()
    return (state[5] if within == "mean_abs" else state[7]) / max(sequences, 1)


def group_topk_mask(scores: torch.Tensor, groups: int | torch.Tensor, keep: int) -> torch.Tensor:
    """Keep the best ``keep`` of every group.

    Args:
        scores: (n), higher is better; no NaN.
        groups: the number of equal, consecutive groups, or (n) int32 or int64 group numbers from 0 in any order.
        keep: members to keep of each group (a group may not be smaller).

    Returns:
        (n) bool; among equal scores the lower index is kept.

    Raises:
        TypeError, ValueError: wrong arguments, NaN, or a group smaller than ``keep``.
    """
    _checks.tensor("scores", scores, dims=1)
    n = scores.shape[0]
    if isinstance(groups, int):
        if groups < 1 or n % groups:
            raise ValueError(f"groups: got {groups}, want a divisor of the {n} scores")
        count, numbers = groups, torch.arange(groups, device=scores.device).repeat_interleave(n // groups)
        smallest = n // groups
    else:
        _checks.tensor("groups", groups, dtypes=(torch.int32, torch.int64))
        _checks.shape("groups", groups, n)
        if is_recording():
            raise ValueError("groups: got a tensor under torch.compile, want the number of equal groups")
        if n and int(groups.min()) < 0:
            raise ValueError(f"groups: got {int(groups.min())}, want numbers from 0")
        numbers = groups.long().contiguous()
        sizes = torch.bincount(numbers) if n else numbers
        count, smallest = sizes.shape[0], int(sizes.min()) if n else 0
    if not 0 <= keep <= smallest:
        raise ValueError(f"keep: got {keep}, want 0 to {smallest}, the size of the smallest group")
    scores = scores.detach()
    if not is_recording() and scores.isnan().any():
        raise ValueError("scores: got NaN, want numbers")
    if not use_native() or scores.device.type not in ("cpu", "meta"):
        from foldscan.reference import pruning as reference

        return reference.group_topk_mask(scores, numbers, count, keep)
    return kernels.group_topk_mask(scores.double().contiguous(), numbers, count, keep)


def sparsity_mask_2_4(weight: torch.Tensor, scores: torch.Tensor | None = None) -> torch.Tensor:
    """Which two of every four consecutive inputs to keep.

    Args:
        weight: (out, in), in a multiple of 4. The two largest magnitudes are kept, the earlier first among equals.
        scores: (out, in) or None: what to compare instead of the magnitudes (higher is better).

    Returns:
        (out, in) bool, exactly two of four true.
    """
    _checks.tensor("weight", weight, dims=2)
    _check_multiple_of_4(weight)
    if scores is not None:
        _checks.tensor("scores", scores)
        _checks.shape("scores", scores, *weight.shape)
    ranked = (weight if scores is None else scores).detach()
    if not use_native(ranked):
        from foldscan.reference import pruning as reference

        return reference.sparsity_mask_2_4(ranked.abs() if scores is None else ranked)
    if ranked.dtype == torch.float16:
        ranked = ranked.float()
    return kernels.sparsity_mask_2_4(ranked.contiguous(), scores is None)


def compress_2_4(weight: torch.Tensor, mask: torch.Tensor) -> Compressed24:
    """Store only the kept half of a 2:4 sparse weight, and where it lies.

    Args:
        weight: (out, in), in a multiple of 4. fp16 is stored as fp32.
        mask: (out, in) bool with exactly two of every four consecutive entries of a row true.

    Returns:
        The compressed weight, without gradient: 9 / 16 of the bytes in bf16, 17 / 32 in fp32.
    """
    _checks.tensor("weight", weight, dims=2)
    _check_multiple_of_4(weight)
    _checks.tensor("mask", mask, dtypes=(torch.bool,))
    _checks.shape("mask", mask, *weight.shape)
    if not is_recording() and not (mask.reshape(-1, 4).sum(1) == 2).all():
        raise ValueError("mask: got a group of four without exactly two true entries, want a 2:4 mask")
    weight = weight.detach()
    if weight.dtype == torch.float16:
        weight = weight.float()
    if use_native(weight):
        values, codes = kernels.compress_2_4(weight.contiguous(), mask.contiguous())
    else:
        from foldscan.reference import pruning as reference

        values, codes = reference.compress_2_4(weight, mask)
    return Compressed24(values, codes, weight.shape[0])


def linear_2_4(x: torch.Tensor, compressed: Compressed24, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + bias`` with a compressed 2:4 weight: the bits of ``ops.linear`` with the dense masked weight.

    Args:
        x: (..., in), fp32, bf16, fp16 or fp64; cast to the autocast dtype inside ``torch.autocast``.
        compressed: from ``compress_2_4``, of x's dtype or fp32. It has no gradient.
        bias: (out) or None.

    Returns:
        (..., out) in the dtype of the (cast) x; differentiable in x and bias.

    Raises:
        NotImplementedError: the values require a gradient. TypeError, ValueError: wrong arguments.
    """
    if (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is torch.Tensor
        and type(compressed) is Compressed24
        and x.dim() == 2
        and x.is_contiguous()
        and x.is_cpu
        and x.dtype is compressed.values.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and bias is None
        and not torch.is_autocast_enabled("cpu")
        and current_backend() == "native"
        and compressed.values.dim() == 3
        and not compressed.values.requires_grad
        and x.shape[1] == 2 * compressed.values.shape[1]
    ):  # a decode step: the binding checks what keeps memory safe
        return kernels.linear_2_4(x, *compressed, None)
    _checks.tensor("x", x)
    if not isinstance(compressed, Compressed24):
        raise TypeError(f"compressed: got {type(compressed).__name__}, want the result of compress_2_4")
    values, codes, out_features = compressed
    _checks.tensor("compressed.values", values)
    _checks.shape("compressed.values", values, -(-out_features // PANEL), "in / 2", PANEL)
    features = 2 * values.shape[1]
    _checks.tensor("compressed.codes", codes, dtypes=(torch.uint8,))
    _checks.shape("compressed.codes", codes, values.shape[0], -(-features // 8), PANEL)
    if values.requires_grad:
        raise NotImplementedError("compressed: its values require a gradient, which a 2:4 weight does not have")
    if x.dim() < 1 or x.shape[-1] != features:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (..., {features})")
    if bias is not None:
        _checks.tensor("bias", bias)
        _checks.shape("bias", bias, out_features)
    dtype = compute_dtype(x)
    x = x.to(dtype)
    if not use_native(x, values, bias):
        return F.linear(x, compressed.to_dense().to(dtype), None if bias is None else bias.to(dtype))
    if dtype == torch.float16:
        return linear_2_4(x.float(), Compressed24(values.float(), codes, out_features), bias).to(dtype)
    if values.dtype not in (dtype, torch.float32):
        raise TypeError(f"compressed: got dtype {values.dtype}, want {dtype} as x has (or float32)")
    rows = x.reshape(math.prod(x.shape[:-1]), features)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    bias = None if bias is None else bias.float()
    out = kernels.linear_2_4(rows, values.contiguous(), codes.contiguous(), out_features, bias)
    return out.view(*x.shape[:-1], out_features)


def _check_multiple_of_4(weight: torch.Tensor) -> None:
    if weight.shape[1] % 4:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, want a multiple of 4 inputs")


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, values, codes, ctx.out_features, _ = inputs
    ctx.save_for_backward(values, codes)


def _backward_linear(ctx: Any, dout: torch.Tensor) -> Sequence[torch.Tensor | None]:
    need_dx, _, _, _, need_dbias = ctx.needs_input_grad
    flags = (ctx.out_features, need_dx, need_dbias)
    dx, dbias = kernels.linear_2_4_backward(dout.contiguous(), *ctx.saved_tensors, *flags)
    return dx if need_dx else None, None, None, None, dbias if need_dbias else None


def _fake_linear_backward(
    dout: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, out_features: int, need_dx: bool, need_dbias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = dout.new_empty(dout.shape[0] if need_dx else 0, 2 * values.shape[1])
    return dx, dout.new_empty(out_features if need_dbias else 0, dtype=torch.float32)


register("score_update", lambda x, cu_seqlens, first, state: None)
register("group_topk_mask", lambda scores, groups, count, keep: scores.new_empty(scores.shape, dtype=torch.bool))
register("sparsity_mask_2_4", lambda scores, magnitude: scores.new_empty(scores.shape, dtype=torch.bool))
register(
    "compress_2_4",
    lambda weight, mask: (
        weight.new_empty(-(-weight.shape[0] // PANEL), weight.shape[1] // 2, PANEL),
        weight.new_empty(-(-weight.shape[0] // PANEL), -(-weight.shape[1] // 8), PANEL, dtype=torch.uint8),
    ),
)
register(
    "linear_2_4",
    lambda x, values, codes, out_features, bias: x.new_empty(x.shape[0], out_features),
    _setup_linear,
    _backward_linear,
)
register("linear_2_4_backward", _fake_linear_backward)
