"""Short causal convolution of Mamba layers: full sequences, packed sequences, single steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from foldscan.ops import _checks
from foldscan.ops._backend import current_backend, use_native
from foldscan.ops._library import kernels, register
from foldscan.reference import eager_ssm
from foldscan.reference import ssm as reference


def _activation(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation: got {activation!r}, want None, 'silu' or 'swish'")
    return activation is not None


def _weights(weight: torch.Tensor, bias: torch.Tensor | None, channels: int) -> None:
    _checks.tensor("weight", weight, dims=2)
    _checks.shape("weight", weight, channels, "width")
    if not 2 <= weight.shape[1] <= 8:
        raise ValueError(f"weight: got width {weight.shape[1]}, want 2 to 8")
    if bias is not None:
        _checks.tensor("bias", bias)
        _checks.shape("bias", bias, channels)


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution: ``y[t] = act(bias + sum_w weight[:, w] x[t - W + 1 + w])``.

    Args:
        x: (batch, D, L), fp32, bf16, fp16 or fp64, in any memory layout; the output keeps it.
        weight: (D, W), W in 2..8. bias: (D) or None. Any float dtype.
        seq_idx: (batch, L) int32; a sequence is a run of equal ids in a row; outputs of negative ids are 0.
        initial_states: (batch, D, W - 1), the inputs before each row's first token; with cu_seqlens (n, D, W - 1).
        return_final_states: also return the last W - 1 inputs of each row (of each sequence with cu_seqlens), in the
            shape of initial_states. final_states_out: a tensor that receives them as well.
        activation: None, "silu" or "swish".
        cu_seqlens: (n + 1) int32 cumulative lengths of packed sequences; the batch is then 1.

    Returns:
        (batch, D, L), or with return_final_states (out, final_states). Differentiable in x, weight, bias and
        initial_states. Bits of a token depend on its own window only.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    _checks.tensor("x", x, dims=3)
    batch, channels, length = x.shape
    _weights(weight, bias, channels)
    silu = _activation(activation)
    past = weight.shape[1] - 1
    if seq_idx is not None:
        _checks.tensor("seq_idx", seq_idx, dtypes=(torch.int32,))
        _checks.shape("seq_idx", seq_idx, batch, length)
        if return_final_states:
            raise ValueError("return_final_states: not with seq_idx, want cu_seqlens")
    rows = batch
    if cu_seqlens is not None:
        if batch != 1 or seq_idx is not None:
            raise ValueError("cu_seqlens: wants a batch of 1 and no seq_idx")
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, length)
        rows = cu_seqlens.shape[0] - 1
    if initial_states is not None:
        _checks.tensor("initial_states", initial_states)
        _checks.shape("initial_states", initial_states, rows, channels, past)
    out = _convolve(x, weight, bias, seq_idx, initial_states, silu, cu_seqlens)
    if not return_final_states:
        return out
    final = _last_inputs(x, initial_states, past, cu_seqlens)
    if final_states_out is not None:
        final_states_out.copy_(final)
        final = final_states_out
    return out, final


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    initial: torch.Tensor | None,
    silu: bool,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    if not use_native(x, weight, bias, initial):
        act = "silu" if silu else None
        if current_backend() == "eager" and initial is None:
            return eager_ssm.causal_conv1d(x, weight, bias, seq_idx, act, cu_seqlens)
        return reference.causal_conv1d(x, weight, bias, seq_idx, initial, act, cu_seqlens)
    if x.dtype == torch.float16:
        states = None if initial is None else initial.float()
        return _convolve(x.float(), weight, bias, seq_idx, states, silu, cu_seqlens).to(x.dtype)
    return kernels.causal_conv1d(
        x,
        weight.float().contiguous(),
        None if bias is None else bias.float(),
        seq_idx if seq_idx is None else seq_idx.contiguous(),
        cu_seqlens,
        initial if initial is None else initial.to(x.dtype).contiguous(),
        silu,
    )


def _last_inputs(
    x: torch.Tensor, initial: torch.Tensor | None, count: int, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """The last ``count`` inputs of each row or packed sequence, older ones from the initial state or zero."""
    if cu_seqlens is None:
        if x.shape[2] < count:
            before = x.new_zeros(x.shape[0], x.shape[1], count) if initial is None else initial.to(x.dtype)
            x = torch.cat([before, x], dim=2)
        return x[:, :, x.shape[2] - count :].clone()
    begin, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    column = end - count + torch.arange(count, device=x.device)
    inside = (column >= begin)[:, None, :]
    if x.shape[2] == 0:
        gathered = x.new_zeros(begin.shape[0], x.shape[1], count)
    else:
        gathered = x[0][:, column.clamp(min=0)].transpose(0, 1)
    if initial is None:
        return torch.where(inside, gathered, 0)
    # Token begin - k of a sequence is column count - k of its initial state.
    older = (column - begin + count).clamp(0, count - 1)[:, None, :].expand(-1, x.shape[1], -1)
    return torch.where(inside, gathered, initial.to(x.dtype).gather(2, older))


def causal_conv1d_varlen_states(x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int) -> torch.Tensor:
    """The last ``state_len`` tokens of each packed sequence, zero where a sequence is shorter.

    Args:
        x: (total, D). cu_seqlens: (n + 1) int32.

    Returns:
        (n, D, state_len), for ``causal_conv1d_update``.
    """
    _checks.tensor("x", x, dims=2)
    _checks.cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0])
    return _last_inputs(x.T[None], None, state_len, cu_seqlens)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """The convolution of new tokens after those in ``conv_state``, which is updated in place.

    Args:
        x: (batch, D) or (batch, D, tokens).
        conv_state: (slots, D, state_len), state_len >= W - 1, x's dtype; newest token last, unless cache_seqlens.
        weight: (D, W). bias: (D) or None. activation: None, "silu" or "swish".
        cache_seqlens: (batch) int32; conv_state is then a ring written at ``cache_seqlens % state_len``.
        conv_state_indices: (batch) int32, the slot of each sequence; negative = padding: output 0, nothing written.

    Returns:
        Like x. Same bits as ``causal_conv1d_fn`` on the whole sequence. Not differentiable.
    """
    _checks.tensor("x", x, dims=(2, 3))
    _checks.tensor("conv_state", conv_state, dims=3)
    _weights(weight, bias, x.shape[1])
    silu = _activation(activation)
    _checks.same_dtype("conv_state", conv_state, "x", x)
    slots = conv_state.shape[0] if conv_state_indices is None else None
    if conv_state.shape[1] != x.shape[1] or conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"conv_state: got shape {tuple(conv_state.shape)}, "
            f"want (slots, {x.shape[1]}, at least {weight.shape[1] - 1})"
        )
    if slots is not None and slots != x.shape[0]:
        raise ValueError(f"conv_state: got {slots} rows, want {x.shape[0]} or conv_state_indices")
    for name, index in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if index is not None:
            _checks.tensor(name, index, dtypes=(torch.int32,))
            _checks.shape(name, index, x.shape[0])
    tokens = x if x.dim() == 3 else x[:, :, None]
    if use_native(x, conv_state, weight, bias) and x.dtype != torch.float16:
        b = None if bias is None else bias.float()
        w = weight.float().contiguous()
        out = kernels.causal_conv1d_update(tokens, conv_state, w, b, cache_seqlens, conv_state_indices, silu)
    else:
        out = _update_reference(tokens, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    return out if x.dim() == 3 else out[:, :, 0]


def _update_reference(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    cache_seqlens: torch.Tensor | None,
    indices: torch.Tensor | None,
) -> torch.Tensor:
    out = torch.zeros_like(x)
    length, past = conv_state.shape[2], weight.shape[1] - 1
    for b in range(x.shape[0]):
        slot = b if indices is None else int(indices[b])
        if slot < 0:
            continue
        start = 0 if cache_seqlens is None else int(cache_seqlens[b]) % length
        ordered = conv_state[slot].roll(-start, dims=1)
        full = torch.cat([ordered, x[b]], dim=1)
        window = full[None, :, full.shape[1] - x.shape[2] - past :]
        y = F.conv1d(reference.wide(window), reference.wide(weight)[:, None], groups=x.shape[1])[0]
        y = y if bias is None else y + reference.wide(bias)[:, None]
        out[b] = (F.silu(y) if silu else y).to(x.dtype)
        shift = 0 if cache_seqlens is None else (start + x.shape[2]) % length
        conv_state[slot] = full[:, full.shape[1] - length :].roll(shift, dims=1)
    return out


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    initial: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    return _like(x)


def _like(x: torch.Tensor) -> torch.Tensor:
    batch, channels, length = x.shape
    if channels > 1 and x.stride(1) == 1:
        return x.new_empty(batch, length, channels).transpose(1, 2)
    return x.new_empty(batch, channels, length)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu = silu


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, seq_idx, cu_seqlens, initial = ctx.saved_tensors
    dx, dweight, dbias, dinitial = kernels.causal_conv1d_backward(
        dout, x, weight, bias, seq_idx, cu_seqlens, initial, ctx.silu
    )
    return dx, dweight, None if bias is None else dbias, None, None, None if initial is None else dinitial, None


def _fake_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    initial: torch.Tensor | None,
    silu: bool,
) -> tuple[torch.Tensor, ...]:
    channels, width = weight.shape
    rows = 0 if initial is None else initial.shape[0]
    return (
        _like(x),
        torch.empty_like(weight),
        weight.new_empty(channels),
        x.new_empty(rows, channels, width - 1),
    )


register("causal_conv1d", _fake, _setup, _backward)
register("causal_conv1d_backward", _fake_backward)
register("causal_conv1d_update", lambda x, *_: _like(x))
