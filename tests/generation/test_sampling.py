"""Sampling: the right distribution, the right candidates, and randomness that only seed and position decide."""

import numpy as np
import pytest
from foldscan.generation import Sampling, choose, gumbel_noise
from foldscan.generation.sampling import candidates
from hypothesis import given, settings
from hypothesis import strategies as st


def draws(logits: np.ndarray, sampling: Sampling, count: int) -> np.ndarray:
    ids = [choose(logits, position, sampling) for position in range(count)]
    return np.bincount(ids, minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, 1.5])
    want = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    got = draws(logits, Sampling(temperature=temperature, seed=3), 20000)
    # four standard deviations of a binomial share
    assert np.all(np.abs(got - want) < 4 * np.sqrt(want * (1 - want) / 20000))


def test_top_k_and_top_p_renormalise() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    got = draws(logits, Sampling(top_k=2), 10000)
    assert got[2:].sum() == 0 and abs(got[0] - 4 / 7) < 0.02
    got = draws(logits, Sampling(top_p=0.75), 10000)  # 0.4 + 0.3 < 0.75 <= 0.4 + 0.3 + 0.2
    assert got[3] == 0 and abs(got[2] - 2 / 9) < 0.02


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.1, 5.0),
)
def test_candidates_are_the_smallest_set(logits: list[float], top_k: int, top_p: float, temperature: float) -> None:
    row = np.array(logits)
    chosen = candidates(row, Sampling(temperature, top_k, top_p)).tolist()
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    kept = order[:top_k] if top_k else order
    if top_p < 1:
        weights = np.exp((row[kept] - row.max()) / temperature)
        weights /= weights.sum()
        enough = next((n for n in range(1, len(kept) + 1) if weights[:n].sum() >= top_p - 1e-12), len(kept))
        kept = kept[:enough]
        # at a tie with the threshold rounding may keep one more or one less
        assert chosen == order[: len(chosen)] and abs(len(chosen) - len(kept)) <= 1
    else:
        assert sorted(chosen) == sorted(kept)


def test_greedy_takes_the_first_of_equals() -> None:
    assert choose(np.array([0.0, 5.0, 5.0]), 0, Sampling(temperature=0)) == 1
    assert choose(np.array([0.0, 5.0, 4.0]), 9, Sampling(temperature=3.0, top_k=1, seed=8)) == 1


def test_noise_depends_on_seed_and_position_alone() -> None:
    assert np.array_equal(gumbel_noise(1, 2, 100), gumbel_noise(1, 2, 100))
    assert np.array_equal(gumbel_noise(1, 2, 100)[:7], gumbel_noise(1, 2, 7))
    assert not np.array_equal(gumbel_noise(1, 2, 100), gumbel_noise(1, 3, 100))
    assert not np.array_equal(gumbel_noise(1, 2, 100), gumbel_noise(2, 2, 100))
    large = [gumbel_noise(2**64 - n, 0, 4).tolist() for n in (1, 2, 3)]  # no seed is lost in a float
    assert large[0] != large[1] != large[2] != large[0]
    noise = np.concatenate([gumbel_noise(0, position, 1000) for position in range(100)])
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - np.pi**2 / 6) < 0.05


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("seed", -1)],
)
def test_impossible_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})
