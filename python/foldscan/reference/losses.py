"""Vocabulary losses in plain PyTorch with all logits in memory: the definition of `foldscan.ops.losses`.

Any float dtype, any device, differentiable by autograd. Arguments are checked by the public functions.
"""

from __future__ import annotations

import torch


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float, softcap: float
) -> torch.Tensor:
    """(N, V) in fp32 or fp64."""
    z = _wide(hidden @ weight.T)
    if bias is not None:
        z = z + bias.to(z.dtype)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def reduce(loss: torch.Tensor, reduction: str, counted: torch.Tensor) -> torch.Tensor:
    """The mean is over the rows that count, and 0 when there are none."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> torch.Tensor:
    """See `foldscan.ops.linear_cross_entropy`."""
    z = logits(hidden, weight, bias, 1.0, softcap)
    counted = targets != ignore_index
    lse = torch.logsumexp(z, -1)
    target = z.gather(1, torch.where(counted, targets, 0).long()[:, None])[:, 0]
    loss = (1 - label_smoothing) * (lse - target) + label_smoothing * (lse - z.mean(-1)) + z_loss * lse.square()
    return reduce(torch.where(counted, loss, torch.zeros_like(loss)), reduction, counted)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float,
    ignore_index: int,
) -> tuple[torch.Tensor, ...]:
    """See `foldscan.ops.linear_logprob`: (logp, entropy, varentropy, lse)."""
    z = logits(hidden, weight, bias, temperature, softcap)
    counted = targets != ignore_index
    lse = torch.logsumexp(z, -1)
    log_p = z - lse[:, None]
    p = log_p.exp()
    logp = log_p.gather(1, torch.where(counted, targets, 0).long()[:, None])[:, 0]
    entropy = -(p * log_p).sum(-1)
    varentropy = (p * (log_p + entropy[:, None]).square()).sum(-1)
    return tuple(torch.where(counted, v, torch.zeros_like(v)) for v in (logp, entropy, varentropy, lse))


def linear_kl_div(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    direction: str,
    beta: float,
    temperature: float,
    mask: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """See `foldscan.ops.linear_kl_div`."""
    student = torch.log_softmax(logits(hidden, weight, None, temperature, 0.0), -1)
    teacher = torch.log_softmax(logits(teacher_hidden, teacher_weight, None, temperature, 0.0), -1)
    if direction == "forward":
        loss = (teacher.exp() * (teacher - student)).sum(-1)
    elif direction == "reverse":
        loss = (student.exp() * (student - teacher)).sum(-1)
    else:
        mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
        to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
        loss = beta * to_teacher + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)
    counted = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask
    return reduce(torch.where(counted, loss, torch.zeros_like(loss)), reduction, counted)
