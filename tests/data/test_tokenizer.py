"""Tokenizers are lossless, never produce special tokens from text, and survive a round trip through a file."""

from pathlib import Path

import pytest
from foldscan.data import END_OF_TEXT, Tokenizer
from foldscan.models import FormatError
from hypothesis import example, given, settings
from hypothesis import strategies as st

CORPUS = ["def f(x):\n    return x + 1\n" * 20, "class Naïve:\n\tpass  # über 🎉\n" * 20]
BPE = Tokenizer.train(CORPUS, 300)
BYTES = Tokenizer.raw_bytes()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=st.text(max_size=60))
@example(text="")
@example(text="\x00\r\n\t \u2028")
@example(text=f"a{END_OF_TEXT}b")
@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_any_text_round_trips_without_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert "".join(tokenizer.stream(ids)) == text
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_bytes_are_their_own_ids() -> None:
    text = "aé🎉\x00"
    assert BYTES.encode(text) == list(text.encode())
    assert (BYTES.vocab_size, BYTES.end_of_text) == (257, 256)


def test_bpe_merges_what_is_frequent() -> None:
    assert 257 < BPE.vocab_size <= 300
    assert len(BPE.encode(" return")) == 1
    assert len(BPE.encode("zqzqz")) == 5


def test_special_tokens_only_where_they_are_trusted() -> None:
    assert BPE.encode_with_specials(f"a{END_OF_TEXT}")[-1] == BPE.end_of_text
    assert BPE.end_of_text not in BPE.encode(f"a{END_OF_TEXT}")
    assert BPE.decode([BPE.end_of_text]) == ""
    assert BPE.decode([BPE.end_of_text], skip_special=False) == END_OF_TEXT


def test_streaming_never_shows_half_a_character() -> None:
    pieces = list(BYTES.stream("aé🎉".encode()))
    assert pieces == ["a", "", "é", "", "", "", "🎉", ""]
    assert "".join(BYTES.stream(b"\xf0\x9f")) == "\ufffd"


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    text = CORPUS[1] + "unseen Ω"
    assert again.encode(text) == BPE.encode(text)
    assert (again.vocab_size, again.end_of_text) == (BPE.vocab_size, BPE.end_of_text)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE"}}'])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        Tokenizer.load(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        Tokenizer.load(tmp_path)


def test_vocabulary_must_hold_the_bytes() -> None:
    with pytest.raises(ValueError, match="vocab_size: got 256"):
        Tokenizer.train(["x"], 256)
