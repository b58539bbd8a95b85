"""What every layer must know about a packed batch: where sequences begin, and what is cached of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foldscan.nn.cache import CacheStep


@dataclass(frozen=True)
class Packing:
    """Sequences laid end to end in (T, d).

    Attributes:
        cu_seqlens: (n + 1,) int32, starts of the sequences, then T.
        max_seqlen: the longest of them.
        position_ids: (T,) int64, place of each token in its sequence, tokens in the cache counted.
        cache: the step of a cache that this forward fills, or None.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    position_ids: torch.Tensor
    cache: CacheStep | None = None


def positions_of(cu_seqlens: torch.Tensor, total: int, offsets: torch.Tensor | None = None) -> torch.Tensor:
    """(T,) int64 places of packed tokens: 0, 1, ... from each start, plus ``offsets`` (n,) where given."""
    starts = cu_seqlens[:-1].long()
    shift = -starts if offsets is None else offsets.long() - starts
    lengths = cu_seqlens.diff().long()
    index = torch.arange(total, device=cu_seqlens.device)
    return index + torch.repeat_interleave(shift, lengths, output_size=total)


def check_cu_seqlens(cu_seqlens: torch.Tensor, total: int) -> None:
    """Refuse boundaries that do not describe ``total`` tokens.

    Raises:
        TypeError: not int32.
        ValueError: not one-dimensional, not from 0 to ``total``, or falling.
    """
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: got dtype {cu_seqlens.dtype}, want torch.int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, want (sequences + 1,)")
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens: got {cu_seqlens.tolist()[:8]}..., want values that rise from 0 to {total}")
