"""Memory-mapped token files with document boundaries.

A token file is a directory of three files:

* ``header.json``: format, version, dtype, counts, the size of the vocabulary, what it was made from;
* ``tokens.bin``: the tokens of all documents one after another, little-endian uint16 (vocabularies up to 65,536) or
  uint32; every document begins with the end-of-text token, so that its first real token has something to be
  predicted from;
* ``documents.bin``: int64 (documents + 1, 2): where each document starts in tokens and in bytes of original text; the
  last row is the two totals. The byte column is what bits per byte is measured against.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from foldscan.data.tokenizer import Tokenizer
from foldscan.models.files import FormatError, atomic_directory, read_json, want_field, write_json

FORMAT = "foldscan-tokens"
VERSION = 1


class TokenFile:
    """A token file opened for reading. Nothing is loaded until it is indexed.

    Attributes:
        tokens: memory map, (T,) uint16 or uint32.
        starts: (documents + 1,) int64, the first token of each document, then T.
        byte_starts: (documents + 1,) int64, the same in bytes of original text.
        vocab_size: ids are below it.
        end_of_text: the id that begins every document.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header_path = self.path / "header.json"
        self.header: dict[str, Any] = read_json(header_path)
        if self.header.get("format") != FORMAT:
            raise FormatError(f"{header_path}: field 'format' is {self.header.get('format')!r}, want {FORMAT!r}")
        if self.header.get("version") != VERSION:
            raise FormatError(f"{header_path}: field 'version' is {self.header.get('version')!r}, want {VERSION}")
        dtype = want_field(self.header, "dtype", str, header_path)
        if dtype not in ("uint16", "uint32"):
            raise FormatError(f"{header_path}: field 'dtype' is {dtype!r}, want 'uint16' or 'uint32'")
        count = want_field(self.header, "tokens", int, header_path)
        documents = want_field(self.header, "documents", int, header_path)
        self.vocab_size: int = want_field(self.header, "vocab_size", int, header_path)
        self.end_of_text: int = want_field(self.header, "end_of_text", int, header_path)
        self.tokens = self._map("tokens.bin", np.dtype(dtype), count)
        table = self._map("documents.bin", np.dtype(np.int64), 2 * (documents + 1)).reshape(-1, 2)
        self.starts: npt.NDArray[np.int64] = np.ascontiguousarray(table[:, 0])
        self.byte_starts: npt.NDArray[np.int64] = np.ascontiguousarray(table[:, 1])
        where = self.path / "documents.bin"
        if self.starts[0] != 0 or self.starts[-1] != count or bool((np.diff(self.starts) <= 0).any()):
            raise FormatError(f"{where}: token starts do not rise from 0 to 'tokens' = {count}")

    def _map(self, name: str, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        file = self.path / name
        want = count * dtype.itemsize
        got = file.stat().st_size if file.is_file() else -1
        if got != want:
            state = "missing" if got < 0 else f"{got} bytes long"
            raise FormatError(f"{file}: {state}, want {want} bytes for {count} values of {dtype.name}")
        if count == 0:
            return np.empty(0, dtype)
        return np.memmap(file, dtype=dtype.newbyteorder("<"), mode="r", shape=(count,))

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def num_bytes(self) -> int:
        return int(self.byte_starts[-1])

    def document(self, index: int) -> npt.NDArray[Any]:
        """The tokens of one document, with the end-of-text token in front."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


def write_token_file(
    path: str | os.PathLike[str],
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    source: str = "",
    overwrite: bool = False,
    batch: int = 256,
) -> TokenFile:
    """Tokenise ``texts`` (one a document) into a token file, atomically, in memory for ``batch`` documents at a time.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is false.
        ValueError: there is no document at all.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    table = [(0, 0)]
    with atomic_directory(path, overwrite=overwrite) as work:
        iterator = iter(texts)
        with open(work / "tokens.bin", "wb") as file:
            while block := list(islice(iterator, batch)):
                for text, ids in zip(block, tokenizer.encode_batch(block)):
                    array = np.empty(len(ids) + 1, dtype)
                    array[0] = tokenizer.end_of_text
                    array[1:] = ids
                    file.write(array.astype(dtype.newbyteorder("<"), copy=False).tobytes())
                    tokens, size = table[-1]
                    table.append((tokens + len(array), size + len(text.encode())))
        if len(table) == 1:
            raise ValueError("texts: got no document, want at least one")
        (work / "documents.bin").write_bytes(np.array(table, dtype="<i8").tobytes())
        write_json(
            work / "header.json",
            {
                "format": FORMAT,
                "version": VERSION,
                "dtype": dtype.name,
                "tokens": table[-1][0],
                "documents": len(table) - 1,
                "bytes": table[-1][1],
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
                "source": source,
            },
        )
    return TokenFile(path)
