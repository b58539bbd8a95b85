"""Routings of all ranks of EP x ETP, the result by a loop over tokens and slots, and one rank's part of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from foldscan import ops
from foldscan.parallel.dispatchers import make_dispatcher, run
from foldscan.parallel.groups import Group

WIDTH, OUT, HIDDEN = 13, 5, 16
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class Case:
    """A routing of all ranks of EP x ETP, the same on each; rank r of the block has ``tokens[r]`` tokens."""

    kind: str
    tokens: list[int]
    slots: int
    num_experts: int
    dtype: torch.dtype

    def draw(self) -> None:
        g = torch.Generator().manual_seed(hash_of(self.kind) + self.slots)
        total, E = sum(self.tokens), self.num_experts
        chosen = torch.rand(total, E, generator=g).argsort(1)[:, : self.slots]
        if self.kind == "skewed":  # three of four assignments go to the first expert
            chosen[torch.rand(total, generator=g) < 0.75, 0] = 0
        elif self.kind == "one":
            chosen[:] = E - 1
        elif self.kind == "empty":
            chosen[:] = -1
        elif self.kind == "holes":
            chosen[torch.rand(chosen.shape, generator=g) < 0.4] = -1
        self.experts = chosen
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.probs = torch.rand(total, self.slots, generator=g, dtype=wide)
        self.x, self.up, self.gate, self.down, self.dout = (
            torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype)
            for shape in ((total, WIDTH), (E, HIDDEN, WIDTH), (E, HIDDEN, WIDTH), (E, OUT, HIDDEN), (total, OUT))
        )


def hash_of(name: str) -> int:
    return sum(ord(c) * (i + 1) for i, c in enumerate(name))


@dataclass
class Here:
    """What one rank has of a case."""

    ep: Group
    etp: Group

    @property
    def number(self) -> int:
        """This rank's place in the block EP x ETP."""
        return self.ep.index * self.etp.size + self.etp.index

    def own(self, case: Case, x: torch.Tensor) -> torch.Tensor:
        return x.split(case.tokens)[self.number].clone()

    def weights(self, case: Case, ep: int, etp: int) -> list[torch.Tensor]:
        """(up, gate, down) of the member (ep, etp)."""
        E, F = case.num_experts // self.ep.size, HIDDEN // self.etp.size
        experts, hidden = slice(ep * E, (ep + 1) * E), slice(etp * F, (etp + 1) * F)
        return [
            case.up[experts, hidden].clone(),
            case.gate[experts, hidden].clone(),
            case.down[experts, :, hidden].clone(),
        ]


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, what: object) -> None:
    assert got.shape == want.shape and torch.isfinite(got).all(), what
    scale = float(want.double().square().mean().sqrt()) if want.numel() else 0.0
    error = float((got.double() - want.double()).square().mean().sqrt()) if want.numel() else 0.0
    assert error <= LIMIT[dtype] * scale + 1e-30, (what, error, scale)


def oracle(case: Case) -> list[torch.Tensor]:
    """Output, and gradients of tokens, probabilities, up, gate and down, of the whole: one assignment after another."""
    x, probs, up, gate, down = (
        v.double().requires_grad_() for v in (case.x, case.probs, case.up, case.gate, case.down)
    )
    rows = []
    for t, chosen in enumerate(case.experts.tolist()):
        row = torch.zeros(OUT, dtype=torch.float64) + 0 * x[t].sum()
        for j, e in enumerate(chosen):
            if e >= 0:
                hidden = torch.nn.functional.silu(gate[e] @ x[t]) * (up[e] @ x[t])
                row = row + down[e] @ (probs[t, j] * hidden)
        rows.append(row)
    leaves = [x, probs, up, gate, down]
    if not rows:
        return [torch.zeros(0, OUT), *(torch.zeros_like(v) for v in leaves)]
    out = torch.stack(rows)
    grads = torch.autograd.grad(out, leaves, case.dout.double(), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(v) if d is None else d for v, d in zip(leaves, grads))]


