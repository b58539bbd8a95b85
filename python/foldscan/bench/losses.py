"""Cases of the fused losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from foldscan import ops
from foldscan.bench.case import OURS, Case, Peer


def _inputs(n: int, h: int, v: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden": torch.randn(n, h).to(dtype),
        "weight": (torch.randn(v, h) * h**-0.5).to(dtype),
        "targets": torch.randint(v, (n,)),
    }


def _cross_entropy(hidden: Any, weight: Any, targets: Any, **options: Any) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, **options)


def _low_precision(hidden: Any, weight: Any, targets: Any, **options: Any) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, **options)


def _ways(**options: Any) -> Peer:
    """Logits widened to fp32 (for fp32 the same tensor), or the softmax in their own dtype."""
    return {
        "fp32 softmax": lambda **inputs: _cross_entropy(**inputs, **options),
        "softmax in dtype": lambda **inputs: _low_precision(**inputs, **options),
    }


def _chunked(hidden: Any, weight: Any, targets: Any) -> torch.Tensor:
    from torch.nn import LinearCrossEntropyOptions  # PyTorch 2.13

    out: torch.Tensor = F.linear_cross_entropy(hidden, weight, targets, options=LinearCrossEntropyOptions())
    return out


def _implementations(n: int, h: int, v: int) -> dict[str, Peer]:
    found: dict[str, Peer] = {
        OURS: lambda hidden, weight, targets: ops.linear_cross_entropy(hidden, weight, targets),
        "torch cross_entropy(linear)": _ways(),
    }
    # Chunked takes 25 s a call in fp32 at V = 151936, and its bf16 loss is off by a tenth.
    return found if v > 100_000 else found | {"torch linear_cross_entropy, chunked": _chunked}


def _logprob(*_: int) -> dict[str, Peer]:
    ways = _ways(reduction="none")
    return {
        OURS: lambda hidden, weight, targets: ops.linear_logprob(hidden, weight, targets).logp,
        "torch cross_entropy(linear)": {
            name: lambda fn=fn, **inputs: -fn(**inputs)
            for name, fn in ways.items()  # type: ignore[union-attr]
        },
    }


def _policy(*_: int) -> dict[str, Peer]:
    """Log-probability and entropy together, as a policy gradient with an entropy bonus needs them."""

    def ours(hidden: Any, weight: Any, targets: Any) -> torch.Tensor:
        stats = ops.linear_logprob(hidden, weight, targets)
        return stats.logp + 0.1 * stats.entropy

    def eager(hidden: Any, weight: Any, targets: Any) -> torch.Tensor:
        log_p = F.log_softmax(F.linear(hidden, weight).float(), -1)
        return log_p.gather(1, targets[:, None])[:, 0] - 0.1 * (log_p.exp() * log_p).sum(-1)

    return {OURS: ours, "torch log_softmax": eager}


def _kl_inputs(n: int, h: int, h_teacher: int, v: int, dtype: torch.dtype) -> dict[str, Any]:
    teacher = {
        "teacher_hidden": torch.randn(n, h_teacher).to(dtype),
        "teacher_weight": (torch.randn(v, h_teacher) * h_teacher**-0.5).to(dtype),
    }
    student = _inputs(n, h, v, dtype)
    return {"hidden": student["hidden"], "weight": student["weight"], **teacher}


def _kl(*_: int) -> dict[str, Peer]:
    def ours(hidden: Any, weight: Any, teacher_hidden: Any, teacher_weight: Any) -> torch.Tensor:
        return ops.linear_kl_div(hidden, weight, teacher_hidden.detach(), teacher_weight.detach())

    def eager(hidden: Any, weight: Any, teacher_hidden: Any, teacher_weight: Any) -> torch.Tensor:
        student = F.log_softmax(F.linear(hidden, weight).float(), -1)
        with torch.no_grad():
            teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float(), -1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

    return {OURS: ours, "torch log_softmax": eager}


def _case(op: str, shapes: list[tuple[int, ...]], implementations: Any, modes: tuple[str, ...]) -> Case:
    return Case(
        op,
        ("N", "H", "V"),
        shapes,
        _inputs,
        implementations,
        lambda n, h, v: 2 * n * h * v,
        lambda n, h, v, element: element * (n * h + v * h),
        modes=modes,
        backward_flops=4.0,
    )


CASES = [
    _case("linear_cross_entropy", [(2048, 512, 32000), (512, 512, 151936)], _implementations, ("fwd", "fwd+bwd")),
    _case("linear_logprob", [(2048, 512, 32000), (512, 512, 151936)], _logprob, ("fwd+bwd",)),
    _case("linear_logprob_entropy", [(2048, 512, 32000), (512, 512, 151936)], _policy, ("fwd+bwd",)),
    Case(
        "linear_kl_div",
        ("N", "H", "H_teacher", "V"),
        [(1024, 512, 1024, 32000)],
        _kl_inputs,
        _kl,
        lambda n, h, ht, v: 2 * n * (h + ht) * v,
        lambda n, h, ht, v, element: element * (n + v) * (h + ht),
        modes=("fwd+bwd",),
        backward_flops=(4 * 1536 + 4 * 512) / (2 * 1536),
    ),
]
