"""The n-gram baseline against a slow one that counts with dictionaries; lzma against its own sizes."""

import lzma
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from foldscan.demo.ngram import ByteNgram, lzma_bits_per_byte, lzma_primed_bits_per_byte
from hypothesis import given, settings
from hypothesis import strategies as st


class SlowNgram:
    """Witten-Bell interpolation straight from its definition."""

    def __init__(self, order: int, texts: list[bytes]) -> None:
        self.order = order
        self.after: dict[bytes, Counter[int]] = defaultdict(Counter)
        for text in texts:
            padded = bytes(max(1, order - 1)) + text
            for at in range(len(padded) - len(text), len(padded)):
                for length in range(order):
                    self.after[padded[at - length : at]][padded[at]] += 1

    def probability(self, context: bytes, byte: int) -> float:
        shorter = self.probability(context[1:], byte) if context else 1 / 256
        seen = self.after.get(context)
        if not seen:
            return shorter
        return (seen[byte] + len(seen) * shorter) / (sum(seen.values()) + len(seen))

    def probabilities(self, text: bytes) -> list[float]:
        padded = bytes(max(1, self.order - 1)) + text
        first = len(padded) - len(text)
        return [self.probability(padded[at - self.order + 1 : at], padded[at]) for at in range(first, len(padded))]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    order=st.integers(1, 7),
    texts=st.lists(st.text("ab\x00é", max_size=30), min_size=1, max_size=4).filter(any),
    probe=st.text("abc\x00é", min_size=1, max_size=30),
)
def test_probabilities_are_those_of_the_definition(order: int, texts: list[str], probe: str) -> None:
    known = [t.encode() for t in texts]
    got = ByteNgram(order).fit(known).probabilities(probe.encode())
    np.testing.assert_allclose(got, SlowNgram(order, known).probabilities(probe.encode()), rtol=1e-12)


def test_probabilities_of_all_bytes_sum_to_one() -> None:
    model = ByteNgram(4).fit([b"the cat sat on the mat", b"the end"])
    for context in (b"", b"t", b"the ", b"zzz"):
        total = sum(model.probabilities(context + bytes([b]))[-1] for b in range(256))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_bits_per_byte_is_a_mean_over_all_bytes() -> None:
    model = ByteNgram(3).fit([b"abracadabra"])
    texts = [b"abra", b"", b"xyz"]
    bits = -sum(math.log2(p) for t in texts if t for p in model.probabilities(t))
    assert model.bits_per_byte(texts) == pytest.approx(bits / 7)
    assert ByteNgram(1).fit([bytes(range(256))]).bits_per_byte([b"any"]) == pytest.approx(8.0)


def test_order_is_checked() -> None:
    with pytest.raises(ValueError, match="order: got 8"):
        ByteNgram(8)


def test_lzma_counts_compressed_bits_and_priming_helps_on_known_text() -> None:
    text = random.Random(0).randbytes(3000)
    assert lzma_bits_per_byte([text]) == pytest.approx(8.0, rel=0.05)
    assert lzma_bits_per_byte([text, text]) < 4.5
    assert lzma_primed_bits_per_byte(text, [text]) < 0.2
    assert lzma_primed_bits_per_byte(b"other", [text]) > 7.5
    assert lzma_bits_per_byte([text]) * 3000 / 8 == len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
