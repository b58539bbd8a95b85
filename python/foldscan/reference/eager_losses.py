"""The best plain-PyTorch form of the vocabulary losses: ``F.linear`` and ``F.cross_entropy``, logits in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from foldscan.reference.losses import linear_kl_div, linear_logprob

__all__ = ["linear_cross_entropy", "linear_kl_div", "linear_logprob"]


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
    z = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
    z = z if z.dtype == torch.float64 else z.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(
        z, targets.long(), ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    counted = targets != ignore_index
    if z_loss:
        loss = loss + z_loss * torch.where(counted, torch.logsumexp(z, -1).square(), 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)
