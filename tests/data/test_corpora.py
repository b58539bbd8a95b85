"""Corpora: the standard library is read as source, Austen without R, and the split depends on names alone."""

import struct
import zlib
from pathlib import Path

import pytest
from foldscan.data import is_held_out, load_corpus
from foldscan.data.corpora import austen, stdlib
from foldscan.models import FormatError


def test_the_standard_library_is_source_without_tests_and_strangers() -> None:
    documents = {d.name: d.text for d in stdlib()}
    assert "import" in documents["json/decoder.py"]
    assert not [n for n in documents if n.startswith(("test/", "site-packages/", "encodings/")) or "/tests/" in n]
    assert sum(map(len, documents.values())) > 4_000_000


def test_the_split_is_by_name_and_complete() -> None:
    training, held_out = load_corpus("stdlib")
    assert len(training) + len(held_out) == len(list(stdlib()))
    assert all(is_held_out(d.name) for d in held_out) and not any(is_held_out(d.name) for d in training)
    share = sum(map(len, (d.text for d in held_out))) / sum(map(len, (d.text for d in training)))
    assert 0.005 < share < 0.2
    names = [f"file{i}" for i in range(10000)]
    assert 0.04 < sum(map(is_held_out, names)) / len(names) < 0.06


def test_a_folder_of_sources_is_read_with_its_encodings(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 'é'\n", encoding="utf-8")
    (tmp_path / "b.py").write_bytes(b"# -*- coding: latin-1 -*-\ny = '\xe9'\n")
    (tmp_path / "broken.py").write_bytes(b"z = '\xff\xfe'\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "c.py").write_text("t = 1\n")
    found = {d.name: d.text for d in stdlib(tmp_path)}
    assert set(found) == {"a.py", "b.py"}
    assert "é" in found["a.py"] and "é" in found["b.py"]


def r_object(lines: list[bytes], letter: bytes = b"") -> bytes:
    """An entry of an R lazy-load file with one character vector."""
    records = b"".join(b"\x00\x04\x00\x09" + struct.pack(">i", len(line)) + line for line in lines)
    raw = b"X\nheader" + records + b"trailer"
    return struct.pack(">i", len(raw)) + letter + zlib.compress(raw)


def test_austen_is_read_from_the_r_file(tmp_path: Path) -> None:
    body = b"It is a truth universally acknowledged. " * 8
    # A line that looks like a record in itself must not start one.
    tricky = b"\x00\x04\x00\x09\x00\x00\x00\x02ab" + b"." * 20
    book = [b"PRIDE", b"Chapter 1", body, b"CHAPTER II", body + tricky]
    (tmp_path / "Rdata.rdb").write_bytes(r_object(book) + r_object([b"TITLE", b"Chapter 1", body], b"Z"))
    documents = list(austen(tmp_path))
    assert [d.name for d in documents] == ["austen/0/1", "austen/0/2", "austen/1/1"]
    assert documents[0].text.startswith("Chapter 1\nIt is a truth")
    assert tricky.decode("utf-8", "replace") in documents[1].text


def test_a_broken_r_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "Rdata.rdb").write_bytes(b"\x00\x00\x00\x05garbage garbage")
    with pytest.raises(FormatError, match=r"Rdata\.rdb"):
        list(austen(tmp_path))
    with pytest.raises(FormatError, match=r"no Rdata\.rdb"):
        list(austen(tmp_path / "nowhere"))


def test_an_unknown_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'latin'"):
        load_corpus("latin")
