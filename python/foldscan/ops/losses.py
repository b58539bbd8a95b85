"""Losses over a vocabulary, fused with the projection onto it: no logits in memory, forward or backward."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from foldscan.ops import _checks
from foldscan.ops._backend import current_backend, use_native
from foldscan.ops._library import compute_dtype, is_recording, kernels, register
from foldscan.ops._packed import may_cache
from foldscan.ops.linear import packed_linear
from foldscan.reference import eager_losses
from foldscan.reference import losses as reference

Reduction = Literal["none", "mean", "sum"]
Direction = Literal["forward", "reverse", "jsd"]
_DIRECTIONS = ("forward", "reverse", "jsd")
_INTS = (torch.int32, torch.int64)


class TokenStats(NamedTuple):
    """What a token's distribution says of the token and of itself; each (N,) fp32, in nats, 0 where ignored.

    Attributes:
        logp: log-probability of the target.
        entropy: ``-sum p log p``.
        varentropy: variance of ``-log p`` under p.
        lse: log-sum-exp of the logits (after softcap and temperature).
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    varentropy: torch.Tensor
    lse: torch.Tensor


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Cross entropy of ``softmax(cap(hidden @ weight.T + bias))`` with the targets; the logits never exist.

    Per row, ``(1 - s) (lse - z_y) + s (lse - mean z) + z_loss lse^2`` with s = ``label_smoothing``.

    Args:
        hidden: (N, H). Inside ``torch.autocast`` it is cast to the autocast dtype.
        weight: (V, H), hidden's dtype, or fp32 beside a bf16 hidden (rounded to bf16 while it is packed, its gradient
            is fp32).
        targets: (N,) int32 or int64. Rows with ``ignore_index`` are left out before anything is multiplied.
        bias: (V,) or None.
        reduction: ``"mean"`` over the rows that count (0 when there are none), ``"sum"``, or ``"none"``: (N,), 0 where
            ignored.
        softcap: logits become ``softcap * tanh(z / softcap)``; 0 for none.
        label_smoothing: in [0, 1].
        z_loss: coefficient of the squared log-sum-exp.

    Returns:
        fp32 (fp64 for fp64 input). Differentiable once, in hidden, weight and bias.

    Memory is O(N) forward, and 16 MB (or 512 columns of logit gradients, if that is more) plus 2 N H backward. A row's
    result has the same bits whatever the other rows and the number of threads. Source: arXiv:2411.09009.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, a label out of range.
    """
    _check_head("hidden", hidden, "weight", weight, bias)
    _check_targets(targets, hidden.shape[0], weight.shape[0], ignore_index)
    _check_reduction(reduction)
    _check_softcap(softcap)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, want a number in [0, 1]")
    dtype = compute_dtype(hidden)
    hidden = hidden.to(dtype)
    if not use_native(hidden, weight, bias):
        voice = eager_losses if current_backend() == "eager" else reference
        return voice.linear_cross_entropy(
            hidden, weight.to(dtype), targets, bias, ignore_index, reduction, softcap, label_smoothing, z_loss
        )
    logp, _, _, lse, zsum = _stats(hidden, weight, targets, bias, 1.0, softcap, ignore_index, moments=False)
    loss = -(1.0 - label_smoothing) * logp
    if label_smoothing:
        loss = loss + label_smoothing * (lse - zsum / weight.shape[0])
    if z_loss:
        loss = loss + z_loss * lse.square()
    return _reduce(loss, reduction, targets != ignore_index)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    support: torch.Tensor | None = None,
) -> TokenStats:
    """Log-probability of the targets, entropy, variance of -log p, and log-sum-exp, in one pass without logits.

    All four are differentiable, jointly, once, in hidden, weight and bias. They describe
    ``softmax(cap(hidden @ weight.T + bias) / temperature)``: the entropy is that at this temperature.

    Args:
        hidden: (N, H). Inside ``torch.autocast`` it is cast to the autocast dtype.
        weight: (V, H), hidden's dtype, or fp32 beside a bf16 hidden.
        targets: (N,) int32 or int64; rows with ``ignore_index`` give zeros.
        bias: (V,) or None.
        temperature: > 0, divides the (capped) logits.
        softcap: logits become ``softcap * tanh(z / softcap)``; 0 for none.
        support: (S,) int32 or int64, distinct ids: the distribution is over these only, and the targets must be among
            them. Copies S rows of the weight.

    Returns:
        TokenStats of (N,) fp32 (fp64 for fp64 input). The bits of a row are the same with and without gradients, alone
        and in a batch, with any number of threads, so that the log-probabilities of generation and of training agree.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, a label out of range or outside of the support.
    """
    _check_head("hidden", hidden, "weight", weight, bias)
    _check_softcap(softcap)
    if not temperature > 0.0:
        raise ValueError(f"temperature: got {temperature}, want a number above 0")
    _check_targets(targets, hidden.shape[0], weight.shape[0], ignore_index)
    if support is not None:
        targets = _into_support(targets, support, weight.shape[0], ignore_index)
        weight = weight.index_select(0, support)
        bias = None if bias is None else bias.index_select(0, support)
    dtype = compute_dtype(hidden)
    hidden = hidden.to(dtype)
    if not use_native(hidden, weight, bias):
        voice = eager_losses if current_backend() == "eager" else reference
        return TokenStats(
            *voice.linear_logprob(hidden, weight.to(dtype), targets, bias, temperature, softcap, ignore_index)
        )
    return TokenStats(*_stats(hidden, weight, targets, bias, temperature, softcap, ignore_index, moments=True)[:4])


def linear_kl_div(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    direction: Direction = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Divergence between a teacher's and a student's distribution over the vocabulary, without the logits of either.

    ``"forward"`` is KL(teacher || student), ``"reverse"`` KL(student || teacher), ``"jsd"`` is
    ``beta KL(teacher || m) + (1 - beta) KL(student || m)`` with ``m = beta teacher + (1 - beta) student``
    (arXiv:2306.13649); beta 0 and 1 mean forward and reverse. Not multiplied by temperature squared.

    Args:
        hidden, weight: the student's (N, H) and (V, H). weight in hidden's dtype, or fp32 beside bf16.
        teacher_hidden, teacher_weight: (N, H') and (V, H'). The teacher is constant: no gradient reaches it.
        beta: in [0, 1], for ``"jsd"``.
        temperature: > 0, divides both logits.
        mask: (N,) bool, rows that count; the others are not multiplied.
        reduction: ``"mean"`` over the rows that count (0 when there are none), ``"sum"`` or ``"none"``: (N,).

    Returns:
        fp32 (fp64 for fp64 input), differentiable once in hidden and weight. Logits have to be finite.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes.
    """
    _check_head("hidden", hidden, "weight", weight, None)
    _check_head("teacher_hidden", teacher_hidden, "teacher_weight", teacher_weight, None)
    N, V = hidden.shape[0], weight.shape[0]
    _checks.shape("teacher_hidden", teacher_hidden, N, "H'")
    _checks.shape("teacher_weight", teacher_weight, V, teacher_hidden.shape[1])
    _check_reduction(reduction)
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction: got {direction!r}, want 'forward', 'reverse' or 'jsd'")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: got {beta}, want a number in [0, 1]")
    if not temperature > 0.0:
        raise ValueError(f"temperature: got {temperature}, want a number above 0")
    if mask is not None:
        _checks.tensor("mask", mask, dtypes=(torch.bool,), dims=1)
        _checks.shape("mask", mask, N)
    if direction == "jsd" and beta in (0.0, 1.0):
        direction = "reverse" if beta else "forward"
    dtype = compute_dtype(hidden)
    hidden, teacher_hidden = hidden.to(dtype), teacher_hidden.detach().to(dtype)
    teacher_weight = teacher_weight.detach()
    if not use_native(hidden, weight, teacher_hidden, teacher_weight):
        voice = eager_losses if current_backend() == "eager" else reference
        return voice.linear_kl_div(
            hidden,
            weight.to(dtype),
            teacher_hidden,
            teacher_weight.to(dtype),
            direction,
            beta,
            temperature,
            mask,
            reduction,
        )
    if dtype == torch.float16:
        hidden, weight = hidden.float(), weight.float()
        teacher_hidden, teacher_weight = teacher_hidden.float(), teacher_weight.float()
    elif teacher_weight.dtype != torch.float32:
        teacher_weight = teacher_weight.to(dtype)
    _check_weight_dtype(hidden, weight)
    code = _DIRECTIONS.index(direction)
    value = kernels.linear_kl(
        _rows(hidden),
        _rows(weight),
        _rows(teacher_hidden),
        _rows(teacher_weight),
        None if mask is None else mask.contiguous(),
        code,
        beta if direction == "jsd" else 0.5,
        temperature,
    )[0]
    return _reduce(value, reduction, mask)


