"""Embedding and cross entropy over a vocabulary whose rows are divided over a tensor-parallel group.

Rank i holds the rows that ``groups.shares(vocab_size, group.size)`` gives it. Tokens are divided too (sequence
parallelism): rank i has ``counts[i]`` of them, and ids and targets of all of them are known to all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from foldscan import ops
from foldscan.ops import _checks
from foldscan.ops._library import compute_dtype
from foldscan.parallel import adjoint
from foldscan.parallel.groups import Group, shares


def vocab_parallel_embedding(
    ids: torch.Tensor, weight: torch.Tensor, group: Group, *, counts: Sequence[int], vocab_size: int
) -> torch.Tensor:
    """Rows of a divided embedding table: each rank looks up what it has, and the sum goes to the tokens' ranks.

    Args:
        ids: (sum(counts),) int32 or int64, of the tokens of all ranks, in the order of the ranks.
        weight: (V_loc, H), this rank's rows of the table.
        counts: tokens of each rank. vocab_size: V, rows of the whole table.

    Returns:
        (counts[own], H) in the dtype of the weight, exact. Differentiable in the weight.

    Raises:
        TypeError: dtypes. ValueError: shapes, or an id out of range.
    """
    start = _check_shard(weight, group, vocab_size)
    _check_ids("ids", ids, counts, group, vocab_size, None)
    local = ids.long() - start
    here = (local >= 0) & (local < weight.shape[0])
    rows = F.embedding(local.where(here, 0), weight).where(here[:, None], 0)
    return adjoint.reduce_scatter(rows, counts, group, label="embedding")


def vocab_parallel_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    group: Group,
    *,
    counts: Sequence[int],
    vocab_size: int,
    ignore_index: int = -100,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """``ops.linear_cross_entropy`` of this rank's rows over a divided vocabulary; the logits never exist.

    The hidden rows are gathered, every rank computes the log-sum-exp over its shard and, where it has it, the target's
    logit, and two numbers a row and shard go back to the rank that the row is from.

    Args:
        hidden: (counts[own], H). Inside ``torch.autocast`` it is cast to the autocast dtype before it is sent.
        weight: (V_loc, H), this rank's rows of the head, hidden's dtype, or fp32 beside a bf16 hidden.
        targets: (sum(counts),) int32 or int64, of the rows of all ranks, in the order of the ranks.
        counts: rows of each rank. vocab_size: V, rows of the whole head.
        ignore_index, softcap, z_loss: as in ``ops.linear_cross_entropy``.

    Returns:
        (counts[own],) fp32 (fp64 for fp64 input), 0 where ignored. What the ranks return sums to the loss of all rows:
        gradients of hidden and weight need no scale.

    Raises:
        TypeError: dtypes. ValueError: shapes, or a label out of range.
    """
    start = _check_shard(weight, group, vocab_size)
    _check_ids("targets", targets, counts, group, vocab_size, ignore_index)
    _checks.tensor("hidden", hidden, dims=2)
    _checks.shape("hidden", hidden, counts[group.index], weight.shape[1])
    if group.size == 1:
        return ops.linear_cross_entropy(
            hidden, weight, targets, ignore_index=ignore_index, reduction="none", softcap=softcap, z_loss=z_loss
        )
    everything = adjoint.all_gather(hidden.to(compute_dtype(hidden)), counts, group, label="head")
    local = targets.long() - start
    ignored = targets == ignore_index
    here = (local >= 0) & (local < weight.shape[0]) & ~ignored
    # A row whose target is elsewhere still needs this shard's log-sum-exp: label 0 stands in, and is not used.
    labels = local.where(here, 0).masked_fill(ignored, ignore_index)
    stats = ops.linear_logprob(everything, weight, labels, softcap=softcap, ignore_index=ignore_index)
    both = torch.stack([stats.lse, (stats.logp + stats.lse).where(here, 0)], dim=1)
    own = counts[group.index]
    shards = adjoint.all_to_all(both, counts, [own] * group.size, group, label="loss").view(group.size, own, 2)
    lse = torch.logsumexp(shards[..., 0], dim=0)
    loss = lse - shards[..., 1].sum(0) + z_loss * lse.square()
    first = sum(counts[: group.index])
    return loss.masked_fill(ignored[first : first + own], 0)


def _check_shard(weight: torch.Tensor, group: Group, vocab_size: int) -> int:
    """The first row of this rank's shard in the whole table."""
    sizes = shares(vocab_size, group.size)
    _checks.tensor("weight", weight, dims=2)
    if vocab_size < group.size:
        raise ValueError(f"vocab_size: got {vocab_size}, want at least a row for each of the {group.size} ranks")
    if weight.shape[0] != sizes[group.index]:
        raise ValueError(
            f"weight: got {weight.shape[0]} rows, want {sizes[group.index]}, the share of rank {group.index} of "
            f"{vocab_size}"
        )
    return sum(sizes[: group.index])


def _check_ids(
    name: str, ids: torch.Tensor, counts: Sequence[int], group: Group, vocab_size: int, ignore_index: int | None
) -> None:
    if len(counts) != group.size:
        raise ValueError(f"counts: got {len(counts)} numbers of rows, want one for each of the {group.size} ranks")
    _checks.tensor(name, ids, dtypes=(torch.int32, torch.int64))
    _checks.shape(name, ids, sum(counts))
    bad = (ids < 0) | (ids >= vocab_size)
    if ignore_index is not None:
        bad &= ids != ignore_index
    if bad.any():
        raise ValueError(f"{name}: got {int(ids[bad][0])}, want [0, {vocab_size})")
