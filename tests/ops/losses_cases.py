"""What the tests of the vocabulary losses share: definitions with the full softmax, and problems."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16]
# (N, H, V): one, around the block of 256 and the group of 512 columns, primes, more rows than one task of 768.
SHAPES = [(1, 1, 1), (5, 8, 256), (7, 13, 257), (97, 33, 513), (3, 515, 1031), (800, 5, 300), (0, 4, 10)]


def make_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float, temperature: float = 1.0
) -> torch.Tensor:
    z = hidden @ weight.T
    z = z.float() if z.dtype != torch.float64 else z
    if bias is not None:
        z = z + bias.to(z.dtype)
    return (softcap * torch.tanh(z / softcap) if softcap else z) / temperature


def stats_oracle(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """(4, N), from the definitions with the full softmax."""
    log_p = torch.log_softmax(make_logits(hidden, weight, bias, softcap, temperature), -1)
    p, keep = log_p.exp(), (targets != ignore_index).to(log_p.dtype)
    entropy = -(p * log_p).sum(-1)
    varentropy = (p * log_p**2).sum(-1) - entropy**2
    logp = log_p.gather(1, targets.clamp(min=0)[:, None].long())[:, 0]
    lse = torch.logsumexp(make_logits(hidden, weight, bias, softcap, temperature), -1)
    return torch.stack([logp, entropy, varentropy, lse]) * keep


def problem(N: int, H: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g).to(dtype)
    weight = (torch.randn(V, H, generator=g) * 2 / max(H, 1) ** 0.5).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    targets = torch.randint(0, V, (N,), generator=g)
    if N > 2:
        targets[1] = -100
    return hidden, weight, bias, targets


def kl_oracle(
    h: torch.Tensor, w: torch.Tensor, th: torch.Tensor, tw: torch.Tensor, direction: str, beta: float, T: float
) -> torch.Tensor:
    s = torch.log_softmax(make_logits(h, w, None, 0.0, T), -1)
    t = torch.log_softmax(make_logits(th, tw, None, 0.0, T), -1)
    if direction == "forward":
        return (t.exp() * (t - s)).sum(-1)
    if direction == "reverse":
        return (s.exp() * (s - t)).sum(-1)
    m = torch.log(beta * t.exp() + (1 - beta) * s.exp())
    return (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)
