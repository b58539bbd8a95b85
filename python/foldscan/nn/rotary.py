"""Rotary position embedding in the rotate-half layout (arXiv:2104.09864; Llama, Qwen, Mixtral)."""

from __future__ import annotations

import torch
from torch import nn

from foldscan import ops

_BLOCK = 1024


class RotaryEmbedding(nn.Module):
    """Rotates halves of query and key heads by angles that grow with the position.

    The tables of cosines and sines are made in blocks of fixed size, so a position's bits do not depend on how long
    the longest sequence was so far.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim: got {head_dim}, want an even number")
        self.head_dim, self.theta = head_dim, theta
        self._cos = torch.empty(0, head_dim // 2, dtype=torch.float32)
        self._sin = torch.empty(0, head_dim // 2, dtype=torch.float32)

    def _grow(self, length: int, device: torch.device) -> None:
        if self._cos.device != device:
            self._cos, self._sin = self._cos.to(device), self._sin.to(device)
        cosines, sines = [self._cos], [self._sin]
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        frequency = 1.0 / self.theta**exponent
        for start in range(len(self._cos), length, _BLOCK):
            # The angle is rounded to fp32, as in the models' own code; only its cosine is taken in fp64.
            angle = torch.arange(start, start + _BLOCK, dtype=torch.float32)[:, None] * frequency
            cosines.append(angle.double().cos().float().to(device))
            sines.append(angle.double().sin().float().to(device))
        self._cos, self._sin = torch.cat(cosines), torch.cat(sines)

    def tables(self, longest: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (at least ``longest``, head_dim / 2) fp32 of positions 0, 1, ..."""
        if longest > len(self._cos) or self._cos.device != device:
            self._grow(longest, device)
        return self._cos, self._sin

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, longest: int) -> torch.Tensor:
        """Rotate (T, heads, head_dim) to the positions (T,), all below ``longest``; computed in fp32, rounded once."""
        return ops.rotary_embedding(x, *self.tables(longest, x.device), position_ids)
