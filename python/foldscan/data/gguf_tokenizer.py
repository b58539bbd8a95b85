"""The tokenizer inside a GGUF file."""

from __future__ import annotations

from pathlib import Path

from foldscan.data.tokenizer import END_OF_TEXT, Tokenizer
from foldscan.models.files import FormatError
from foldscan.models.gguf import read_gguf_vocabulary


def gguf_tokenizer(path: str | Path) -> Tokenizer:
    """Build the byte-level BPE that a GGUF file (or the one in a folder) describes; SmolLM2's splits digits.

    Raises:
        FormatError: no GGUF file, another kind of tokenizer, or a pre-tokenizer that is not known here.
    """
    file = Path(path)
    if file.is_dir():
        files = sorted(file.rglob("*.gguf"))
        if not files:
            raise FormatError(f"{file}: no .gguf file in it")
        file = files[0]
    vocabulary, merges, specials, kind = read_gguf_vocabulary(file)
    if kind not in ("default", "gpt-2", "smollm"):
        raise FormatError(f"{file}: field 'tokenizer.ggml.pre' is {kind!r}, want 'smollm' or 'gpt-2'")
    end = END_OF_TEXT if END_OF_TEXT in specials else specials[0] if specials else END_OF_TEXT
    return Tokenizer.from_bpe(vocabulary, merges, specials=specials, split_digits=kind == "smollm", end_of_text=end)
