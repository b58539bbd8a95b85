"""From a corpus name to a tokenizer and two token files in a folder, once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foldscan.data import Document, TokenFile, Tokenizer, load_corpus, write_token_file
from foldscan.data.tokenizer import TOKENIZER_FILE


@dataclass
class PreparedData:
    """A tokenizer and the files made with it."""

    tokenizer: Tokenizer
    train: TokenFile
    valid: TokenFile | None


def _by_hash(documents: Sequence[Document]) -> list[Document]:
    """Held-out documents in the order of a hash of their names, so that any prefix is a fair sample."""
    return sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())


def take_bytes(documents: Sequence[Document], limit: int) -> list[Document]:
    """Documents of about ``limit`` bytes in all, chosen in the order of a hash of their names."""
    taken, size = [], 0
    for document in _by_hash(documents):
        if size >= limit:
            break
        taken.append(document)
        size += len(document.text.encode())
    return taken


def _digest(*parts: list[Document]) -> str:
    """A short name for a choice of documents."""
    names = [[(d.name, len(d.text)) for d in part] for part in parts]
    return hashlib.sha256(repr(names).encode()).hexdigest()[:16]


def prepare(
    folder: Path,
    corpus: str,
    vocab_size: int,
    *,
    documents: tuple[list[Document], list[Document]] | None = None,
) -> PreparedData:
    """Train a tokenizer on a corpus and write its token files, or open what an earlier call left.

    Args:
        folder: gets ``tokenizer.json``, ``train.tokens`` and ``valid.tokens``.
        corpus: a name of `foldscan.data.CORPORA`.
        vocab_size: 257 for raw bytes, else byte-level BPE trained on the training documents.
        documents: (training, held-out) to use instead of all of the corpus.
    """
    source = f"{corpus}/{vocab_size}/{'all' if documents is None else _digest(*documents)}"
    train_path, valid_path = folder / "train.tokens", folder / "valid.tokens"
    if (folder / TOKENIZER_FILE).is_file() and train_path.is_dir() and valid_path.is_dir():
        train, valid = TokenFile(train_path), TokenFile(valid_path)
        if train.header.get("source") == valid.header.get("source") == source:
            return PreparedData(Tokenizer.load(folder), train, valid)
    training, held_out = documents or load_corpus(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [d.text for d in training]
    tokenizer = Tokenizer.raw_bytes() if vocab_size == 257 else Tokenizer.train(texts, vocab_size)
    tokenizer.save(folder / TOKENIZER_FILE)
    train = write_token_file(train_path, texts, tokenizer, source=source, overwrite=True)
    held_texts = [d.text for d in _by_hash(held_out)]
    valid = write_token_file(valid_path, held_texts, tokenizer, source=source, overwrite=True)
    return PreparedData(tokenizer, train, valid)
