"""The sampler reads every token once an epoch, never across documents unlabelled, and resumes anywhere."""

import numpy as np
import pytest
import torch
from foldscan.data import PackedSampler, TokenFile, Tokenizer, sequential_batches, write_token_file
from hypothesis import given, settings
from hypothesis import strategies as st

TEXTS = ["a", "", "bcd", "e" * 37, "fghijklmnop" * 3, "q" * 16]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    return write_token_file(tmp_path_factory.mktemp("tokens") / "t", TEXTS, Tokenizer.raw_bytes())


def successor(file: TokenFile) -> dict[tuple[int, ...], int]:
    """The slow way: what follows each token, looked up by where it stands."""
    ids = file.tokens.tolist()
    return dict(enumerate([*ids[1:], file.end_of_text]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(batch_tokens=st.integers(1, 70), max_length=st.integers(1, 50), seed=st.integers(0, 2**64 - 1))
def test_an_epoch_is_a_permutation_of_all_tokens(
    file: TokenFile, batch_tokens: int, max_length: int, seed: int
) -> None:
    sampler = PackedSampler(file, batch_tokens=batch_tokens, max_length=max_length, seed=seed)
    seen: list[int] = []
    while len(seen) < file.num_tokens:
        batch = sampler.next()
        assert batch.num_tokens == batch_tokens == int(batch.cu_seqlens[-1])
        lengths = batch.cu_seqlens.diff()
        assert int(lengths.min()) > 0 and int(lengths.max()) <= max_length
        seen.extend(batch.input_ids.tolist())
    want = np.sort(file.tokens[:]).tolist()
    assert sorted(seen[: file.num_tokens]) == want


@pytest.mark.parametrize("max_length", [1, 7, 16, 1000])
def test_labels_are_the_next_token_of_the_same_document(file: TokenFile, max_length: int) -> None:
    follow: dict[tuple[int, ...], set[int]] = {}
    for index in range(file.num_documents):
        document = [*file.document(index).tolist(), file.end_of_text]
        for at in range(len(document) - 1):
            follow.setdefault((document[at], document[max(0, at - 1)]), set()).add(document[at + 1])
    sampler = PackedSampler(file, batch_tokens=13, max_length=max_length)
    for _ in range(40):
        batch = sampler.next()
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist()):
            ids, labels = batch.input_ids[start:end].tolist(), batch.labels[start:end].tolist()
            assert labels[:-1] == ids[1:]
            options = {n for (token, _), nexts in follow.items() if token == ids[-1] for n in nexts}
            assert labels[-1] in options


def test_resuming_anywhere_gives_the_same_batches(file: TokenFile) -> None:
    sampler = PackedSampler(file, batch_tokens=11, max_length=9, seed=5)
    states, batches = [], []
    for _ in range(30):  # three epochs
        states.append(sampler.state())
        batches.append(sampler.next())
    assert sampler.epochs > 2
    for at in (0, 1, 7, 19, 29):
        other = PackedSampler(file, batch_tokens=11, max_length=9, seed=5)
        other.restore(states[at])
        for want in batches[at:]:
            got = other.next()
            assert torch.equal(got.input_ids, want.input_ids)
            assert torch.equal(got.labels, want.labels)
            assert torch.equal(got.cu_seqlens, want.cu_seqlens)


def test_seeds_and_epochs_differ(file: TokenFile) -> None:
    def first(seed: int) -> list[int]:
        return PackedSampler(file, batch_tokens=60, max_length=4, seed=seed).next().input_ids.tolist()

    assert first(0) == first(0) != first(1)
    assert first(2**64 - 1) != first(2**64 - 2)
    sampler = PackedSampler(file, batch_tokens=file.num_tokens, max_length=4)
    assert sampler.next().input_ids.tolist() != sampler.next().input_ids.tolist()


@pytest.mark.parametrize("field", ["seed", "batch_tokens", "max_length", "tokens"])
def test_a_state_of_another_run_is_refused(file: TokenFile, field: str) -> None:
    sampler = PackedSampler(file, batch_tokens=8, max_length=8)
    state = {**sampler.state(), field: 12345}
    with pytest.raises(ValueError, match=field):
        sampler.restore(state)


@pytest.mark.parametrize("max_length", [1, 5, 100])
def test_sequential_reading_is_the_file_in_order(file: TokenFile, max_length: int) -> None:
    batches = list(sequential_batches(file, batch_tokens=20, max_length=max_length))
    assert torch.cat([b.input_ids for b in batches]).tolist() == file.tokens.tolist()
    assert torch.cat([b.labels for b in batches]).tolist() == list(successor(file).values())
    assert sum(b.document_bytes for b in batches) == file.num_bytes
    first = list(sequential_batches(file, batch_tokens=20, max_length=max_length, max_documents=2))
    assert sum(b.num_tokens for b in first) == file.starts[2]
    assert sum(b.document_bytes for b in first) == file.byte_starts[2]


@pytest.mark.parametrize(("name", "value"), [("batch_tokens", 0), ("max_length", 0)])
def test_sizes_must_be_positive(file: TokenFile, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        PackedSampler(file, **{"batch_tokens": 4, "max_length": 4, name: value})
