"""Mixture of Experts: grouped matrix products and the fused expert layer."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch

from foldscan.ops import _checks
from foldscan.ops._backend import current_backend, use_native
from foldscan.ops._library import compute_dtype, is_recording, kernels, register, wants_grad
from foldscan.ops._packed import cached_pack, find_pack, may_cache, may_find
from foldscan.ops.moe_routing import check_experts
from foldscan.reference import eager_moe
from foldscan.reference import moe as reference

Activation = Literal["silu", "relu2", "gelu"]
_ACTIVATIONS = ("silu", "relu2", "gelu")
_moe_packed = torch.ops.foldscan.moe_mlp_packed.default._op  # no autograd formula to pass by


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``a[r] @ b[g] + bias[g]`` for the rows r of every group g, with the layout of torch's ``grouped_mm``.

    Args:
        a: (rows, K), sorted by group. Inside ``torch.autocast`` it is cast to the autocast dtype.
        b: (groups, K, N), of a's dtype, or fp32 beside a bf16 ``a``. Either of K and N may be the dense one.
        offs: (groups,) int32, the end of every group's rows.
        bias: (groups, N) or None.

    Returns:
        (rows, N) in a's dtype; rows beyond ``offs[-1]`` are zero. A row has the same bits whatever the other rows.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, or ``offs`` decreases or passes the number of rows.
    """
    _checks.tensor("a", a, dims=2)
    _checks.tensor("b", b, dims=3)
    _checks.shape("b", b, "groups", a.shape[1], "N")
    _checks.tensor("offs", offs, dtypes=(torch.int32,), dims=1)
    _checks.shape("offs", offs, b.shape[0])
    if bias is not None:
        _checks.tensor("bias", bias, dims=2)
        _checks.shape("bias", bias, b.shape[0], b.shape[2])
    if not is_recording() and offs.device.type == "cpu":
        ends = [0, *offs.tolist(), a.shape[0]]
        if any(y < x for x, y in itertools.pairwise(ends)):
            raise ValueError(f"offs: got {ends[1:-1]}, want row ends that do not decrease, at most {a.shape[0]}")
    dtype = compute_dtype(a)
    a = a.to(dtype)
    if not use_native(a, b, bias):
        cast = b.to(dtype), None if bias is None else bias.to(dtype)
        voice = eager_moe if current_backend() == "eager" else reference
        return voice.grouped_mm(a, cast[0], offs, cast[1])
    if dtype == torch.float16:
        return grouped_mm(a.float(), b.float(), offs, bias).half()
    if b.dtype not in (dtype, torch.float32):
        raise TypeError(f"b: got dtype {b.dtype}, want {dtype} as a has (or float32)")
    if a.stride(1) != 1:
        a = a.contiguous()
    if 1 not in (b.stride(1), b.stride(2)):
        b = b.contiguous()
    return kernels.grouped_mm(a, b, offs.contiguous(), None if bias is None else bias.float().contiguous())


