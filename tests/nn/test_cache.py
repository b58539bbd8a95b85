"""The cache's book-keeping: slots and pages are handed out once, come back, and errors change nothing."""

import pytest
import torch
from foldscan.models import HybridConfig, HybridLM
from foldscan.nn import HybridCache, RotaryEmbedding, positions_of
from hypothesis import given, settings
from hypothesis import strategies as st


def attention_cache(**changes: int) -> HybridCache:
    cache = HybridCache(**{"slots": 3, "max_length": 20, "page_size": 4, **changes})
    cache.add_attention(1, 2)
    return cache


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_pages_are_never_shared_and_never_lost(data: st.DataObject) -> None:
    cache = attention_cache()
    taken: list[int] = []
    for _ in range(12):
        if taken and data.draw(st.booleans()):
            cache.release(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        elif cache.free_slots:
            taken.append(cache.allocate())
        if not taken:
            continue
        counts = [data.draw(st.integers(0, 20 - cache.lengths[s])) for s in taken]
        step = cache.step(taken, counts)
        step.commit()
        used: list[int] = []
        for row, slot in enumerate(taken):
            pages = -(-cache.lengths[slot] // 4)
            used += step.block_table[row, :pages].tolist()
        assert len(set(used)) == len(used)
        assert step.cu_seqlens.tolist()[-1] == sum(counts)
        assert (step.cu_seqlens_k.diff() - step.cu_seqlens.diff()).tolist() == step.positions.tolist()
    for slot in taken:
        cache.release(slot)
    assert sorted(cache._free_pages) == list(range(15)) and cache.free_slots == 3


def test_errors_change_nothing() -> None:
    cache = attention_cache(total_pages=2)
    slot = cache.allocate()
    for slots, counts, error in (
        ([slot], [21], ValueError),
        ([slot, slot], [1, 1], ValueError),
        ([9], [1], ValueError),
        ([], [], ValueError),
        ([slot], [9], RuntimeError),
    ):
        with pytest.raises(error):
            cache.step(slots, counts)
    assert cache.lengths[slot] == 0 and len(cache._free_pages) == 2
    with pytest.raises(RuntimeError, match="slots are all taken"):
        for _ in range(3):
            cache.allocate()
    cache.release(slot)
    with pytest.raises(ValueError, match="slot"):
        cache.release(slot)
    with pytest.raises(ValueError, match="page_size: got 0"):
        HybridCache(1, 1, page_size=0)


@torch.no_grad()
def test_a_released_slot_starts_afresh() -> None:
    torch.manual_seed(0)
    config = HybridConfig(
        pattern="M*",
        vocab_size=31,
        hidden_size=16,
        mamba_num_heads=2,
        mamba_head_dim=8,
        state_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        initializer_range=0.3,
    )
    model = HybridLM(config).eval()
    ids = torch.randint(0, 31, (9,))
    cache = model.new_cache(1, 16, page_size=4)
    results = []
    for _ in range(2):
        slot = cache.allocate()
        step = cache.step([slot], [9])
        results.append(model(ids, cache=step))
        cache.release(slot)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], model(ids))


def test_a_step_must_fit_its_tokens() -> None:
    model = HybridLM(HybridConfig(pattern="-", vocab_size=8, hidden_size=8, intermediate_size=8))
    cache = model.new_cache(2, 8)
    step = cache.step([0, 1], [2, 3])
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(torch.zeros(4, dtype=torch.int64), cache=step)
    with pytest.raises(ValueError, match="differ from those of the cache step"):
        model(torch.zeros(5, dtype=torch.int64), cu_seqlens=torch.tensor([0, 5]).int(), cache=step)
    assert cache.lengths == [0, 0]


def test_positions_count_from_each_start() -> None:
    cu = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert positions_of(cu, 5).tolist() == [0, 1, 2, 0, 1]
    assert positions_of(cu, 5, torch.tensor([10, 7, 1])).tolist() == [10, 11, 12, 1, 2]


def test_rotary_matches_complex_rotation() -> None:
    rotary = RotaryEmbedding(6, 100.0)
    x = torch.randn(5, 2, 6)
    positions = torch.tensor([0, 1, 7, 1500, 3])
    got = rotary(x, positions, 1501)
    for t, position in enumerate(positions.tolist()):
        for i in range(3):
            pair = torch.complex(x[t, :, i].double(), x[t, :, i + 3].double())
            turned = pair * torch.exp(torch.tensor(1j * position * 100.0 ** (-2 * i / 6)))
            torch.testing.assert_close(got[t, :, i].double(), turned.real, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(got[t, :, i + 3].double(), turned.imag, atol=2e-4, rtol=1e-4)


def test_rotary_bits_do_not_depend_on_the_longest_sequence() -> None:
    short, long = RotaryEmbedding(8, 1e4), RotaryEmbedding(8, 1e4)
    x, positions = torch.randn(10, 2, 8), torch.arange(10)
    long.tables(5001, x.device)
    assert torch.equal(short(x, positions, 10), long(x, positions, 10))
