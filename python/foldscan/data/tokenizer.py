"""Byte-level BPE tokenizers (and plain bytes as the BPE without merges) on the ``tokenizers`` library."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as _RustTokenizer

from foldscan.models.files import FormatError, atomic_write_text

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"


def _byte_characters() -> list[str]:
    """The printable character by which byte-level BPE writes each byte, as in GPT-2: itself where printable, else the
    next unused code point from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table, spare = [], 256
    for byte in range(256):
        if byte in printable:
            table.append(chr(byte))
        else:
            table.append(chr(spare))
            spare += 1
    return table


_CHARACTER_OF_BYTE = _byte_characters()
_BYTE_OF_CHARACTER = {c: b for b, c in enumerate(_CHARACTER_OF_BYTE)}


class Tokenizer:
    """Text to token ids and back, losslessly for any text.

    Build one with `train`, `raw_bytes` or `load`. Special tokens are never produced by `encode` from text: a document
    that spells ``<|endoftext|>`` cannot end itself. ``end_of_text`` is the id that separates documents.
    """

    def __init__(self, tokenizer: _RustTokenizer, *, end_of_text: str = END_OF_TEXT) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        found = tokenizer.token_to_id(end_of_text)
        if found is None:
            raise ValueError(f"end_of_text: token {end_of_text!r} is not in the vocabulary")
        self.end_of_text_token = end_of_text
        self.end_of_text: int = found
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self.special_ids: frozenset[int] = frozenset(special)
        self._bytes: list[bytes] = [self._bytes_of(i) for i in range(self.vocab_size)]

    def _bytes_of(self, token_id: int) -> bytes:
        text = self._tokenizer.id_to_token(token_id)
        if text is None:
            return b""
        if token_id in self.special_ids or any(c not in _BYTE_OF_CHARACTER for c in text):
            return text.encode()
        return bytes(_BYTE_OF_CHARACTER[c] for c in text)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> Tokenizer:
        """Train byte-level BPE (Sennrich et al., arXiv:1508.07909, over bytes as in GPT-2) on ``texts``.

        Args:
            texts: documents; read once.
            vocab_size: wanted size with the end-of-text token, at least 257. A small corpus may give fewer.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size: got {vocab_size}, want at least 257 (256 bytes and the end of text)")
        tokenizer = _RustTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def raw_bytes(cls) -> Tokenizer:
        """The tokenizer whose ids are the UTF-8 bytes 0..255; the end of text is 256."""
        vocab = {character: byte for byte, character in enumerate(_CHARACTER_OF_BYTE)}
        return cls.from_bpe(vocab, [], specials=[END_OF_TEXT])

    @classmethod
    def from_bpe(
        cls,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        specials: Sequence[str],
        split_digits: bool = False,
        end_of_text: str = END_OF_TEXT,
    ) -> Tokenizer:
        """Byte-level BPE from a vocabulary and merges, such as a GGUF file holds.

        Args:
            specials: tokens that text never produces; those not in ``vocab`` get the next ids.
            split_digits: every digit is a token of its own (SmolLM2).
        """
        tokenizer = _RustTokenizer(models.BPE(vocab=vocab, merges=list(merges)))
        steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if split_digits:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
        return cls(tokenizer, end_of_text=end_of_text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read ``tokenizer.json`` from a file or a model directory (the `tokenizers` library's own format).

        Raises:
            FormatError: missing, unreadable, or not byte-level.
        """
        file = Path(path)
        if file.is_dir():
            file = file / TOKENIZER_FILE
        if not file.is_file():
            raise FormatError(f"{file}: no such file")
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            tokenizer = _RustTokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises plain Exception
            raise FormatError(f"{file}: not a tokenizer file ({error})") from None
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise FormatError(f"{file}: field 'decoder' is {raw.get('decoder')!r}, want ByteLevel")
        specials = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        for name in (END_OF_TEXT, "<|im_end|>", "</s>"):
            if name in specials:
                return cls(tokenizer, end_of_text=name)
        raise FormatError(f"{file}: field 'added_tokens' is {specials!r}, want an end-of-text token {END_OF_TEXT!r}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json``; ``path`` is the file or an existing directory."""
        file = Path(path)
        if file.is_dir():
            file = file / TOKENIZER_FILE
        atomic_write_text(file, self._tokenizer.to_str(pretty=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with no special token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_specials(self, text: str) -> list[int]:
        """Token ids of trusted text in which special tokens may be spelled out, such as a chat template's."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its spelling, or None."""
        return self._tokenizer.token_to_id(token)

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """The bytes that ``ids`` stand for."""
        return b"".join(self._bytes[i] for i in ids if not (skip_special and i in self.special_ids))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode token by token, holding back the bytes of an unfinished character until it is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            if token_id not in self.special_ids:
                yield decoder.decode(self._bytes[token_id])
        yield decoder.decode(b"", final=True)