def moe_mlp(
    tokens: torch.Tensor,
    probs: torch.Tensor,
    experts: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    w_gate: torch.Tensor | None = None,
    activation: Activation = "silu",
) -> torch.Tensor:
    """The whole local expert layer: ``out[t] = sum_j w_down[e] h[t, j]`` with ``e = experts[t, j]`` and
    ``h[t, j] = p[t, j] * act(w_gate[e] x[t]) * (w_up[e] x[t])``, or ``p[t, j] * act(w_up[e] x[t])`` without ``w_gate``.

    The probability multiplies the hidden vector, not the output (the same in exact arithmetic). No (T, E, ...) buffer
    exists, no token is dropped, and an expert without tokens costs nothing.

    Args:
        tokens: (T, H). Inside ``torch.autocast`` it is cast to the autocast dtype.
        probs: (T, k), used in fp32.
        experts: (T, k) int32 or int64 in [-1, E); -1 is an empty slot.
        w_up, w_gate: (E, F, H); w_down: (E, D, F), usually D = H. All of one dtype: that of the tokens, or fp32 beside
            bf16 tokens (rounded to bf16 while they are packed; their gradients are fp32).
        activation: ``"silu"``, ``"relu2"`` (squared ReLU, arXiv:2109.08668) or ``"gelu"`` (exact).

    Returns:
        (T, D) in the dtype of the (cast) tokens. A token has the same bits whatever the other tokens and the number
        of threads. Differentiable in tokens, probs and weights.

    Without gradients the packed weights are cached (as large as the weights) until they are changed or freed.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, or an expert out of range.
    """
    if may_find(tokens, probs, experts):
        out = _decode(tokens, probs, experts, w_up, w_down, w_gate, activation)
        if out is not None:
            return out
    _checks.tensor("tokens", tokens, dims=2)
    _checks.tensor("probs", probs, dims=2)
    _checks.tensor("w_up", w_up, dims=3)
    _checks.tensor("w_down", w_down, dims=3)
    E, F, H = w_up.shape
    if 0 in w_up.shape:
        raise ValueError(f"w_up: got shape {tuple(w_up.shape)}, want no empty dimension")
    check_experts(experts, tokens.shape[0], E)
    _checks.shape("probs", probs, *experts.shape)
    _checks.shape("tokens", tokens, "T", H)
    _checks.shape("w_down", w_down, E, "out", F)
    _checks.same_dtype("w_down", w_down, "w_up", w_up)
    if w_gate is not None:
        _checks.tensor("w_gate", w_gate, dims=3)
        _checks.shape("w_gate", w_gate, E, F, H)
        _checks.same_dtype("w_gate", w_gate, "w_up", w_up)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, want one of {', '.join(_ACTIVATIONS)}")
    dtype = compute_dtype(tokens)
    tokens = tokens.to(dtype)
    weights = [w_up, w_down, w_gate]
    if not use_native(tokens, probs, *weights):
        cast = [None if w is None else w.to(dtype) for w in weights]
        voice = eager_moe if current_backend() == "eager" else reference
        return voice.moe_mlp(tokens, probs, experts, cast[0], cast[1], w_gate=cast[2], activation=activation)
    if dtype == torch.float16:
        gate = None if w_gate is None else w_gate.float()
        return moe_mlp(
            tokens.float(), probs, experts, w_up.float(), w_down.float(), w_gate=gate, activation=activation
        ).half()
    if w_up.dtype not in (dtype, torch.float32):
        raise TypeError(f"w_up: got dtype {w_up.dtype}, want {dtype} as tokens has (or float32)")
    code = _ACTIVATIONS.index(activation)
    tokens, probs, ids = tokens.contiguous(), probs.float().contiguous(), experts.long().contiguous()
    keep = wants_grad(tokens, probs, *weights)
    if may_cache(tuple(w for w in weights if w is not None), (tokens, probs)):
        packed = [None if w is None else cached_pack("moe", w, dtype, _pack) for w in weights]
        return kernels.moe_mlp_packed(tokens, probs, ids, *packed, F, w_down.shape[1], code)
    dense = [None if w is None else w.contiguous() for w in weights]
    return kernels.moe_mlp(tokens, probs, ids, *dense, code, keep)[0]


def _decode(
    tokens: torch.Tensor,
    probs: torch.Tensor,
    experts: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    w_gate: torch.Tensor | None,
    activation: str,
) -> torch.Tensor | None:
    """`moe_mlp` on weights that an earlier call has checked and packed; None where anything is not as usual."""
    up, down = find_pack("moe", w_up, tokens.dtype), find_pack("moe", w_down, tokens.dtype)
    if up is None or down is None or tokens.dim() != 2 or experts.dim() != 2:
        return None
    gate = None
    if w_gate is not None:
        gate = find_pack("moe", w_gate, tokens.dtype)
        if gate is None or w_gate.shape != w_up.shape:
            return None
    E, F, H = w_up.shape
    if (
        tokens.shape[1] != H
        or w_down.shape[0] != E
        or w_down.shape[2] != F
        or experts.shape[0] != tokens.shape[0]
        or probs.shape != experts.shape
        or experts.dtype is not torch.int64
        or probs.dtype is not torch.float32
        or activation not in _ACTIVATIONS
    ):
        return None
    try:
        return _moe_packed(tokens, probs, experts, up, down, gate, F, w_down.shape[1], _ACTIVATIONS.index(activation))
    except RuntimeError:  # an expert out of range: the checks say which
        return None


