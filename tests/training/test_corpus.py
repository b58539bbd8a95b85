"""Preparing a corpus: done once, done again when the choice of documents changes, and split as told."""

from pathlib import Path

from foldscan.data import Document
from foldscan.training import prepare
from foldscan.training.corpus import take_bytes

DOCUMENTS = [Document(f"d{i}", f"text number {i}\n" * (i + 1)) for i in range(20)]


def stamp(folder: Path) -> int:
    return (folder / "train.tokens" / "header.json").stat().st_mtime_ns


def test_it_is_done_once_for_one_choice(tmp_path: Path) -> None:
    first = prepare(tmp_path, "stdlib", 300, documents=(DOCUMENTS[:15], DOCUMENTS[15:]))
    written = stamp(tmp_path)
    again = prepare(tmp_path, "stdlib", 300, documents=(DOCUMENTS[:15], DOCUMENTS[15:]))
    assert stamp(tmp_path) == written
    assert again.tokenizer.encode("text") == first.tokenizer.encode("text")
    assert again.train.num_documents == 15 and again.valid is not None and again.valid.num_documents == 5
    for vocab, split in ((300, 14), (257, 14)):
        other = prepare(tmp_path, "stdlib", vocab, documents=(DOCUMENTS[:split], DOCUMENTS[split:]))
        assert other.train.num_documents == split and stamp(tmp_path) != written
        written = stamp(tmp_path)
    assert other.tokenizer.encode("ab") == [97, 98]


def test_held_out_documents_keep_their_text(tmp_path: Path) -> None:
    data = prepare(tmp_path, "stdlib", 257, documents=(DOCUMENTS[:15], DOCUMENTS[15:]))
    assert data.valid is not None
    texts = {data.tokenizer.decode(data.valid.document(i).tolist()) for i in range(5)}
    assert texts == {d.text for d in DOCUMENTS[15:]}


def test_taking_bytes_is_stable_and_about_right() -> None:
    some = take_bytes(DOCUMENTS, 800)
    sizes = [len(d.text) for d in some]
    assert sum(sizes) >= 800 > sum(sizes[:-1])
    assert some == take_bytes(DOCUMENTS[::-1], 800)
    assert take_bytes(DOCUMENTS, 0) == [] and len(take_bytes(DOCUMENTS, 10**9)) == 20
