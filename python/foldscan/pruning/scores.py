"""Statistics of channels over a stream of activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from foldscan.ops import _checks
from foldscan.ops.pruning import STATISTICS, finish_scores, score_state, score_update


class ScoreAccumulator:
    """Importance and moments of channels, in one pass over any number of batches.

    Sums are fp64 and run token by token, so neither the threads nor the way in which the stream was cut into batches
    (of whole sequences) changes a bit of the result.

    Args:
        channels: shape of the channels, for instance (heads, headdim), or a number.
        device: where the sums live.
    """

    def __init__(self, channels: int | Sequence[int], device: torch.device | str = "cpu") -> None:
        self.channels = (channels,) if isinstance(channels, int) else tuple(channels)
        if any(c < 0 for c in self.channels):
            raise ValueError(f"channels: got {self.channels}, want sizes of 0 or more")
        self.tokens = 0
        self.sequences = 0
        self._state = score_state(math.prod(self.channels), device)

    def update(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: (batch, seqlen, *channels), or packed (tokens, *channels) with ``cu_seqlens``; fp32, bf16, fp16, fp64.
            cu_seqlens: (n + 1) int32. Sequences without tokens do not count.
        """
        _checks.tensor("x", x)
        leading = x.dim() - len(self.channels)
        if leading != (2 if cu_seqlens is None else 1) or tuple(x.shape[leading:]) != self.channels:
            want = "(batch, seqlen" if cu_seqlens is None else "(tokens"
            raise ValueError(f"x: got shape {tuple(x.shape)}, want {want}, {', '.join(map(str, self.channels))})")
        if cu_seqlens is None:
            cu_seqlens = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]
            x = x.flatten(0, 1)
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0])
        score_update(x, cu_seqlens, self._state, first=self.tokens == 0)
        self.tokens += x.shape[0]
        self.sequences += int((cu_seqlens.diff() > 0).sum())

    def scores(self, reduce: tuple[str, str] = ("mean_abs", "l2")) -> torch.Tensor:
        """(*channels) fp64: as ``foldscan.ops.channel_scores`` over all sequences seen."""
        return finish_scores(self._state, self.sequences, reduce).view(self.channels)

    def mean_abs(self) -> torch.Tensor:
        """Mean of |x| over all tokens, (*channels) fp64."""
        return (self._state[0] / max(self.tokens, 1)).view(self.channels)

    def l2(self) -> torch.Tensor:
        """Root of the sum of squares over all tokens, (*channels) fp64."""
        return self._state[1].sqrt().view(self.channels)

    def mean(self) -> torch.Tensor:
        """Mean over all tokens, (*channels) fp64."""
        return (self._state[2] + self._state[3] / max(self.tokens, 1)).view(self.channels)

    def variance(self) -> torch.Tensor:
        """Variance over all tokens (of the population: divided by their number), (*channels) fp64.

        Fluctuation scores multiply it by the squared norm of the weights that read the channel (FLAP, arXiv:2312.11983,
        section 4).
        """
        n = max(self.tokens, 1)
        spread = self._state[4] - self._state[3].square() / n
        return (spread.clamp_min(0.0) / n).view(self.channels)

    def merge(self, other: ScoreAccumulator) -> None:
        """Add what another accumulator (of another worker, say) has seen. Same values up to rounding in fp64."""
        if other.channels != self.channels:
            raise ValueError(f"other: got channels {other.channels}, want {self.channels}")
        theirs = other._state.to(self._state.device)
        if self.tokens == 0:
            self._state = theirs.clone()
        elif other.tokens > 0:
            # Their shifted sums, taken around our shift.
            step = theirs[2] - self._state[2]
            shifted = theirs[3] + other.tokens * step
            squares = theirs[4] + 2 * step * theirs[3] + other.tokens * step.square()
            for row in (0, 1, 5, 6, 7):
                self._state[row] += theirs[row]
            self._state[3] += shifted
            self._state[4] += squares
        self.tokens += other.tokens
        self.sequences += other.sequences

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` takes back: the sums and the counts."""
        return {"state": self._state.clone(), "tokens": self.tokens, "sequences": self.sequences}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        _checks.tensor("state['state']", state["state"], dtypes=(torch.float64,))
        _checks.shape("state['state']", state["state"], STATISTICS, math.prod(self.channels))
        self._state = state["state"].clone().to(self._state.device)
        self.tokens, self.sequences = int(state["tokens"]), int(state["sequences"])
