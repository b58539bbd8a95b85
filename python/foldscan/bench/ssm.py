"""Cases of the state-space family: scan, convolution, decode step, gated norm."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from foldscan import ops
from foldscan.bench.case import OURS, Case, Peer, compiled
from foldscan.reference import eager_ssm

UNLIMITED = (0.0, float("inf"))


def _scan_inputs(t: int, h: int, p: int, n: int, g: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": torch.randn(1, t, h, p).to(dtype),
        "dt": torch.randn(1, t, h) - 3.0,
        "A": -torch.rand(h) * 4 - 0.1,
        "B": torch.randn(1, t, g, n).to(dtype),
        "C": torch.randn(1, t, g, n).to(dtype),
        "D": torch.randn(h),
    }


def _ours_scan(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> torch.Tensor:
    return ops.mamba_chunk_scan_combined(x, dt, A, B, C, D=D, dt_softplus=True)  # type: ignore[return-value]


def _eager_scan(chunk: int, passing: str, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> torch.Tensor:
    return eager_ssm.chunk_scan(x, dt, A, B, C, D, None, None, None, None, True, UNLIMITED, chunk, passing)


def _hugging_face_scan(chunk: int, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> torch.Tensor:
    """The scan part of the mixers of transformers."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(x, dt, A, B, C, chunk, D=D, dt_softplus=True)[0].to(x.dtype)


def _scan(t: int, h: int, *_: int) -> dict[str, Peer]:
    chunks = [c for c in (64, 128, 256) if c <= t]
    ways = [(c, passing) for c in chunks for passing in ("loop", "matmul")]
    if t > 2048:  # seconds a call: only the ways that were fastest at 2048
        chunks, ways = [128], [(64, "loop")]
    found: dict[str, Peer] = {
        OURS: _ours_scan,
        "transformers": {f"chunk {c}": functools.partial(_hugging_face_scan, c) for c in chunks if c >= 128},
        "torch chunked matmuls": {f"chunk {c}, {p}": functools.partial(_eager_scan, c, p) for c, p in ways},
    }
    if t == 2048:  # half a minute of compilation each
        found["torch chunked, compiled"] = {"chunk 64": compiled(functools.partial(_eager_scan, 64, "matmul"))}
    return found


def _scan_flops(t: int, h: int, p: int, n: int, g: int) -> float:
    return t * (h * p * (4 * n + 64) + g * n * 64)


def _scan_bytes(t: int, h: int, p: int, n: int, g: int, element: int) -> float:
    return element * t * (2 * h * p + 2 * g * n) + 4 * t * h


def _pruned_inputs(t: int, h: int, p: int, n: int, g: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"pruned": _scan_inputs(t, h, p, n, g, dtype), "whole": _scan_inputs(t, h, 64, n, g, dtype)}


def _pruned(*_: int) -> dict[str, Peer]:
    return {
        OURS: lambda pruned, whole: _ours_scan(**pruned),
        "foldscan at P=64": lambda pruned, whole: _ours_scan(**whole),
    }


def _pruned_work(name: str, t: int, h: int, p: int, n: int, g: int) -> float:
    return 1.0 if name == OURS else _scan_flops(t, h, 64, n, g) / _scan_flops(t, h, p, n, g)


def _conv_inputs(t: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": torch.randn(1, t, d).to(dtype).transpose(1, 2),
        "weight": torch.randn(d, 4).to(dtype),
        "bias": torch.randn(d).to(dtype),
    }


