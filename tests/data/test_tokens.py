"""Token files hold exactly what was written, appear whole or not at all, and say what is wrong with them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from foldscan.data import TokenFile, Tokenizer, write_token_file
from foldscan.models import FormatError

TOKENIZER = Tokenizer.raw_bytes()
TEXTS = ["hello", "", "naïve", "x" * 1000]


def test_documents_come_back_with_their_boundaries(tmp_path: Path) -> None:
    file = write_token_file(tmp_path / "t", TEXTS, TOKENIZER, batch=2)
    assert file.num_documents == len(TEXTS)
    for index, text in enumerate(TEXTS):
        assert file.document(index).tolist() == [256, *text.encode()]
    assert file.num_tokens == sum(len(t.encode()) + 1 for t in TEXTS)
    assert file.num_bytes == sum(len(t.encode()) for t in TEXTS)
    assert file.tokens.dtype == np.uint16
    assert isinstance(file.tokens, np.memmap)


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    big = Tokenizer.from_bpe(
        {**{c: i for i, c in enumerate(TOKENIZER._tokenizer.get_vocab())}, "zz": 70000}, [], specials=["<|endoftext|>"]
    )
    big.vocab_size = 70001
    assert write_token_file(tmp_path / "t", ["a"], big).tokens.dtype == np.uint32


def test_a_failing_source_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_token_file(path, ["old"], TOKENIZER)

    def broken() -> Iterator[str]:
        yield "new"
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write_token_file(path, broken(), TOKENIZER, overwrite=True, batch=1)
    assert TokenFile(path).document(0).tolist() == [256, *b"old"]
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    write_token_file(tmp_path / "t", ["old"], TOKENIZER)
    with pytest.raises(FileExistsError):
        write_token_file(tmp_path / "t", ["new"], TOKENIZER)
    write_token_file(tmp_path / "t", ["new"], TOKENIZER, overwrite=True)
    assert TokenFile(tmp_path / "t").document(0).tolist() == [256, *b"new"]


def test_no_document_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document"):
        write_token_file(tmp_path / "t", [], TOKENIZER)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "field 'format'"),
        ({"version": 9}, "field 'version'"),
        ({"dtype": "int8"}, "field 'dtype'"),
        ({"tokens": 99}, r"tokens\.bin"),
        ({"documents": 9}, r"documents\.bin"),
        ({"vocab_size": "many"}, "field 'vocab_size'"),
    ],
)
def test_a_wrong_header_names_file_and_field(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_token_file(tmp_path / "t", TEXTS, TOKENIZER)
    header = tmp_path / "t" / "header.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), **change}))
    with pytest.raises(FormatError, match=message) as caught:
        TokenFile(tmp_path / "t")
    assert str(tmp_path) in str(caught.value)


def test_a_cut_file_and_broken_boundaries_are_noticed(tmp_path: Path) -> None:
    write_token_file(tmp_path / "t", TEXTS, TOKENIZER)
    table = tmp_path / "t" / "documents.bin"
    good = np.fromfile(table, "<i8")
    good[2] = 10**6
    good.tofile(table)
    with pytest.raises(FormatError, match="starts do not rise"):
        TokenFile(tmp_path / "t")
    tokens = tmp_path / "t" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"tokens\.bin: .* bytes long"):
        TokenFile(tmp_path / "t")
