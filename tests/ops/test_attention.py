"""flash_attn_func and flash_attn_varlen_func: fp64 truth, gradients, masks, odd shapes, errors, registration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, cu
from foldscan import ops
from foldscan.reference import attention as reference
from helpers import assert_budget, check_op, relative_rmse
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16]

# Pairs of lengths from the test lists of the flash-attention repository, and both sides of our own tile edges.
LENGTHS = [
    (1, 1), (64, 128), (128, 192), (256, 256), (239, 1), (799, 3), (113, 203), (113, 128), (128, 217), (113, 211),
    (108, 256), (256, 512), (384, 256), (640, 128), (512, 257), (95, 255), (97, 513), (1023, 1024), (1024, 1023),
    (3, 799), (511, 1), (3, 513), (2, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q", "k"), LENGTHS)
def test_lengths(q: int, k: int, causal: bool, dtype: torch.dtype) -> None:
    Case([q], [k], heads=2, kv_heads=1, head_dim=32, causal=causal, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 40, 64, 96, 128, 192, 256])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    Case([101], [277], heads=2, kv_heads=2, head_dim=head_dim, causal=True, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 1), (5, 1)])
def test_grouped_heads(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    Case([130, 41], [140, 300], heads=heads, kv_heads=kv_heads, head_dim=24, causal=True, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(0, 0), (17, -1), (-1, 9), (300, 2), (64, 64), (5000, 5000)])
@pytest.mark.parametrize("causal", [False, True])
def test_windows(window: tuple[int, int], causal: bool, dtype: torch.dtype) -> None:
    Case([257, 30], [600, 11], head_dim=16, causal=causal, window=window, dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks(softcap: float, sinks: bool, dtype: torch.dtype) -> None:
    # The second sequence has no keys: with sinks its lse is the sink, and has a gradient.
    Case(
        [120, 9, 300],
        [400, 0, 300],
        heads=4,
        kv_heads=2,
        head_dim=20,
        causal=True,
        softcap=softcap,
        sinks=sinks,
        dtype=dtype,
    ).check(3.0 if softcap else 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_dim_and_empty_sequences(dtype: torch.dtype) -> None:
    Case([0, 40, 0, 7, 1], [5, 33, 0, 0, 2], head_dim=24, value_dim=40, causal=True, dtype=dtype).check()
    Case([], [], dtype=dtype).check()
    Case([0], [0], dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kwargs", [{}, {"window": (90, 0)}, {"softcap": 15.0}])
def test_packed_documents(kwargs: dict[str, object], dtype: torch.dtype) -> None:
    # As training packs them: many lengths from 16 to 1024, none a multiple of a tile.
    documents = [16, 61, 1024, 130, 23, 257, 19, 511, 96, 35]
    Case(documents, documents, heads=4, kv_heads=2, head_dim=32, causal=True, dtype=dtype, **kwargs).check(3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("group", [1, 4, 7, 16, 17])
def test_one_query_against_many_keys(group: int, dim: int, dtype: torch.dtype) -> None:
    Case([1, 1, 1], [1030, 257, 3], heads=2 * group, kv_heads=2, head_dim=dim, causal=True, dtype=dtype).check()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    length = st.sampled_from([0, 1, 2, 31, 64, 95, 129, 200, 258])
    kv_heads = data.draw(st.integers(1, 3))
    edge = st.sampled_from([-1, 0, 1, 40, 128, 300])
    Case(
        data.draw(st.lists(length, min_size=n, max_size=n)),
        data.draw(st.lists(length, min_size=n, max_size=n)),
        heads=kv_heads * data.draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=data.draw(st.sampled_from([3, 8, 33, 64])),
        value_dim=data.draw(st.sampled_from([None, 5, 64])),
        causal=data.draw(st.booleans()),
        window=(data.draw(edge), data.draw(edge)),
        softcap=data.draw(st.sampled_from([0.0, 0.0, 8.0])),
        sinks=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(DTYPES)),
    ).check(3.0)


def test_the_oracle_agrees_with_pytorch_and_its_own_differences() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = ops.flash_attn_func(q, k, v, causal=True)
    want = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)
    assert relative_rmse(out, want) < 1e-14
    q, k, v = (torch.randn(1, n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.flash_attn_func(
            *inputs[:3], causal=True, window_size=(3, 0), softcap=2.0, sinks=inputs[3], return_lse=True
        )

    assert torch.autograd.gradcheck(run, (q, k, v, sinks))


def test_mask_by_hand() -> None:
    """Two queries at the end of four keys: which keys are averaged when all scores are equal."""
    q, k = torch.zeros(1, 2, 1, 4), torch.zeros(1, 4, 1, 4)
    v = torch.eye(4)[None, :, None, :]
    rows = {
        (False, (-1, -1)): ([0, 1, 2, 3], [0, 1, 2, 3]),
        (True, (-1, -1)): ([0, 1, 2], [0, 1, 2, 3]),
        (True, (1, -1)): ([1, 2], [2, 3]),
        (False, (0, 1)): ([2, 3], [3]),
    }
    for (causal, window), wanted in rows.items():
        out, lse = ops.flash_attn_func(q, k, v, causal=causal, window_size=window, return_lse=True)
        for i, keys in enumerate(wanted):
            want = torch.zeros(4)
            want[keys] = 1 / len(keys)
            assert torch.allclose(out[0, i, 0], want), (causal, window, i)
            assert abs(lse[0, 0, i].item() - torch.tensor(float(len(keys))).log().item()) < 1e-6
    out, lse = ops.flash_attn_func(k, q, v[:, :2], causal=True, return_lse=True)  # four queries, two keys
    assert (out[0, :2] == 0).all() and (lse[0, 0, :2] == float("-inf")).all()


def test_dense_layout_scale_and_extra_results() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 20, 4, 8), torch.randn(3, 33, 2, 8), torch.randn(3, 33, 2, 8)
    out, lse, nothing = ops.flash_attn_func(q, k, v, softmax_scale=-0.3, causal=True, return_attn_probs=True)
    assert lse.shape == (3, 4, 20) and nothing is None
    for b in range(3):
        one = (q[b].double(), k[b].double(), v[b].double(), cu([20]), cu([33]), None, None, -0.3, 0.0, -1, 0)
        want, want_lse = reference.attention(*one)
        assert relative_rmse(out[b], want) < 1e-6 and relative_rmse(lse[b], want_lse) < 1e-6


def test_strided_inputs_have_the_same_bits_and_gradients() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        qkv = torch.randn(2, 70, 3, 3, 24).to(dtype).requires_grad_()
        dout = torch.randn(2, 70, 3, 24).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        q, k, v = qkv.unbind(2)
        out = ops.flash_attn_func(q, k, v, causal=True)
        (grad,) = torch.autograd.grad(out, qkv, dout)
        copies = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (q, k, v)]
        out2 = ops.flash_attn_func(*copies, causal=True)
        grads = torch.autograd.grad(out2, copies, dout.contiguous())
        assert torch.equal(out, out2) and torch.equal(grad, torch.stack(grads, 2))
        wide = torch.randn(2, 24, 3, 70).to(dtype).transpose(1, 3)  # last dimension not dense
        assert torch.equal(ops.flash_attn_func(wide, k, v), ops.flash_attn_func(wide.contiguous(), k, v))


def test_large_and_extreme_scores_stay_finite() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 300, 1, 16) for _ in range(3))
    out, lse = ops.flash_attn_func(q * 1e4, k * 1e4, v, causal=True, return_lse=True)
    want, want_lse = ops.flash_attn_func(q.double() * 1e4, k.double() * 1e4, v.double(), causal=True, return_lse=True)
    assert torch.isfinite(out).all() and relative_rmse(lse, want_lse) < 1e-6
    # Products of 1e8 leave gaps of 8 between neighbouring fp32 scores; the winners are the same but for ties.
    assert (out - want).abs().amax(-1).gt(0.1).float().mean() < 0.02


@pytest.mark.parametrize("causal", [False, True])
def test_bf16_gradient_error_does_not_grow_with_the_length(causal: bool) -> None:
    errors = {}
    for length in (256, 4096):
        case = Case([length], [length], heads=1, head_dim=64, causal=causal, dtype=torch.bfloat16)
        case.dlse.zero_()
        ours, truth = case.results(case.public), case.results(case.formula(reference.attention), double=True)
        errors[length] = [relative_rmse(a, b) for a, b in zip(ours[2:], truth[2:])]
    assert all(e <= 3.5e-3 for e in errors[4096]), errors
    assert all(long <= 1.2 * short for short, long in zip(*errors.values())), errors


def test_fp16_and_autocast() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 50, 2, 16, dtype=torch.float16, requires_grad=True) for _ in range(3))
    out = ops.flash_attn_func(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), q)
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = ops.flash_attn_func(*doubles)
    (want_grad,) = torch.autograd.grad(want.sum(), doubles[0])
    assert out.dtype == grad.dtype == torch.float16
    assert relative_rmse(out, want) < 1e-3 and relative_rmse(grad, want_grad) < 2e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.flash_attn_func(q.float(), k.bfloat16(), v.float()).dtype == torch.bfloat16


def test_backends_agree() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 30, 4, 8), torch.randn(2, 45, 2, 8), torch.randn(2, 45, 2, 8)
    for kwargs in ({}, {"causal": True, "window_size": (9, 0)}, {"softcap": 2.0, "return_lse": True}):
        native = ops.flash_attn_func(q, k, v, **kwargs)
        for name in ("reference", "eager"):
            with ops.backend(name):
                other = ops.flash_attn_func(q, k, v, **kwargs)
            for a, b in zip(
                native if isinstance(native, tuple) else (native,), other if isinstance(other, tuple) else (other,)
            ):
                assert relative_rmse(a, b) < 1e-6, (name, kwargs)


def test_bad_arguments_are_named() -> None:
    q, k = torch.zeros(1, 4, 4, 8), torch.zeros(1, 6, 2, 8)
    wrong = [
        (ValueError, r"q: got shape", (q[0], k, k), {}),
        (ValueError, r"k: got shape", (q, k[..., :4], k), {}),
        (ValueError, r"v: got shape", (q, k, k[:, :3]), {}),
        (ValueError, r"k: got 3 heads", (q, torch.zeros(1, 6, 3, 8), torch.zeros(1, 6, 3, 8)), {}),
        (ValueError, r"q: got head dimension 257", (torch.zeros(1, 1, 1, 257),) * 3, {}),
        (TypeError, r"k: got dtype", (q, k.bfloat16(), k.bfloat16()), {}),
        (TypeError, r"q: got dtype int64", (q.long(), k, k), {}),
        (ValueError, r"dropout_p: got 0.1", (q, k, k), {"dropout_p": 0.1}),
        (NotImplementedError, r"alibi_slopes", (q, k, k), {"alibi_slopes": torch.zeros(4)}),
        (ValueError, r"window_size", (q, k, k), {"window_size": (-2, 0)}),
        (ValueError, r"softcap", (q, k, k), {"softcap": -1.0}),
        (ValueError, r"sinks: got shape", (q, k, k), {"sinks": torch.zeros(3)}),
    ]
    for error, match, args, kwargs in wrong:
        with pytest.raises(error, match=match):
            ops.flash_attn_func(*args, **kwargs)
    packed = (q[0], k[0], k[0])
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        ops.flash_attn_varlen_func(*packed, cu([3]), cu([6]), 4, 6)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        ops.flash_attn_varlen_func(*packed, cu([4]), cu([7]), 4, 6)
    with pytest.raises(ValueError, match="cu_seqlens_k: got shape"):
        ops.flash_attn_varlen_func(*packed, cu([4]), cu([3, 3]), 4, 6)
    with pytest.raises(TypeError, match="cu_seqlens_q: got dtype int64"):
        ops.flash_attn_varlen_func(*packed, cu([4]).long(), cu([6]), 4, 6)


def test_opcheck_and_compile() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        q = torch.randn(12, 4, 8).to(dtype).requires_grad_()
        k, v = (torch.randn(20, 2, 8).to(dtype).requires_grad_() for _ in range(2))
        sinks = torch.randn(4, requires_grad=True)
        args = (q, k, v, cu([5, 7]), cu([11, 9]), None, sinks, 0.3, 5.0, 6, 0)
        check_op(torch.ops.foldscan.attention, args)
        flags = {"causal": True, "return_lse": True}
        dense = (
            torch.randn(2, 5, 4, 8).to(dtype),
            torch.randn(2, 9, 2, 8).to(dtype),
            torch.randn(2, 9, 2, 8).to(dtype),
        )
        merged = (torch.randn(2, 3, 2, 4).to(dtype).requires_grad_(), torch.randn(2, 2, 3, requires_grad=True))
        check_op(
            torch.ops.foldscan.merge_attention,
            merged + merged,
            public=ops.flash_attn_func,
            public_args=dense,
            public_kwargs=flags,
        )
    packed = (q.detach(), k.detach(), v.detach(), cu([5, 7]), cu([11, 9]), 7, 11)
    compiled = torch.compile(ops.flash_attn_varlen_func, fullgraph=True, backend="aot_eager")(*packed, causal=True)
    assert torch.equal(compiled, ops.flash_attn_varlen_func(*packed, causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = ((2, 5, 3, 20), (2, 3, 5)) * 2
    inputs = [torch.randn(s) * (3 if len(s) == 3 else 1) for s in shapes]
    inputs[0], inputs[2] = inputs[0].to(dtype), inputs[2].to(dtype)
    inputs[1][0, 0, :3] = float("-inf")  # a empty
    inputs[3][0, 0, 1:4] = float("-inf")  # both empty at 1 and 2, b empty at 3
    for i, j in ((0, 1), (2, 3)):
        inputs[i] *= torch.isfinite(inputs[j]).transpose(1, 2)[..., None]
    dout, dlse = torch.randn(2, 5, 3, 20).to(dtype), torch.randn(2, 3, 5)

    def results(double: bool, fn: object) -> list[torch.Tensor]:
        leaves = [(t.double() if double else t).clone().requires_grad_() for t in inputs]
        out, lse = fn(*leaves)  # type: ignore[operator]
        keep = torch.isfinite(lse)
        grads = torch.autograd.grad([out, lse], leaves, [dout.to(out.dtype), (dlse * keep).to(lse.dtype)])
        return [out.detach(), lse.detach(), *grads]

    ours = results(False, ops.merge_attention)
    truth, eager = (results(double, reference.merge_attention) for double in (True, False))
    assert (ours[0][0, 1:3, 0] == 0).all() and (ours[1][0, 0, 1:3] == float("-inf")).all()
    assert torch.equal(torch.isfinite(ours[1]), torch.isfinite(truth[1]))
    for got, want, base in zip(ours, truth, eager):
        assert_budget("merge", *(torch.nan_to_num(t, neginf=0.0) for t in (got, base, want)))
