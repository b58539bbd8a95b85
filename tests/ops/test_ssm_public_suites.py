"""Shapes of the public suites of mamba-ssm, causal-conv1d, vLLM, flash-linear-attention and ggml, against fp64.

The shapes and the oracles' roles are theirs; the bounds are ours, an error budget instead of a tolerance.
"""

from __future__ import annotations

import pytest
import torch
from foldscan import ops
from foldscan.reference import ssm as reference
from helpers import assert_budget, assert_close_to_truth
from test_scan import check, make_inputs


@pytest.mark.parametrize("heads", [3, 4, 11, 16, 32])
@pytest.mark.parametrize("size", [5, 8, 19, 32, 128])
def test_vllm_single(heads: int, size: int) -> None:
    """P = N of every kind, one group, no chunk of ours divides the length."""
    length = 119 if size < 128 and heads < 32 else 66
    check(make_inputs(1, length, heads, size, 1, size, D="none", z=False, bias=False))


# (state, channels, heads, groups, tokens, sequences)
GGML = [(16, 1, 64, 1, 32, 4), (128, 64, 16, 2, 32, 4), (256, 64, 8, 2, 32, 4), (128, 128, 4, 4, 16, 2)]


@pytest.mark.parametrize("case", [*GGML, (128, 80, 8, 1, 256, 1), (128, 64, 16, 8, 130, 2)])
def test_ggml_ssm_scan(case: tuple[int, ...]) -> None:
    state, channels, heads, groups, tokens, sequences = case
    check(make_inputs(sequences, tokens, heads, channels, groups, state, D="none", z=False, initial=sequences))


@pytest.mark.parametrize("case", [(1, 63, 1, 64), (2, 130, 3, 60), (1, 70, 4, 128), (1, 128, 8, 64)])
def test_flash_linear_attention_simple_gla(case: tuple[int, ...]) -> None:
    """The same recurrence with B and C per head, initial states and the gradient of the final ones."""
    batch, length, heads, size = case
    check(make_inputs(batch, length, heads, size, heads, size, D="none", z=False, bias=False, initial=batch))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_mamba_states_of_many_sequences(groups: int) -> None:
    """chunk_state_varlen: forty sequences of 1 to 199 tokens; each state is that of the sequence by itself."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 200, (40,))
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    inputs = make_inputs(1, int(cu[-1]), 8, 64, groups, 32, D="none", z=False)
    options = {"dt_softplus": True, "return_final_states": True}
    together = ops.mamba_chunk_scan_combined(**inputs, cu_seqlens=cu, **options)
    for i in (0, 7, 39):
        part = slice(int(cu[i]), int(cu[i + 1]))
        alone = {k: v[:, part] if v is not None and v.dim() > 2 else v for k, v in inputs.items()}
        out, state = ops.mamba_chunk_scan_combined(**alone, **options)
        assert torch.equal(out, together[0][:, part]) and torch.equal(state[0], together[1][i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("length", [1, 2, 8, 16, 32, 64, 128, 129, 130, 151, 256, 372, 512, 1134])
def test_causal_conv1d_lengths(length: int, last: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(length)
    x = torch.randn(2, length, 64).transpose(1, 2) if last else torch.randn(2, 64, length)
    for width in (2, 3, 4):
        weight, bias = torch.randn(64, width), torch.randn(64)
        assert_close_to_truth(
            lambda x, w, b: ops.causal_conv1d_fn(x, w, b, activation="silu"),
            lambda x, w, b: reference.causal_conv1d(x, w, b, None, None, "silu", None),
            [x.to(dtype), weight, bias],
            torch.randn(2, 64, length).to(dtype),
        )


@pytest.mark.parametrize("last", [True, False])
def test_causal_conv1d_wide(last: bool) -> None:
    """4,128 channels: more than a tile, not a power of two; gradients bit for bit the same every time."""
    torch.manual_seed(0)
    x = torch.randn(2, 151, 4128).transpose(1, 2) if last else torch.randn(2, 4128, 151)
    weight, bias = torch.randn(4128, 4), torch.randn(4128)

    def run() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out = ops.causal_conv1d_fn(*leaves, activation="silu")
        out.backward(torch.ones_like(out))
        return [out.detach(), *(t.grad for t in leaves)]

    first = run()
    truth = reference.causal_conv1d(x.double(), weight.double(), bias.double(), None, None, "silu", None)
    eager = reference.causal_conv1d(x, weight, bias, None, None, "silu", None)
    assert_budget("out", first[0], eager, truth)
    assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.parametrize("dim", [2048, 2064, 4096])
@pytest.mark.parametrize("state", [16, 32, 64])
def test_mamba_selective_state_update(dim: int, state: int) -> None:
    torch.manual_seed(0)
    inputs = {
        "state": torch.randn(2, dim, state),
        "x": torch.randn(2, dim),
        "dt": torch.randn(2, dim),
        "A": -torch.rand(dim, state) - 1.0,
        "B": torch.randn(2, state),
        "C": torch.randn(2, state),
        "D": torch.randn(dim),
        "z": torch.randn(2, dim),
        "dt_bias": torch.rand(dim) - 4.0,
    }
    results = []
    for dtype, backend in ((torch.float32, "native"), (torch.float64, "reference"), (torch.float32, "reference")):
        own = {k: v.to(dtype).clone() for k, v in inputs.items()}
        with ops.backend(backend):
            results.append((ops.selective_state_update(**own, dt_softplus=True), own["state"]))
    for name, got, truth, eager in zip(("out", "state"), *results):
        assert_budget(name, got, eager, truth)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("group", [64, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mamba_layernorm_gated(group: int, before: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, z, grad = (torch.randn(48, 2048).to(dtype) for _ in range(3))
    assert_close_to_truth(
        lambda x, w, z: ops.rmsnorm_fn(x, w, None, z, 1e-5, group, before),
        lambda x, w, z: reference.rmsnorm(x, w, None, z, 1e-5, group, before),
        [x, torch.randn(2048), z],
        grad,
    )
