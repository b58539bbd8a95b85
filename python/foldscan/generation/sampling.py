"""Choosing the next token: temperature, top-k, top-p, with randomness that depends on nothing but seed and position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
        temperature: 0 for the most likely token; logits are divided by it otherwise.
        top_k: only the so many most likely tokens; 0 for all.
        top_p: only the smallest set of most likely tokens that holds this probability (arXiv:1904.09751); 1 for all.
        seed: of the random numbers, from 0 to 2^64 - 1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: got {self.temperature}, want a finite number, 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k: got {self.top_k}, want 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, want in (0, 1]")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed: got {self.seed}, want in [0, 2^64)")


def gumbel_noise(seed: int, position: int, size: int) -> npt.NDArray[np.float64]:
    """(size,) standard Gumbel numbers, a function of (seed, position) alone: Philox4x64 (Salmon et al., SC 2011) keyed
    by the seed, with the position in the counter's highest word."""
    key = np.array([seed, 0], dtype=np.uint64)
    counter = np.array([0, 0, 0, position], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw(size)
    # 53 random bits in the middle of their cells: neither logarithm meets 0.
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def candidates(logits: npt.NDArray[np.float64], sampling: Sampling) -> npt.NDArray[np.int64]:
    """Ids that top-k and top-p leave, most likely first; ties by id."""
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        return np.arange(len(logits))
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    if sampling.top_p < 1.0:
        scaled = logits[order] / sampling.temperature
        weights = np.exp(scaled - scaled[0])
        before = np.cumsum(weights) - weights
        order = order[before < sampling.top_p * weights.sum()]
    return order


def choose(logits: npt.NDArray[np.floating], position: int, sampling: Sampling) -> int:
    """The next token from one row of logits (V,).

    The choice is the argmax of ``logits / temperature + Gumbel noise`` over the candidates, which is a draw from their
    softmax. Noise belongs to (seed, position, token), so the batch a sequence runs in plays no part.

    Args:
        position: of the token to choose, counted from the start of the sequence.
    """
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    row = np.asarray(logits, dtype=np.float64)
    ids = candidates(row, sampling)
    noise = gumbel_noise(sampling.seed, position, len(row))
    return int(ids[np.argmax(row[ids] / sampling.temperature + noise[ids])])