def through(name: str, here: Here, case: Case, *, each_alone: bool = False, **options: int) -> list[torch.Tensor]:
    """This rank's part of the same by a dispatcher.

    Args:
        each_alone: compute rows by elementwise functions, whose bits in fp64 do not depend on the other rows.
    """
    x, probs = (here.own(case, v).requires_grad_() for v in (case.x, case.probs))
    up, gate, down = (w.requires_grad_() for w in here.weights(case, here.ep.index, here.etp.index))

    def compute(rows: torch.Tensor, row_probs: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        assert row_probs.shape == experts.shape == (rows.shape[0], 1)
        if each_alone:
            factor = down[experts[:, 0], :, 0]  # (R, OUT)
            return row_probs * torch.tanh(rows[:, :OUT] * factor + rows[:, -OUT:])
        return ops.moe_mlp(rows, row_probs, experts, up, down, w_gate=gate)

    dispatcher = make_dispatcher(name, case.num_experts, here.ep, here.etp)
    out = run(dispatcher, x, probs, here.own(case, case.experts), compute, **options)
    leaves = [x, probs, up, gate, down]
    leaves = leaves[:2] if each_alone else leaves
    return [out.detach(), *torch.autograd.grad(out, leaves, here.own(case, case.dout))]


def check_against_oracle(here: Here, case: Case, got: list[torch.Tensor]) -> None:
    whole = oracle(case)
    E, F = case.num_experts // here.ep.size, HIDDEN // here.etp.size
    experts = slice(here.ep.index * E, (here.ep.index + 1) * E)
    hidden = slice(here.etp.index * F, (here.etp.index + 1) * F)
    wants = [here.own(case, v) for v in whole[:3]]
    wants += [whole[3][experts, hidden], whole[4][experts, hidden], whole[5][experts, :, hidden]]
    for i, (value, want) in enumerate(zip(got, wants)):
        close(value, want, case.dtype, (i, case.kind, case.dtype, here.ep.size, here.etp.size))


def total(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """In fp32 from front to back, rounded once."""
    out = torch.zeros_like(like, dtype=torch.float32)
    for part in parts:
        out = out + part.float()
    return out.to(like.dtype)


def canonical(here: Here, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and token gradients of this rank's tokens, each row alone, added in the promised order."""
    x, probs, experts, dout = (here.own(case, v) for v in (case.x, case.probs, case.experts, case.dout))
    local = case.num_experts // here.ep.size
    outs, grads = torch.zeros_like(dout), torch.zeros_like(x)
    for t in range(x.shape[0]):
        y_ranks, d_ranks = [], []
        for rank in range(here.ep.size):
            ys, ds = [], []
            for j, e in enumerate(experts[t].tolist()):
                if e < 0 or e // local != rank:
                    continue
                y_members, d_members = [], []
                for member in range(here.etp.size):
                    up, gate, down = here.weights(case, rank, member)
                    row = x[t : t + 1].clone().requires_grad_()
                    y = ops.moe_mlp(
                        row, probs[t : t + 1, j : j + 1], torch.tensor([[e % local]]), up, down, w_gate=gate
                    )
                    d_members.append(torch.autograd.grad(y, row, dout[t : t + 1])[0][0])
                    y_members.append(y.detach()[0])
                ys.append(total(y_members, dout[t]))
                ds.append(total(d_members, x[t]))
            y_ranks.append(total(ys, dout[t]))
            d_ranks.append(total(ds, x[t]))
        outs[t], grads[t] = total(y_ranks, dout[t]), total(d_ranks, x[t])
    return outs, grads


def same(a: list[torch.Tensor], b: list[torch.Tensor], what: object) -> None:
    """The same bits."""
    for i, (x, y) in enumerate(zip(a, b)):
        assert torch.equal(x, y), (what, i)
