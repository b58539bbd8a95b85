"""The Mamba-2 scan: fp64 recurrence, every gradient, packing, splitting, decoding, bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foldscan import ops
from foldscan.reference import ssm as reference
from helpers import assert_budget, check_op, relative_rmse
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"]


def make_inputs(
    batch: int,
    length: int,
    heads: int,
    channels: int,
    groups: int,
    state: int,
    *,
    dtype: torch.dtype = torch.float32,
    D: str = "channel",
    z: bool = True,
    bias: bool = True,
    initial: int = 0,
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(seed)
    return {
        "x": torch.randn(batch, length, heads, channels).to(dtype),
        "dt": torch.randn(batch, length, heads),
        # Some heads forget within a few tokens, others carry their state through several chunks.
        "A": -torch.exp(torch.linspace(-7, 1, heads)[torch.randperm(heads)]),
        "B": torch.randn(batch, length, groups, state).to(dtype),
        "C": torch.randn(batch, length, groups, state).to(dtype),
        "D": {"none": None, "head": torch.randn(heads), "channel": torch.randn(heads, channels)}[D],
        "z": torch.randn(batch, length, heads, channels).to(dtype) if z else None,
        "dt_bias": torch.randn(heads) if bias else None,
        "initial_states": torch.randn(initial, heads, channels, state) if initial else None,
    }


def ours(inputs: dict[str, Any], **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"dt_softplus": True, "return_final_states": True, **kwargs}
    return ops.mamba_chunk_scan_combined(**inputs, **options)  # type: ignore[return-value]


def oracle(inputs: dict[str, Any], **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.chunk_scan(**inputs, **{"dt_softplus": True, **kwargs})


def with_gradients(fn: Any, inputs: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
    leaves = {k: None if v is None else v.clone().requires_grad_() for k, v in inputs.items()}
    out, states = fn(leaves, **kwargs)
    gen = torch.Generator().manual_seed(7)
    loss = (out * torch.randn(out.shape, generator=gen).to(out.dtype)).sum()
    loss = loss + (states * torch.randn(states.shape, generator=gen).to(states.dtype)).sum()
    loss.backward()
    result = {"out": out.detach(), "states": states.detach()}
    return result | {f"d{k}": v.grad for k, v in leaves.items() if v is not None}


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v is None else v.double() for k, v in inputs.items()}


def check(inputs: dict[str, Any], **kwargs: Any) -> None:
    truth = with_gradients(oracle, double(inputs), **kwargs)
    eager = with_gradients(oracle, inputs, **kwargs)
    got = with_gradients(ours, inputs, **kwargs)
    for name, value in truth.items():
        floors = 4.0 if name in ("dA", "dD", "ddt_bias") else 1.0  # one number a head, summed over all tokens
        assert_budget(name, got[name], eager[name], value, products=inputs["x"].dtype, floors=floors)
        if got[name].dtype == torch.float32 and inputs["x"].dtype == torch.float32:
            assert relative_rmse(got[name], value) < 1e-5, name


SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 63, 2, 8, 1, 5),
    (1, 64, 4, 17, 2, 16),
    (1, 65, 3, 56, 3, 7),
    (1, 130, 4, 64, 1, 33),
    (1, 97, 5, 5, 1, 32),
    (1, 70, 20, 8, 2, 9),  # blocks of five heads: one more than lie side by side
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_recurrence(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make_inputs(*shape, dtype=dtype, initial=shape[0]))


@pytest.mark.parametrize("options", [{"D": "none"}, {"D": "head"}, {"z": False}, {"bias": False}, {"initial": 1}])
def test_optional_arguments(options: dict[str, Any]) -> None:
    check(make_inputs(1, 70, 4, 12, 2, 9, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences(dtype: torch.dtype) -> None:
    """Lengths around a chunk, an empty sequence, states in and out of each."""
    cu = torch.tensor([0, 1, 64, 64, 129, 131], dtype=torch.int32)
    check(make_inputs(1, 131, 3, 10, 1, 12, dtype=dtype, initial=5), cu_seqlens=cu)


def test_seq_idx() -> None:
    ids = torch.tensor([[0] * 5 + [1] * 70 + [4] * 5, [2] * 80], dtype=torch.int32)
    check(make_inputs(2, 80, 2, 6, 1, 5, initial=2), seq_idx=ids)


def test_time_step_limits_and_extremes() -> None:
    inputs = make_inputs(1, 90, 4, 6, 1, 5)
    check(inputs, dt_limit=(0.3, 1.1))
    check(inputs, dt_softplus=False, dt_limit=(0.01, 0.9))
    inputs["dt"][:, ::3] = -20.0
    inputs["dt"][:, 1::5] = 30.0
    inputs["A"] = torch.tensor([-1e-6, -1e3, -1.0, -16.0])
    check(inputs)


def test_tiny_time_steps_keep_their_digits() -> None:
    """One token a row, everything 1: the output is softplus(dt), which log(1 + exp(dt)) loses below -16."""
    dt = torch.tensor([-20.0, -16.0, -12.0, -3.0, 0.0, 30.0])
    one = torch.ones(len(dt), 1, 1, 1)
    got = ops.mamba_chunk_scan_combined(one, dt[:, None, None], -torch.ones(1), one, one, dt_softplus=True)
    want = torch.log1p(torch.exp(dt.double()))
    torch.testing.assert_close(got.flatten().double(), want, rtol=1e-6, atol=0)


def test_views_of_one_projection() -> None:
    """x, B, C as slices of one tensor, as a model makes them, and a transposed batch."""
    torch.manual_seed(0)
    packed = torch.randn(2, 70, 4 * 8 + 2 * 6)
    x, B, C = packed.split([32, 6, 6], dim=-1)
    dt, A = torch.randn(70, 2, 4).transpose(0, 1), -torch.rand(4)
    args = (x.unflatten(-1, (4, 8)), dt, A, B[:, :, None], C[:, :, None])
    got = ops.mamba_chunk_scan_combined(*args)
    want, _ = reference.chunk_scan(*[a.double() for a in args])
    assert_budget("out", got, want, want)


def test_bits_do_not_depend_on_threads_chunks_packing_or_batch() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        i = make_inputs(1, 200, 6, 20, 2, 24, dtype=dtype)
        full = with_gradients(ours, i)
        torch.set_num_threads(1)
        single = with_gradients(ours, i)
        torch.set_num_threads(2)
        for name, value in full.items():
            assert torch.equal(value, single[name]), name
        for chunk in (8, 17, 256):
            assert torch.equal(full["out"], ours(i, chunk_size=chunk)[0])
        # Packed behind another sequence, and in a batch.
        token = ("x", "dt", "B", "C", "z")
        packed = {k: torch.cat([v[:, :77], v], 1) if k in token else v for k, v in i.items()}
        cu = torch.tensor([0, 77, 277], dtype=torch.int32)
        out, states = ours(packed, cu_seqlens=cu)
        assert torch.equal(out[:, 77:], full["out"]) and torch.equal(states[1:], full["states"])
        batch = {k: torch.cat([v.flip(1), v]) if k in token else v for k, v in i.items()}
        assert torch.equal(ours(batch)[0][1:], full["out"])


def test_head_permutation_within_groups() -> None:
    i = make_inputs(1, 80, 6, 5, 2, 7)
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    moved = {k: v[:, :, order] if k in ("x", "dt", "z") else v for k, v in i.items()}
    moved |= {k: i[k][order] for k in ("A", "D", "dt_bias")}
    assert torch.equal(ours(moved)[0], ours(i)[0][:, :, order])
    swapped = torch.tensor([3, 1, 2, 0, 4, 5])
    moved = {k: v[:, :, swapped] if k in ("x", "dt", "z") else v for k, v in i.items()}
    moved |= {k: i[k][swapped] for k in ("A", "D", "dt_bias")}
    assert not torch.allclose(ours(moved)[0], ours(i)[0][:, :, swapped])


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 100])
def test_split_and_carry_equals_whole(cut: int) -> None:
    i = make_inputs(1, 130, 3, 8, 1, 9)
    token = ("x", "dt", "B", "C", "z")
    whole, final = ours(i)
    first, state = ours({k: v[:, :cut] if k in token else v for k, v in i.items()})
    rest = {k: v[:, cut:] if k in token else v for k, v in i.items()} | {"initial_states": state}
    second, last = ours(rest)
    assert_budget("out", torch.cat([first, second], 1), whole, whole.double())
    assert_budget("states", last, final, final.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_extension_has_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    """Two sequences in odd slots: prefill, pieces and single tokens, mixed, against the uncached scan."""
    lengths = [200, 131]
    i = make_inputs(1, sum(lengths), 4, 20, 2, 9, dtype=dtype)
    cu = torch.tensor([0, 200, 331], dtype=torch.int32)
    want, _ = ours(i, cu_seqlens=cu)
    cache = ops.ScanCache.empty(3, 4, 20, 2, 9, dtype)
    for t in (cache.state, cache.x, cache.B, cache.dt):
        t.fill_(float("nan"))  # a fresh sequence must not read what the slot held
    slots = torch.tensor([2, 0], dtype=torch.int32)
    pieces = [(7, 64), (56, 1), (1, 65), (1, 0), (0, 1), (64, 0), (1, 0), (1, 0), (69, 0)]
    assert [sum(p[k] for p in pieces) for k in (0, 1)] == lengths
    position, starts = [0, 0], [0, 200]
    for counts in pieces:
        index = torch.cat([torch.arange(starts[k] + position[k], starts[k] + position[k] + counts[k]) for k in (0, 1)])
        got = ops.mamba_chunk_scan_extend(
            *(i[k][0, index] if k in ("x", "dt", "B", "C") else i[k] for k in ("x", "dt", "A", "B", "C")),
            cache,
            slots,
            torch.tensor(position, dtype=torch.int32),
            torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32),
            D=i["D"],
            z=i["z"][0, index],
            dt_bias=i["dt_bias"],
            dt_softplus=True,
        )
        assert torch.equal(got, want[0, index]), f"piece {counts} at {position}"
        position = [p + c for p, c in zip(position, counts)]


def test_cached_extension_reference_agrees() -> None:
    i = make_inputs(1, 150, 2, 6, 1, 5, z=False)
    args = {k: i[k] for k in ("x", "dt", "B", "C")}
    outs = {}
    for name in ("native", "reference"):
        cache = ops.ScanCache.empty(1, 2, 6, 1, 5, torch.float32)
        with ops.backend(name):
            pieces = []
            for begin, end in ((0, 70), (70, 71), (71, 150)):
                x, dt, B, C = (args[k][0, begin:end] for k in ("x", "dt", "B", "C"))
                at = [torch.tensor(v, dtype=torch.int32) for v in ([0], [begin], [0, end - begin])]
                pieces.append(ops.mamba_chunk_scan_extend(x, dt, i["A"], B, C, cache, *at, D=i["D"], dt_softplus=True))
        outs[name] = torch.cat(pieces)
    assert_budget("out", outs["native"], outs["reference"], outs["reference"].double())


def test_eager_voice_agrees() -> None:
    i = make_inputs(1, 150, 4, 6, 2, 5)
    cu = torch.tensor([0, 3, 70, 150], dtype=torch.int32)
    want, _ = oracle(double(i), cu_seqlens=cu)
    with ops.backend("eager"):
        got = ops.mamba_chunk_scan_combined(**i, cu_seqlens=cu, dt_softplus=True)
    assert_budget("out", got, want, want, 10.0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_fuzz(data: st.DataObject) -> None:
    draw = data.draw
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 70), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    # A relative RMSE over a handful of bf16 numbers measures cancellation, not the kernel.
    smallest = 1 if dtype == torch.float32 else 8
    inputs = make_inputs(
        1,
        sum(lengths),
        groups * per_group,
        draw(st.integers(smallest, 20)),
        groups,
        draw(st.integers(smallest, 20)),
        dtype=dtype,
        D=draw(st.sampled_from(["none", "head", "channel"])),
        z=draw(st.booleans()),
        bias=draw(st.booleans()),
        initial=len(lengths) if draw(st.booleans()) else 0,
        seed=draw(st.integers(0, 99)),
    )
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    if sum(lengths):
        check(inputs, cu_seqlens=cu)
    else:
        assert ours(inputs, cu_seqlens=cu)[0].shape == inputs["x"].shape


def test_gradcheck() -> None:
    i = double(make_inputs(1, 3, 2, 2, 1, 2, initial=1))
    names = [k for k in NAMES if i[k] is not None]

    def fn(*leaves: torch.Tensor) -> Any:
        return ours(dict(zip(names, leaves)))

    assert torch.autograd.gradcheck(fn, [i[k].requires_grad_() for k in names])


def test_opcheck_and_compile() -> None:
    i = make_inputs(1, 70, 2, 4, 1, 3, initial=2)
    leaves = {k: v.requires_grad_() for k, v in i.items()}
    cu = torch.tensor([0, 3, 70], dtype=torch.int32)
    args = (*(leaves[k] for k in NAMES[:5]), leaves["D"], leaves["z"], leaves["dt_bias"], leaves["initial_states"])
    check_op(
        torch.ops.foldscan.scan,
        (*args, None, cu, True, 0.0, 1e9, True),
        public=ops.mamba_chunk_scan_combined,
        public_args=(),
        public_kwargs={**leaves, "cu_seqlens": cu, "dt_softplus": True, "return_final_states": True},
    )
    cache = ops.ScanCache.empty(1, 2, 4, 1, 3, torch.float32)
    at = [torch.tensor(v, dtype=torch.int32) for v in ([0], [0], [0, 70])]
    tensors = [t.detach()[0] if t.dim() == 4 else t.detach() for t in (i["x"], i["dt"][0], i["A"], i["B"], i["C"])]
    state = (cache.state, cache.x, cache.B, cache.dt)
    check_op(torch.ops.foldscan.scan_extend, (*tensors, None, None, None, True, 0.0, 1e9, *state, *at))


def test_bad_arguments_are_named() -> None:
    i = make_inputs(1, 4, 2, 3, 1, 5)
    for name, bad, message in [
        ("dt", torch.zeros(1, 4, 3), r"dt: got shape \(1, 4, 3\), want \(1, 4, 2\)"),
        ("B", torch.zeros(1, 4, 3, 5), "B: got 3 groups"),
        ("D", torch.zeros(3), "D: got shape"),
        ("A", torch.zeros(3), "A: got shape"),
        ("initial_states", torch.zeros(1, 2, 3, 4), "initial_states: got shape"),
    ]:
        extra = {"C": bad} if name == "B" else {}
        with pytest.raises(ValueError, match=message):
            ours(i | {name: bad} | extra)
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        ours(i, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(TypeError, match="z: got dtype"):
        ours(i | {"z": i["z"].bfloat16()})


def test_memory_of_a_large_layer() -> None:
    """Nemotron-H-8B's layer shape at 2048 tokens: the forward pass keeps nothing of size T x state."""
    import resource

    i = make_inputs(1, 2048, 128, 64, 8, 128, dtype=torch.bfloat16, z=False)
    ours({k: v if v is None or v.dim() < 3 else v[:, :64] for k, v in i.items()})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = ops.mamba_chunk_scan_combined(**i, dt_softplus=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - out.numel() * 2 / 2**20
    assert grown < 64, f"{grown:.0f} MB beside the output"