def _conv(t: int, d: int) -> dict[str, Peer]:
    def torch_last(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=d)[..., :t])

    def torch_first(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return torch_last(x.contiguous(), weight, bias)

    return {
        OURS: lambda x, weight, bias: ops.causal_conv1d_fn(x, weight, bias, activation="silu"),
        "torch conv1d": {"channels last": torch_last, "channels first": torch_first},
    }


def _step_inputs(b: int, h: int, p: int, n: int, g: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "state": torch.randn(b, h, p, n),
        "x": torch.randn(b, h, p).to(dtype),
        "dt": torch.randn(b, h),
        "A": -torch.rand(h) - 0.1,
        "B": torch.randn(b, g, n).to(dtype),
        "C": torch.randn(b, g, n).to(dtype),
        "D": torch.randn(h),
    }


def _step(*_: int) -> dict[str, Peer]:
    def wide(state: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, D: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p, n = state.shape[2:]
        return dt[..., None].expand(-1, -1, p), A[:, None, None].expand(-1, p, n), D[:, None].expand(-1, p)

    def ours(state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> torch.Tensor:
        dt, A, D = wide(state, dt, A, D)
        return ops.selective_state_update(state, x, dt, A, B, C, D=D, dt_softplus=True)

    def hugging_face(state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> torch.Tensor:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

        dt, A, D = wide(state, dt, A, D)
        return mamba2_selective_state_update(state, x, dt, A, B, C, D=D, dt_softplus=True)

    return {OURS: ours, "transformers": hugging_face}


def _norm_inputs(t: int, d: int, groups: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"x": torch.randn(t, d).to(dtype), "weight": torch.randn(d), "z": torch.randn(t, d).to(dtype)}


def _norm(t: int, d: int, groups: int) -> dict[str, Peer]:
    def eager(x: Any, weight: Any, z: Any) -> torch.Tensor:
        return eager_ssm.rmsnorm(x, weight, None, z, 1e-5, d // groups, False)

    return {
        OURS: lambda x, weight, z: ops.rmsnorm_fn(x, weight, None, z, 1e-5, d // groups, False),
        "torch eager": eager,
        "torch compiled": compiled(eager),
    }


CASES = [
    Case(
        "scan",
        ("T", "H", "P", "N", "G"),
        [
            (2048, 24, 64, 128, 1),
            (2048, 128, 64, 128, 8),
            *((t, h, 64, 128, g) for t in (512, 8192) for h, g in ((24, 1), (128, 8))),
        ],
        _scan_inputs,
        _scan,
        _scan_flops,
        _scan_bytes,
        backward_flops=2048 / 576,  # (HP (14 N + 4 Q) + 4 G N Q) over the forward's HP (4 N + Q) + G N Q, at N = 128
        headline=2,
    ),
    Case(
        "scan_pruned",
        ("T", "H", "P", "N", "G"),
        [*((2048, 112, p, 128, 8) for p in (48, 56, 60, 62, 80)), (2048, 96, 64, 128, 8), (2048, 96, 80, 128, 8)],
        _pruned_inputs,
        _pruned,
        _scan_flops,
        _scan_bytes,
        modes=("fwd",),
        work=_pruned_work,
        headline=0,
    ),
    Case(
        "causal_conv1d",
        ("T", "D"),
        [(2048, 4096), (2048, 10240)],
        _conv_inputs,
        _conv,
        lambda t, d: 8 * t * d,
        lambda t, d, element: 2 * element * t * d,
        backward_bytes=2.5,
    ),
    Case(
        "selective_state_update",
        ("B", "H", "P", "N", "G"),
        [(1, 128, 64, 128, 8), (16, 128, 64, 128, 8), (64, 128, 64, 128, 8), (64, 24, 64, 128, 1)],
        _step_inputs,
        _step,
        lambda b, h, p, n, g: 5 * b * h * p * n,
        lambda b, h, p, n, g, element: b * (8 * h * p * n + element * (2 * h * p + 2 * g * n)),
        modes=("fwd",),
        updates_inputs=True,
    ),
    Case(
        "rmsnorm_gated",
        ("T", "D", "groups"),
        [(2048, 4096, 8), (2048, 8192, 8)],
        _norm_inputs,
        _norm,
        lambda t, d, g: 6 * t * d,
        lambda t, d, g, element: 3 * element * t * d,
        backward_bytes=8 / 3,
    ),
]