def _pack(weight: torch.Tensor, as_bf16: bool) -> torch.Tensor:
    return kernels.moe_pack(weight.contiguous(), as_bf16)


def packed_experts(weight: torch.Tensor) -> torch.Tensor:
    """The cached packed form of (experts, out, in) weights, for products in their own dtype."""
    return cached_pack("moe", weight, weight.dtype, _pack)


def _fake_grouped(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


def _setup_grouped(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward_grouped(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    da, db, dbias = kernels.grouped_mm_backward(dout.contiguous(), *ctx.saved_tensors, *needs)
    return da if needs[0] else None, db if needs[1] else None, None, dbias if needs[2] else None


def _fake_grouped_backward(
    dout: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor,
    need_a: bool,
    need_b: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, ...]:
    G, K, N = b.shape
    return (
        a.new_empty(a.shape[0] if need_a else 0, K),
        b.new_empty(G if need_b else 0, K, N),
        a.new_empty(G if need_bias else 0, N, dtype=torch.float32),
    )


def _fake_mlp(
    tokens: torch.Tensor,
    probs: torch.Tensor,
    experts: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    w_gate: torch.Tensor | None,
    activation: int,
    keep: bool,
) -> tuple[torch.Tensor, ...]:
    T, R, F = tokens.shape[0], experts.shape[0] * experts.shape[1], w_up.shape[1]
    return (
        tokens.new_empty(T, w_down.shape[1]),
        tokens.new_empty(R if keep else 0, F),
        tokens.new_empty(R if keep and w_gate is not None else 0, F),
    )


def _setup_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(*inputs[:6], output[1], output[2])
    ctx.activation, ctx.keep = inputs[6], inputs[7]


def _backward_mlp(ctx: Any, dout: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    if not ctx.keep:
        raise RuntimeError("moe_mlp: called with keep=False, want keep=True where gradients are needed")
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4, 5)]
    grads = kernels.moe_mlp_backward(dout.contiguous(), *ctx.saved_tensors, ctx.activation, *needs)
    tokens, probs, up, down, gate = (g if need else None for g, need in zip(grads, needs))
    return tokens, probs, None, up, down, gate, None, None


def _fake_mlp_backward(
    dout: torch.Tensor,
    tokens: torch.Tensor,
    probs: torch.Tensor,
    experts: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    w_gate: torch.Tensor | None,
    up: torch.Tensor,
    gate: torch.Tensor,
    activation: int,
    *needs: bool,
) -> tuple[torch.Tensor, ...]:
    (T, H), (E, F, _), D = tokens.shape, w_up.shape, w_down.shape[1]
    return (
        tokens.new_empty(T if needs[0] else 0, H),
        probs.new_empty(T if needs[1] else 0, probs.shape[1]),
        w_up.new_empty(E if needs[2] else 0, F, H),
        w_up.new_empty(E if needs[3] else 0, D, F),
        w_up.new_empty(E if needs[4] and w_gate is not None else 0, F, H),
    )


register("grouped_mm", _fake_grouped, _setup_grouped, _backward_grouped)
register("grouped_mm_backward", _fake_grouped_backward)
register("moe_mlp", _fake_mlp, _setup_mlp, _backward_mlp)
register("moe_mlp_backward", _fake_mlp_backward)
register(
    "moe_mlp_packed",
    lambda tokens, probs, experts, up, down, gate, F, D, activation: tokens.new_empty(tokens.shape[0], D),
)
