"""Bits per byte on held-out text: a measure that does not depend on the tokenizer."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch

from foldscan import ops
from foldscan.data.sampler import sequential_batches
from foldscan.data.tokens import TokenFile
from foldscan.models import HybridLM


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    nats: summed over all predicted tokens, each document's end included.
    tokens, bytes, documents: what was read.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.bytes)


def autocast(precision: str) -> contextlib.AbstractContextManager[object]:
    """The context that a precision name stands for."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def documents_within(file: TokenFile, max_tokens: int) -> int:
    """Whole documents from the front of the file within ``max_tokens`` (0 for all), at least one."""
    return max(1, int((file.starts[1:] <= max_tokens).sum())) if max_tokens else file.num_documents


@torch.no_grad()
def evaluate(
    model: HybridLM,
    file: TokenFile,
    *,
    batch_tokens: int,
    seq_length: int,
    max_tokens: int = 0,
    precision: str = "fp32",
) -> Evaluation:
    """Evaluate on whole documents from the front of the file, at least one.

    Args:
        batch_tokens: tokens a forward.
        seq_length: documents are read in pieces of this length, each predicted without what is before it.
        max_tokens: stop before the document that would pass it; 0 for all.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
    """
    documents = documents_within(file, max_tokens)
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    try:
        for batch in sequential_batches(
            file, batch_tokens=batch_tokens, max_length=seq_length, max_documents=documents
        ):
            with autocast(precision):
                hidden = model(batch.input_ids, cu_seqlens=batch.cu_seqlens)
                loss = ops.linear_cross_entropy(hidden, model.head_weight, batch.labels, reduction="sum")
            nats += float(loss)
            tokens += batch.num_tokens
    finally:
        model.train(was_training)
    return Evaluation(nats, tokens, int(file.byte_starts[documents]), documents)