def _check_head(
    name: str, hidden: torch.Tensor, weight_name: str, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    _checks.tensor(name, hidden, dims=2)
    _checks.tensor(weight_name, weight, dims=2)
    _checks.shape(weight_name, weight, "V", hidden.shape[1])
    if weight.shape[0] == 0:
        raise ValueError(f"{weight_name}: got shape {tuple(weight.shape)}, want at least one row")
    if bias is not None:
        _checks.tensor("bias", bias)
        _checks.shape("bias", bias, weight.shape[0])


def _check_targets(targets: torch.Tensor, N: int, V: int, ignore_index: int) -> None:
    _checks.tensor("targets", targets, dtypes=_INTS)
    _checks.shape("targets", targets, N)
    if is_recording() or targets.device.type == "meta":
        return
    bad = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
    if bad.any():
        label = int(targets[bad][0])
        raise ValueError(f"targets: got label {label}, want [0, {V}) or ignore_index={ignore_index}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, want 'none', 'mean' or 'sum'")


def _check_softcap(softcap: float) -> None:
    if not softcap >= 0.0:
        raise ValueError(f"softcap: got {softcap}, want 0 (none) or a positive number")


def _check_weight_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(f"weight: got dtype {weight.dtype}, want {hidden.dtype} as hidden has (or float32)")


def _into_support(targets: torch.Tensor, support: torch.Tensor, V: int, ignore_index: int) -> torch.Tensor:
    """Targets as positions in the support (ignored ones unchanged)."""
    _checks.tensor("support", support, dtypes=_INTS, dims=1)
    size = support.shape[0]
    if size == 0:
        raise ValueError("support: got no ids, want at least one")
    if is_recording():
        inside = support.long()
    else:
        if int(support.min()) < 0 or int(support.max()) >= V:
            raise ValueError(f"support: got ids in [{int(support.min())}, {int(support.max())}], want [0, {V})")
        inside = support.long()
        if inside.unique().shape[0] != size:
            raise ValueError("support: got an id twice, want distinct ids")
    # Outside of the support: a position that the kernel refuses too.
    place = torch.full((V,), size, dtype=torch.int64, device=targets.device)
    place = place.scatter(0, inside, torch.arange(size, device=targets.device))
    ignored = targets == ignore_index
    moved = place[torch.where(ignored, 0, targets.long())]
    if not is_recording():
        outside = (moved == size) & ~ignored
        if outside.any():
            raise ValueError(f"targets: got label {int(targets[outside][0])}, want one of the ids in support")
    return torch.where(ignored, ignore_index, moved)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
    *,
    moments: bool,
) -> tuple[torch.Tensor, ...]:
    """(logp, entropy, varentropy, lse, sum of logits) by the kernel; entropies are zeros without ``moments``."""
    if hidden.dtype == torch.float16:
        hidden, weight = hidden.float(), weight.float()
    _check_weight_dtype(hidden, weight)
    hidden, weight = _rows(hidden), _rows(weight)
    bias = None if bias is None else bias.float().contiguous()
    labels = targets.long().contiguous()
    tail = (labels, bias, float(temperature), float(softcap), ignore_index, moments)
    if may_cache((weight,), (hidden, bias)):
        return kernels.linear_stats_packed(hidden, packed_linear(weight, hidden.dtype), weight.shape[0], *tail)
    return kernels.linear_stats(hidden, weight, *tail)


