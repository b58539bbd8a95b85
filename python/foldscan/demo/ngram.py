"""Baselines for bits per byte: an interpolated byte n-gram model, and lzma."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_SEPARATOR = 0  # stands for what is before a text's first byte


def _keys(data: npt.NDArray[np.uint8], length: int) -> npt.NDArray[np.uint64]:
    """For every position of ``data``, the ``length`` bytes that end there as one integer (zeros before the start)."""
    keys = np.zeros(len(data), np.uint64)
    for back in range(length):
        keys[back:] |= data[: len(data) - back].astype(np.uint64) << np.uint64(8 * back)
    return keys


class ByteNgram:
    """Byte n-gram model with Witten-Bell interpolation (1991; method C of PPM, as a mixture).

    The probability of a byte after a context c of k bytes is ``(n(c, b) + t(c) * p(b | c without its oldest byte)) /
    (n(c) + t(c))`` with n the counts in training and t(c) the number of different bytes seen after c; below the empty
    context it is 1/256.

    Args:
        order: longest n-gram in bytes, 1 to 7 (contexts of ``order - 1``).
    """

    def __init__(self, order: int = 6) -> None:
        if not 1 <= order <= 7:
            raise ValueError(f"order: got {order}, want 1 to 7")
        self.order = order
        self._grams: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] = []
        self._contexts: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []

    def _join(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """All texts with separators before each, and which positions are real bytes."""
        pad = bytes([_SEPARATOR]) * max(1, self.order - 1)
        data = np.frombuffer(b"".join(pad + t for t in texts), np.uint8)
        real = np.ones(len(data), bool)
        at = 0
        for text in texts:
            real[at : at + len(pad)] = False
            at += len(pad) + len(text)
        return data, real

    def fit(self, texts: Sequence[bytes]) -> ByteNgram:
        """Count the n-grams of all orders."""
        data, real = self._join(texts)
        self._grams, self._contexts = [], []
        for length in range(1, self.order + 1):
            grams, counts = np.unique(_keys(data, length)[real], return_counts=True)
            # A sorted gram begins with its context, so equal contexts are neighbours.
            contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
            totals = np.add.reduceat(counts, first)
            kinds = np.diff(np.append(first, len(grams)))
            self._grams.append((grams, counts))
            self._contexts.append((contexts, totals, kinds))
        return self

    @staticmethod
    def _look_up(sorted_keys: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Index of each wanted key, or -1."""
        at = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
        return np.where(sorted_keys[at] == wanted, at, -1)

    def probabilities(self, text: bytes) -> npt.NDArray[np.float64]:
        """(bytes,) the probability of each byte of one text given those before it."""
        data, real = self._join([text])
        p = np.full(int(real.sum()), 1.0 / 256)
        for length in range(1, self.order + 1):
            keys = _keys(data, length)[real]
            grams, counts = self._grams[length - 1]
            contexts, totals, kinds = self._contexts[length - 1]
            gram, context = self._look_up(grams, keys), self._look_up(contexts, keys >> np.uint64(8))
            seen = np.where(gram >= 0, counts[gram], 0)
            total = np.where(context >= 0, totals[context], 0)
            kind = np.where(context >= 0, kinds[context], 0)
            known = context >= 0
            p = np.where(known, (seen + kind * p) / np.where(known, total + kind, 1), p)
        return p

    def bits_per_byte(self, texts: Sequence[bytes]) -> float:
        """Mean over all bytes of all texts; each text starts without context."""
        bits = sum(float(-np.log2(self.probabilities(t)).sum()) for t in texts if t)
        return bits / max(1, sum(len(t) for t in texts))


def lzma_bits_per_byte(texts: Sequence[bytes]) -> float:
    """Size of all texts compressed together by lzma at its strongest, in bits a byte of text."""
    joined = b"".join(texts)
    return 8 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / max(1, len(joined))


def lzma_primed_bits_per_byte(training: bytes, texts: Sequence[bytes]) -> float:
    """What lzma needs for the texts when it has just compressed the training text: the fair peer of a trained model."""
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << max(16, math.ceil(math.log2(len(training) + 1)))}
    ]

    def size(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))

    joined = b"".join(texts)
    return 8 * (size(training + joined) - size(training)) / max(1, len(joined))
