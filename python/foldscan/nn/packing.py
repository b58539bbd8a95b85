"""What every layer must know about a packed batch: where sequences begin, and what is cached of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from foldscan.nn.cache import CacheStep


class Context(Protocol):
    """Computes what tokens take from others, where the rows here are only a part of the batch (context parallelism).

    Everything is causal and ends at the boundaries of sequences; rows are those of this part.
    """

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window_size: tuple[int, int]
    ) -> torch.Tensor:
        """Attention: (T, Hq, D), (T, Hkv, D), (T, Hkv, Dv) to (T, Hq, Dv)."""
        ...

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Depthwise convolution with SiLU: (T, C), (C, W), (C) to (T, C)."""
        ...

    def scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        *,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        dt_bias: torch.Tensor | None,
        dt_limit: tuple[float, float],
    ) -> torch.Tensor:
        """Mamba-2 scan: (T, H, P), (T, H), (H), twice (T, G, N) to (T, H, P); softplus on dt + dt_bias."""
        ...


@dataclass(frozen=True)
class Packing:
    """Sequences laid end to end in (T, d).

    Attributes:
        cu_seqlens: (n + 1,) int32, starts of the sequences, then T.
        max_seqlen: the longest of them, above all ``position_ids`` without a cache.
        position_ids: (T,) int64, place of each token in its sequence, tokens in the cache counted.
        cache: the step of a cache that this forward fills, or None.
        context: what mixes tokens where these are only a part of the batch, or None. The fields above are then about
            this part, but ``position_ids`` count from the sequences' own starts.

    Raises:
        ValueError: both a cache and a context.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    position_ids: torch.Tensor
    cache: CacheStep | None = None
    context: Context | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and self.context is not None:
            raise ValueError("context: got one beside a cache, want one or the other")


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