def _reduce(loss: torch.Tensor, reduction: str, counted: torch.Tensor | None) -> torch.Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (max(1, loss.shape[0]) if counted is None else counted.sum().clamp(min=1))


def _fake_stats(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(5))


def _setup_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, bias, temperature, softcap, ignore_index, moments = inputs
    logp, entropy, varentropy, lse, _ = output
    if not moments:
        ctx.mark_non_differentiable(entropy, varentropy)
    ctx.save_for_backward(hidden, weight, targets, bias, logp, entropy, varentropy, lse)
    ctx.settings = (temperature, softcap, ignore_index)


def _backward_stats(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    dense = [g.contiguous() for g in grads]
    results = kernels.linear_stats_backward(*dense, *ctx.saved_tensors, *ctx.settings, *needs)
    dhidden, dweight, dbias = (g if need else None for g, need in zip(results, needs))
    return dhidden, dweight, None, dbias, None, None, None, None


def _fake_stats_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    hidden, weight = args[5], args[6]
    need_hidden, need_weight, need_bias = args[-3:]
    (N, H), V = hidden.shape, weight.shape[0]
    return (
        hidden.new_empty(N if need_hidden else 0, H),
        weight.new_empty(V if need_weight else 0, H),
        hidden.new_empty(V if need_bias else 0, dtype=torch.float32),
    )


def _fake_kl(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4))


def _setup_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.settings = inputs[5:]


def _backward_kl(ctx: Any, dvalue: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    grads = kernels.linear_kl_backward(dvalue.contiguous(), *ctx.saved_tensors, *ctx.settings, *needs)
    return (*(g if need else None for g, need in zip(grads, needs)), *[None] * 6)


def _fake_kl_backward(dvalue: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
    need_hidden, need_weight = rest[-2:]
    (N, H), V = hidden.shape, weight.shape[0]
    return hidden.new_empty(N if need_hidden else 0, H), weight.new_empty(V if need_weight else 0, H)


register("linear_stats", _fake_stats, _setup_stats, _backward_stats)
register("linear_stats_packed", _fake_stats)
register("linear_stats_backward", _fake_stats_backward)
register("linear_kl", _fake_kl, _setup_kl, _backward_kl)
register("linear_kl_backward", _fake_kl_backward)
