"""Ranks as threads of one process: what `foldscan.parallel.collectives` asks of torch.distributed, in shared memory.

A process takes seconds to start, a thread none, so that many sizes of groups fit into a test. What gloo itself does is
checked on processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from foldscan.parallel import collectives
from foldscan.parallel.groups import Group

T = TypeVar("T")


class Exchange:
    """A process group whose members lay down what they send and wait for each other."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.sent: list[Any] = [None] * size
        self.index = threading.local()

    def swap(self, tensors: Any) -> list[Any]:
        self.sent[self.index.value] = tensors
        self.barrier.wait()
        everything = list(self.sent)
        self.barrier.wait()
        return everything


def _all_to_all_single(
    out: torch.Tensor, x: torch.Tensor, receive: list[int], send: list[int], group: Exchange
) -> None:
    parts = group.swap((x.clone().split(send), receive))
    me = group.index.value
    for source, (sent, _) in enumerate(parts):
        assert sent[me].shape[0] == receive[source], f"rank {me} awaits {receive[source]} rows of rank {source}"
    out.copy_(torch.cat([sent[me] for sent, _ in parts]))


def _gather_equal(out: torch.Tensor, x: torch.Tensor, group: Exchange) -> None:
    out.copy_(torch.cat(group.swap(x.clone())))


def run_ranks(size: int, worker: Callable[[Group], T], monkeypatch: pytest.MonkeyPatch) -> list[T]:
    """``worker(group)`` on every rank of a group of ``size``; the results in their order, or the first error."""
    if size == 1:
        return [worker(Group("cp", (0,), 0))]
    monkeypatch.setattr(collectives, "dist", SimpleNamespace(all_to_all_single=_all_to_all_single))
    monkeypatch.setattr(collectives, "_gather_equal", _gather_equal)
    exchange = Exchange(size)
    results: list[Any] = [None] * size
    errors: list[Exception] = []

    def run(rank: int) -> None:
        exchange.index.value = rank
        try:
            group: Any = Group("cp", tuple(range(size)), rank, exchange)  # type: ignore[arg-type]
            results[rank] = worker(group)
        except Exception as error:
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
