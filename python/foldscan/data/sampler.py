"""Packed training batches: deterministic, shuffled, and resumable at any batch from a few integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from foldscan.data.tokens import TokenFile

IGNORE = -100


@dataclass(frozen=True)
class PackedBatch:
    """Pieces of documents laid end to end; no token of one piece sees another piece.

    Attributes:
        input_ids: (T,) int64.
        labels: (T,) int64, the token that follows each input in its document; the end of text after the last one.
        cu_seqlens: (n + 1,) int32, where each piece starts, then T.
        document_bytes: bytes of original text of the documents that end in this batch (sequential reading only).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    document_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.numel())


def _pieces(file: TokenFile, max_length: int) -> npt.NDArray[np.int64]:
    """(pieces, 2) start and end of every document cut at multiples of ``max_length`` from its start."""
    lengths = np.diff(file.starts)
    counts = -(-lengths // max_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = file.starts[:-1][document] + (np.arange(len(document)) - first) * max_length
    end = np.minimum(start + max_length, file.starts[1:][document])
    return np.stack([start, end], axis=1)


def _gather(file: TokenFile, spans: list[tuple[int, int]], document_bytes: int = 0) -> PackedBatch:
    sizes = [end - start for start, end in spans]
    inputs = np.empty(sum(sizes), np.int64)
    labels = np.empty_like(inputs)
    at = 0
    for (start, end), size in zip(spans, sizes):
        inputs[at : at + size] = file.tokens[start:end]
        labels[at : at + size - 1] = inputs[at + 1 : at + size]
        # Every document begins with the end of text, so the token after a document's last is just that.
        labels[at + size - 1] = file.tokens[end] if end < file.num_tokens else file.end_of_text
        at += size
    cu = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return PackedBatch(torch.from_numpy(inputs), torch.from_numpy(labels), torch.from_numpy(cu), document_bytes)


class PackedSampler:
    """Endless shuffled batches of exactly ``batch_tokens`` tokens.

    Documents are cut into pieces of at most ``max_length`` tokens; the pieces of an epoch are visited in a random
    order that depends on (seed, epoch) alone, so the position is two integers and a resumed run reads on where the
    stopped one would have. A piece that does not fit is cut, and its rest opens the next batch.

    Args:
        file: the tokens.
        batch_tokens: tokens a batch.
        max_length: longest piece.
        seed: of the order.

    Raises:
        ValueError: a size that is not positive, or a file without tokens.
    """

    def __init__(self, file: TokenFile, *, batch_tokens: int, max_length: int, seed: int = 0) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: got {batch_tokens}, want at least 1")
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}, want at least 1")
        if file.num_tokens == 0:
            raise ValueError(f"file: {file.path} holds no tokens")
        self.file, self.batch_tokens, self.max_length, self.seed = file, batch_tokens, max_length, seed
        self._table = _pieces(file, max_length)
        self._epoch, self._piece, self._offset = 0, 0, 0
        self._order = self._permutation(0)

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        key = np.array([self.seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        return generator.permutation(len(self._table))

    def state(self) -> dict[str, int]:
        """The position of the next batch, and what it was computed with, as JSON-able integers."""
        return {
            "epoch": self._epoch,
            "piece": self._piece,
            "offset": self._offset,
            "seed": self.seed,
            "batch_tokens": self.batch_tokens,
            "max_length": self.max_length,
            "tokens": self.file.num_tokens,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: the state belongs to other data, another seed or other sizes.
        """
        here = self.state()
        for name in ("seed", "batch_tokens", "max_length", "tokens"):
            if state.get(name) != here[name]:
                raise ValueError(f"state[{name!r}]: got {state.get(name)}, want {here[name]}")
        self._epoch, self._piece, self._offset = state["epoch"], state["piece"], state["offset"]
        self._order = self._permutation(self._epoch)

    @property
    def epochs(self) -> float:
        """How often the data was read so far."""
        return self._epoch + self._piece / len(self._table)

    def next(self) -> PackedBatch:
        """The next batch."""
        spans: list[tuple[int, int]] = []
        room = self.batch_tokens
        while room:
            start, end = (int(v) for v in self._table[self._order[self._piece]])
            start += self._offset
            take = min(room, end - start)
            spans.append((start, start + take))
            room -= take
            if start + take < end:
                self._offset += take
                continue
            self._offset = 0
            self._piece += 1
            if self._piece == len(self._order):
                self._epoch, self._piece = self._epoch + 1, 0
                self._order = self._permutation(self._epoch)
        return _gather(self.file, spans)


def sequential_batches(
    file: TokenFile, *, batch_tokens: int, max_length: int, max_documents: int | None = None
) -> Iterator[PackedBatch]:
    """Whole documents in file order for evaluation, in batches of about ``batch_tokens`` tokens.

    Pieces are never cut at a batch's end (a batch is at most ``batch_tokens + max_length - 1`` tokens), and the bytes
    of a document are counted in the batch where it ends, so that the sums over all batches give bits per byte.
    """
    if batch_tokens < 1 or max_length < 1:
        raise ValueError(f"batch_tokens, max_length: got {batch_tokens}, {max_length}, want at least 1")
    documents = file.num_documents if max_documents is None else min(max_documents, file.num_documents)
    spans: list[tuple[int, int]] = []
    held, text_bytes = 0, 0
    for index in range(documents):
        start, end = int(file.starts[index]), int(file.starts[index + 1])
        while start < end:
            stop = min(start + max_length, end)
            spans.append((start, stop))
            held += stop - start
            start = stop
            if start == end:
                text_bytes += int(file.byte_starts[index + 1] - file.byte_starts[index])
            if held >= batch_tokens:
                yield _gather(file, spans, text_bytes)
                spans, held, text_bytes = [], 0, 0
    if spans:
        yield _gather(file, spans, text_bytes)
