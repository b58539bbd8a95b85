"""What is measured: for each op its shapes, inputs, implementations, FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from foldscan import ops
from foldscan.reference import eager_moe, eager_ssm

Implementation = Callable[..., torch.Tensor]


@dataclass
class Case:
    """One op. ``flops`` and ``bytes`` are of the forward pass, ``backward_flops`` is both passes over that."""

    op: str
    dims: tuple[str, ...]
    shapes: list[tuple[int, ...]]
    inputs: Callable[..., dict[str, Any]]
    implementations: Callable[..., dict[str, Implementation]]
    flops: Callable[..., float]
    bytes: Callable[..., float]
    modes: tuple[str, ...] = ("fwd", "fwd+bwd")
    backward_flops: float = 3.0


def _linear_inputs(m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"x": torch.randn(m, k).to(dtype), "weight": torch.randn(n, k).to(dtype)}


def _linear(*_: int) -> dict[str, Implementation]:
    return {"foldscan": lambda x, weight: ops.linear(x, weight), "torch": lambda x, weight: F.linear(x, weight)}


def _scan_inputs(t: int, h: int, p: int, n: int, g: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": torch.randn(1, t, h, p).to(dtype),
        "dt": torch.randn(1, t, h),
        "A": -torch.rand(h) * 4 - 0.1,
        "B": torch.randn(1, t, g, n).to(dtype),
        "C": torch.randn(1, t, g, n).to(dtype),
        "D": torch.randn(h),
    }


def _scan(*_: int) -> dict[str, Implementation]:
    def eager(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> torch.Tensor:
        return eager_ssm.chunk_scan(x, dt, A, B, C, D, None, None, None, None, True, (0.0, float("inf")))

    def ours(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> torch.Tensor:
        return ops.mamba_chunk_scan_combined(x, dt, A, B, C, D=D, dt_softplus=True)  # type: ignore[return-value]

    return {"foldscan": ours, "torch chunked matmuls": eager}


def _scan_flops(t: int, h: int, p: int, n: int, g: int) -> float:
    return t * (h * p * (4 * n + 64) + g * n * 64)


def _conv_inputs(t: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": torch.randn(1, t, d).to(dtype).transpose(1, 2),
        "weight": torch.randn(d, 4).to(dtype),
        "bias": torch.randn(d).to(dtype),
    }


def _conv(t: int, d: int) -> dict[str, Implementation]:
    def torch_last(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=d)[..., :t])

    def torch_first(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return torch_last(x.contiguous(), weight, bias)

    return {
        "foldscan": lambda x, weight, bias: ops.causal_conv1d_fn(x, weight, bias, activation="silu"),
        "torch conv1d, channels last": torch_last,
        "torch conv1d, channels first": torch_first,
    }


def _norm_inputs(t: int, d: int, groups: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"x": torch.randn(t, d).to(dtype), "weight": torch.randn(d), "z": torch.randn(t, d).to(dtype)}


def _norm(t: int, d: int, groups: int) -> dict[str, Implementation]:
    size = d // groups
    return {
        "foldscan": lambda x, weight, z: ops.rmsnorm_fn(x, weight, None, z, 1e-5, size, False),
        "torch eager": lambda x, weight, z: eager_ssm.rmsnorm(x, weight, None, z, 1e-5, size, False),
    }


def _attention_inputs(t: int, hq: int, hk: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    return {k: torch.randn(1, t, h, d).to(dtype) for k, h in (("q", hq), ("k", hk), ("v", hk))}


def _attention(*_: int) -> dict[str, Implementation]:
    def sdpa(q: Any, k: Any, v: Any) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return {"foldscan": lambda q, k, v: ops.flash_attn_func(q, k, v, causal=True), "torch SDPA": sdpa}


def _moe_inputs(t: int, h: int, f: int, e: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    probs, experts = torch.randn(t, e).softmax(-1).topk(k)
    return {
        "tokens": torch.randn(t, h).to(dtype),
        "probs": probs,
        "experts": experts.int(),
        "w_up": (torch.randn(e, f, h) * h**-0.5).to(dtype),
        "w_gate": (torch.randn(e, f, h) * h**-0.5).to(dtype),
        "w_down": (torch.randn(e, h, f) * f**-0.5).to(dtype),
    }


def _moe(*_: int) -> dict[str, Implementation]:
    def ours(tokens: Any, probs: Any, experts: Any, w_up: Any, w_gate: Any, w_down: Any) -> torch.Tensor:
        return ops.moe_mlp(tokens, probs, experts, w_up, w_down, w_gate=w_gate, activation="silu")

    def loop(tokens: Any, probs: Any, experts: Any, w_up: Any, w_gate: Any, w_down: Any) -> torch.Tensor:
        return eager_moe.moe_mlp(tokens, probs, experts, w_up, w_down, w_gate=w_gate, activation="silu")

    return {"foldscan": ours, "torch expert loop": loop}


def _loss_inputs(n: int, h: int, v: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden": torch.randn(n, h).to(dtype),
        "weight": (torch.randn(v, h) * h**-0.5).to(dtype),
        "targets": torch.randint(v, (n,)),
    }


def _loss(*_: int) -> dict[str, Implementation]:
    return {
        "foldscan": lambda hidden, weight, targets: ops.linear_cross_entropy(hidden, weight, targets),
        "torch cross_entropy(linear)": lambda hidden, weight, targets: F.cross_entropy(
            F.linear(hidden, weight).float(), targets
        ),
    }


CASES = [
    Case(
        "linear",
        ("M", "N", "K"),
        [(2048, 2048, 1024), (1, 4096, 4096)],
        _linear_inputs,
        _linear,
        lambda m, n, k: 2 * m * n * k,
        lambda m, n, k, element: element * (m * k + n * k + m * n),
    ),
    Case(
        "scan",
        ("T", "H", "P", "N", "G"),
        [(2048, 24, 64, 128, 1), (512, 128, 64, 128, 8), (2048, 24, 56, 128, 1)],
        _scan_inputs,
        _scan,
        _scan_flops,
        lambda t, h, p, n, g, element: element * t * (2 * h * p + 2 * g * n) + 4 * t * h,
        backward_flops=3.6,
    ),
    Case(
        "causal_conv1d",
        ("T", "D"),
        [(2048, 4096)],
        _conv_inputs,
        _conv,
        lambda t, d: 8 * t * d,
        lambda t, d, element: 2 * element * t * d,
    ),
    Case(
        "rmsnorm_gated",
        ("T", "D", "groups"),
        [(2048, 4096, 8)],
        _norm_inputs,
        _norm,
        lambda t, d, g: 6 * t * d,
        lambda t, d, g, element: 3 * element * t * d,
    ),
    Case(
        "attention_causal",
        ("T", "Hq", "Hkv", "D"),
        [(2048, 8, 8, 64), (1024, 32, 8, 128)],
        _attention_inputs,
        _attention,
        lambda t, hq, hk, d: 2 * t * t * hq * d,
        lambda t, hq, hk, d, element: 2 * element * t * d * (hq + hk),
        backward_flops=3.5,
    ),
    Case(
        "moe_mlp",
        ("T", "H", "F", "E", "k"),
        [(2048, 1024, 384, 64, 8), (1, 1024, 384, 64, 8)],
        _moe_inputs,
        _moe,
        lambda t, h, f, e, k: 6 * t * k * h * f,
        lambda t, h, f, e, k, element: element * (2 * t * h + 3 * min(e, t * k) * h * f),
    ),
    Case(
        "linear_cross_entropy",
        ("N", "H", "V"),
        [(2048, 512, 32000)],
        _loss_inputs,
        _loss,
        lambda n, h, v: 2 * n * h * v,
        lambda n, h, v, element: element * (n * h + v * h),
        backward_flops=4.0,
    ),
]
