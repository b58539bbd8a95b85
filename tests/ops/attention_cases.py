"""What the attention tests share: packed problems, and every output and gradient of a formula for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from foldscan import ops
from foldscan.reference import attention as reference
from foldscan.reference import eager_attention
from helpers import assert_budget, relative_rmse


def cu(lengths: Sequence[int]) -> torch.Tensor:
    """Cumulative lengths, int32."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


@contextmanager
def threads(n: int) -> Any:
    """Run with ``n`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _gradients(
    terms: list[tuple[torch.Tensor, torch.Tensor]], leaves: list[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    # The oracles' empty results may hang on no input at all.
    terms = [(t, g) for t, g in terms if t.requires_grad]
    if not terms:
        return [None] * len(leaves)
    return torch.autograd.grad([t for t, _ in terms], leaves, [g for _, g in terms], allow_unused=True)


@dataclass
class Case:
    """A packed attention problem with upstream gradients."""

    lengths_q: Sequence[int]
    lengths_k: Sequence[int]
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    value_dim: int | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        total_q, total_k = sum(self.lengths_q), sum(self.lengths_k)
        value_dim = self.value_dim or self.head_dim
        self.cu_q, self.cu_k = cu(self.lengths_q), cu(self.lengths_k)
        self.inputs = [
            torch.randn(total_q, self.heads, self.head_dim).to(self.dtype),
            torch.randn(total_k, self.kv_heads, self.head_dim).to(self.dtype),
            torch.randn(total_k, self.kv_heads, value_dim).to(self.dtype),
        ]
        if self.sinks:
            self.inputs.append(torch.randn(self.heads))
        self.dout = torch.randn(total_q, self.heads, value_dim).to(self.dtype)
        self.dlse = torch.randn(self.heads, total_q)

    def public(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Our public function."""
        out: tuple[torch.Tensor, torch.Tensor] = ops.flash_attn_varlen_func(
            *inputs[:3],
            self.cu_q,
            self.cu_k,
            max(self.lengths_q, default=0),
            max(self.lengths_k, default=0),
            causal=self.causal,
            window_size=self.window,
            softcap=self.softcap,
            sinks=inputs[3] if self.sinks else None,
            return_lse=True,
        )
        return out

    def formula(self, fn: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """The same problem for a formula of foldscan.reference."""
        right = 0 if self.causal else self.window[1]

        def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sinks = inputs[3] if self.sinks else None
            scale = self.head_dim**-0.5
            out: tuple[torch.Tensor, torch.Tensor] = fn(
                *inputs[:3], self.cu_q, self.cu_k, None, sinks, scale, self.softcap, self.window[0], right
            )
            return out

        return run

    def results(self, fn: Callable[..., tuple[torch.Tensor, torch.Tensor]], double: bool = False) -> list[torch.Tensor]:
        """out, lse and the gradient of every input. Where no key is seen lse is -inf and has no gradient."""
        leaves = [(t.double() if double else t).clone().requires_grad_() for t in self.inputs]
        out, lse = fn(*leaves)
        dlse = torch.where(torch.isfinite(lse), self.dlse.to(lse.dtype), 0.0)
        gradients = _gradients([(out, self.dout.to(out.dtype)), (lse, dlse)], leaves)
        return [
            out.detach(),
            lse.detach(),
            *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)),
        ]

    def check(self, factor: float = 2.0) -> None:
        """Outputs and gradients within the error budget of eager PyTorch in the same dtype."""
        ours = self.results(self.public)
        with threads(1):  # thousands of small operations
            truth = self.results(self.formula(reference.attention), double=True)
            eager = self.results(self.formula(eager_attention.attention))
        assert torch.equal(torch.isfinite(ours[1]), torch.isfinite(truth[1])), "lse is finite elsewhere"
        finite = torch.isfinite(truth[1])
        for results in (ours, truth, eager):
            results[1] = results[1][finite]
        for name, got, want, base in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), ours, truth, eager):
            # Rounding of dP - delta, which nearly cancel where few keys are seen, is luck: either error may be tiny.
            if got.dtype == torch.float32 and got.shape == want.shape and relative_rmse(got, want) <= 5e-6:
                continue
            assert_budget(name, got, torch.nan_to_num(base), want, factor)
