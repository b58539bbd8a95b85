"""Causal convolution: definition, gradients, layouts, packing, states, single steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foldscan import ops
from foldscan.reference import ssm as reference
from helpers import assert_budget, assert_close_to_truth, check_op
from hypothesis import given, settings
from hypothesis import strategies as st


def make(batch: int, channels: int, length: int, dtype: torch.dtype, last: bool, width: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(batch, length, channels).transpose(1, 2) if last else torch.randn(batch, channels, length)
    return [x.to(dtype), torch.randn(channels, width), torch.randn(channels)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    ("batch", "channels", "length", "width"),
    [
        (2, 64, 1, 4),
        (1, 65, 3, 2),
        (2, 7, 130, 4),
        (1, 130, 257, 3),
        (1, 16, 0, 4),
        (3, 3, 40, 5),
        (1, 1041, 70, 4),
        (1, 17, 1100, 8),
    ],
)
def test_forward_and_gradients(
    batch: int, channels: int, length: int, width: int, last: bool, dtype: torch.dtype
) -> None:
    inputs = make(batch, channels, length, dtype, last, width)
    grad = torch.randn(batch, channels, length).to(dtype)
    for activation in (None, "silu"):
        assert_close_to_truth(
            lambda x, w, b, a=activation: ops.causal_conv1d_fn(x, w, b, activation=a),
            lambda x, w, b, a=activation: reference.causal_conv1d(x, w, b, None, None, a, None),
            inputs,
            grad,
        )


@pytest.mark.parametrize("last", [True, False])
def test_packed_with_states(last: bool) -> None:
    cu = torch.tensor([0, 1, 3, 3, 140, 143], dtype=torch.int32)
    inputs = [*make(1, 20, 143, torch.float32, last), torch.randn(5, 20, 3)]
    assert_close_to_truth(
        lambda x, w, b, s: ops.causal_conv1d_fn(x, w, b, initial_states=s, activation="silu", cu_seqlens=cu),
        lambda x, w, b, s: reference.causal_conv1d(x, w, b, None, s, "silu", cu),
        inputs,
        torch.randn(1, 20, 143),
    )
    x, w, b, states = inputs
    out, final = ops.causal_conv1d_fn(x, w, b, None, states, True, activation="silu", cu_seqlens=cu)
    for i in range(5):
        piece = torch.cat([states[i], x[0, :, cu[i] : cu[i + 1]]], 1)
        assert torch.equal(final[i], piece[:, -3:])
        alone = ops.causal_conv1d_fn(
            x[:, :, cu[i] : cu[i + 1]], w, b, initial_states=states[i : i + 1], activation="silu"
        )
        assert torch.equal(alone, out[:, :, cu[i] : cu[i + 1]])


def test_seq_idx_with_padding() -> None:
    ids = torch.tensor([[0] * 3 + [1] * 60 + [-1] * 7, [5] * 35 + [2] * 35], dtype=torch.int32)
    assert_close_to_truth(
        lambda x, w, b: ops.causal_conv1d_fn(x, w, b, seq_idx=ids),
        lambda x, w, b: reference.causal_conv1d(x, w, b, ids, None, None, None),
        make(2, 9, 70, torch.float32, True),
        torch.randn(2, 9, 70),
    )
    out = ops.causal_conv1d_fn(*make(2, 9, 70, torch.float32, True), seq_idx=ids)
    assert out[0, :, 63:].abs().max() == 0 and out[0, :, :63].abs().min() > 0


def test_final_states_and_their_gradient() -> None:
    x, w, b = make(2, 5, 2, torch.float32, False)
    states = torch.randn(2, 5, 3, requires_grad=True)
    x.requires_grad_()
    holder = torch.empty(2, 5, 3)
    _, final = ops.causal_conv1d_fn(x, w, b, None, states, True)
    assert torch.equal(final, torch.cat([states, x], 2)[:, :, -3:])
    final.sum().backward()
    assert x.grad.eq(1).all() and states.grad.tolist() == [[[0.0, 0.0, 1.0]] * 5] * 2
    with torch.no_grad():
        _, out = ops.causal_conv1d_fn(x, w, b, None, states, True, holder)
    assert out is holder and torch.equal(holder, final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_has_the_bits_of_the_full_convolution(dtype: torch.dtype) -> None:
    x, w, b = make(2, 70, 9, dtype, True)
    want = ops.causal_conv1d_fn(x, w, b, activation="silu")
    for ring in (False, True):
        state = torch.zeros(4, 70, 5, dtype=dtype)
        slots, seen = torch.tensor([3, 1], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        for t, n in ((0, 1), (1, 1), (2, 3), (5, 4)):
            lens = seen + t if ring else None
            got = ops.causal_conv1d_update(x[:, :, t : t + n], state, w, b, "silu", lens, slots)
            assert torch.equal(got, want[:, :, t : t + n])
            with ops.backend("reference"):
                copy = state.clone()
                ops.causal_conv1d_update(x[:, :, t : t + n], copy, w, b, "silu", lens, slots)
        assert state[0].abs().max() == 0 and state[2].abs().max() == 0
        recent = state[slots.long()] if not ring else state[slots.long()].roll(-(9 % 5), 2)
        assert torch.equal(recent, x[:, :, -5:])


def test_update_reference_agrees_and_padding_rows() -> None:
    x, w, b = make(3, 6, 1, torch.float32, False)
    state = torch.randn(3, 6, 3)
    slots = torch.tensor([1, -1, 0], dtype=torch.int32)
    results = {}
    for name in ("native", "reference"):
        with ops.backend(name):
            s = state.clone()
            results[name] = (ops.causal_conv1d_update(x[:, :, 0], s, w, b, None, None, slots), s)
    for a, r in zip(results["native"], results["reference"]):
        torch.testing.assert_close(a, r, rtol=1e-6, atol=1e-6)
    assert results["native"][0][1].abs().max() == 0 and torch.equal(results["native"][1][2], state[2])


def test_varlen_states() -> None:
    x = torch.randn(10, 4)
    cu = torch.tensor([0, 2, 2, 10], dtype=torch.int32)
    states = ops.causal_conv1d_varlen_states(x, cu, 3)
    assert torch.equal(states[0], torch.cat([torch.zeros(4, 1), x[:2].T], 1))
    assert states[1].abs().max() == 0
    assert torch.equal(states[2], x[7:].T)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_fuzz(data: st.DataObject) -> None:
    draw = data.draw
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    channels, width, total = draw(st.integers(1, 70)), draw(st.integers(2, 5)), sum(lengths)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    inputs: list[Any] = make(1, channels, total, dtype, draw(st.booleans()), width)
    inputs.append(torch.randn(len(lengths), channels, width - 1).to(dtype) if draw(st.booleans()) else None)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    activation = draw(st.sampled_from([None, "silu"]))
    assert_close_to_truth(
        lambda x, w, b, s: ops.causal_conv1d_fn(x, w, b, initial_states=s, activation=activation, cu_seqlens=cu),
        lambda x, w, b, s: reference.causal_conv1d(x, w, b, None, s, activation, cu),
        inputs,
        torch.randn(1, channels, total).to(dtype),
    )


def test_eager_voice_agrees() -> None:
    inputs = make(1, 6, 40, torch.float32, True)
    cu = torch.tensor([0, 2, 2, 40], dtype=torch.int32)
    want = reference.causal_conv1d(*[t.double() for t in inputs], None, None, "silu", cu)
    with ops.backend("eager"):
        got = ops.causal_conv1d_fn(*inputs, activation="silu", cu_seqlens=cu)
    assert_budget("out", got, want, want)


def test_opcheck_compile_and_errors() -> None:
    x, w, b = (t.requires_grad_() for t in make(1, 6, 20, torch.float32, True))
    cu = torch.tensor([0, 3, 20], dtype=torch.int32)
    states = torch.randn(2, 6, 3, requires_grad=True)
    check_op(
        torch.ops.foldscan.causal_conv1d,
        (x, w, b, None, cu, states, True),
        public=ops.causal_conv1d_fn,
        public_args=(x, w, b, None, states, True, None, "silu"),
        public_kwargs={"cu_seqlens": cu},
    )
    state = torch.zeros(1, 6, 3)
    args = (x.detach()[:, :, :1], state, w.detach(), b.detach(), None, None, True)
    check_op(torch.ops.foldscan.causal_conv1d_update, args)
    with pytest.raises(ValueError, match="activation: got 'relu'"):
        ops.causal_conv1d_fn(x, w, b, activation="relu")
    with pytest.raises(ValueError, match="weight: got width 1"):
        ops.causal_conv1d_fn(x, w[:, :1], b)
    with pytest.raises(ValueError, match="conv_state"):
        ops.causal_conv1d_update(x.detach()[:, :, 0], torch.zeros(1, 6, 2), w.detach())
