"""Collectives over rows of any number a rank, and a count of what they send.

Everything that ranks tell each other passes through here (pipeline stages aside, which `torch.distributed.pipelining`
connects), so that a run's bytes can be compared with a plan's. Sums are made by the receiver in the order of the ranks
and in at least fp32, whatever the backend: the same bits in every run. What they are to autograd stands in
`foldscan.parallel.adjoint`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from foldscan.parallel.groups import Group


@dataclass
class Traffic:
    """Bytes that this rank sent, its own share of a collective not counted.

    Attributes:
        sent: bytes by (collective, axes, label, receiving rank).
        calls: how often, by (collective, axes, label).
    """

    sent: dict[tuple[str, str, str, int], int] = field(default_factory=dict)
    calls: dict[tuple[str, str, str], int] = field(default_factory=dict)

    def bytes(
        self,
        collective: str | None = None,
        axes: str | None = None,
        label: str | None = None,
        receivers: Sequence[int] | None = None,
    ) -> int:
        """The sum over all records that agree with what is given."""
        return sum(
            size
            for (c, a, l, r), size in self.sent.items()
            if collective in (None, c) and axes in (None, a) and label in (None, l)
            if receivers is None or r in receivers
        )

    def records(self, rank: int, node: int) -> list[dict[str, Any]]:
        """All of it as plain values, one record for each (collective, axes, label).

        Args:
            rank: who sent it. node: ranks of a node, where ``[0, node)`` are the first.

        Returns:
            ``collective``, ``axes``, ``label``, ``calls``, ``bytes``, and of these ``intra`` and ``inter``: inside the
            node and out of it. What a gather or a reduce-scatter sends to several ranks of another node is counted as
            leaving once, to be passed on there.
        """
        found = []
        for (collective, axes, label), calls in self.calls.items():
            away: dict[int, list[int]] = {}
            total = 0
            for (c, a, l, receiver), size in self.sent.items():
                if (c, a, l) == (collective, axes, label):
                    total += size
                    if receiver // node != rank // node:
                        away.setdefault(receiver // node, []).append(size)
            inter = sum(sum(sizes) if collective == "all_to_all" else max(sizes) for sizes in away.values())
            record = {"collective": collective, "axes": axes, "label": label, "calls": calls}
            found.append({**record, "bytes": total, "intra": total - inter, "inter": inter})
        return found

    def add(self, collective: str, group: Group, label: str, sizes: Sequence[int]) -> None:
        key = (collective, group.axes, label)
        self.calls[key] = self.calls.get(key, 0) + 1
        for member, (rank, size) in enumerate(zip(group.ranks, sizes)):
            if member != group.index:
                self.sent[(*key, rank)] = self.sent.get((*key, rank), 0) + size


# PyTorch 2.13 gave the first a new name and warns of the old one.
_gather_equal = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_recording: list[Traffic] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends while the context is open, in forward and in backward."""
    traffic = Traffic()
    _recording.append(traffic)
    try:
        yield traffic
    finally:
        _recording.remove(traffic)


class PeerError(RuntimeError):
    """Another rank is gone, or did not come in time."""


def verdict(backend_says: str) -> str:
    """What a backend's error means for the one who waited."""
    if "imed out" in backend_says:
        return "did not come in time: stalled, or dead on another machine"
    if "onnection" in backend_says or "Read error" in backend_says:
        return "is gone: its process died or left"
    return "could not be reached"


@contextlib.contextmanager
def _explained(collective: str, group: Group) -> Iterator[None]:
    """Who was waiting for whom, before what the backend says of it."""
    try:
        yield
    except RuntimeError as error:
        others = [rank for rank in group.ranks if rank != group.ranks[group.index]]
        raise PeerError(
            f"in {collective} over {group.axes}, one of the ranks {others} {verdict(str(error))} ({error})"
        ) from error


def _record(collective: str, group: Group, label: str, sizes: Sequence[int]) -> None:
    for traffic in _recording:
        traffic.add(collective, group, label, sizes)


def all_to_all(
    x: torch.Tensor, send: Sequence[int], receive: Sequence[int], group: Group, *, label: str = "rows"
) -> torch.Tensor:
    """Send ``send[i]`` rows of x, in order, to member i, and lay what the members sent here end to end.

    Args:
        x: (sum(send), ...).
        receive: rows that come from each member: its ``send`` for this rank.
        label: what the rows are, for the count of bytes.

    Returns:
        (sum(receive), ...).
    """
    _check_counts("send", send, x.shape[0], group)
    _check_counts("receive", receive, None, group)
    width = x[:1].numel() * x.element_size() if x.shape[0] else x.new_empty(1, *x.shape[1:]).nbytes
    _record("all_to_all", group, label, [rows * width for rows in send])
    out = x.new_empty(sum(receive), *x.shape[1:])
    if group.size == 1:
        return out.copy_(x)
    _exchange("all_to_all", _bytes(out, width), _bytes(x, width), receive, send, group)
    return out


def all_gather(x: torch.Tensor, counts: Sequence[int], group: Group, *, label: str = "rows") -> torch.Tensor:
    """Everyone's rows in the order of the ranks.

    Args:
        x: (counts[own], ...). counts: rows of every member.

    Returns:
        (sum(counts), ...).
    """
    _check_counts("counts", counts, None, group)
    _check_counts("counts", counts[group.index : group.index + 1], x.shape[0], None)
    x = x.contiguous()
    _record("all_gather", group, label, [x.nbytes] * group.size)
    out = x.new_empty(sum(counts), *x.shape[1:])
    if group.size == 1:
        return out.copy_(x)
    if out.numel() == 0:
        return out
    width = out.nbytes // out.shape[0]
    if len(set(counts)) == 1:
        with _explained("all_gather", group):
            _gather_equal(_bytes(out, width), _bytes(x, width), group=group.process_group)
    else:
        copies = _bytes(x, width).repeat(group.size, 1)
        _exchange("all_gather", _bytes(out, width), copies, counts, [x.shape[0]] * group.size, group)
    return out


def reduce_scatter(x: torch.Tensor, counts: Sequence[int], group: Group, *, label: str = "rows") -> torch.Tensor:
    """Member i gets the sum over all ranks of the i-th run of ``counts[i]`` rows.

    Summed in the order of the ranks, in fp32 (fp64 for fp64), rounded once to the dtype of x.

    Args:
        x: (sum(counts), ...).

    Returns:
        (counts[own], ...).
    """
    own = counts[group.index]
    if group.size == 1:
        _check_counts("counts", counts, x.shape[0], group)
        return x
    _check_counts("counts", counts, x.shape[0], group)
    width = x.new_empty(1, *x.shape[1:]).nbytes
    _record("reduce_scatter", group, label, [rows * width for rows in counts])
    parts = x.new_empty(group.size * own, *x.shape[1:])
    _exchange("reduce_scatter", _bytes(parts, width), _bytes(x, width), [own] * group.size, counts, group)
    return ordered_sum(parts.view(group.size, own, *x.shape[1:]))


def ring_shift(x: torch.Tensor, rows: int, group: Group, *, back: bool = False, label: str = "rows") -> torch.Tensor:
    """Send x to the next member (with ``back`` to the one before) and get ``rows`` rows from the other side."""
    if group.size == 1:
        return x
    step = -1 if back else 1
    send, receive = [0] * group.size, [0] * group.size
    send[(group.index + step) % group.size] = x.shape[0]
    receive[(group.index - step) % group.size] = rows
    return all_to_all(x, send, receive, group, label=label)


def all_sum(x: torch.Tensor, group: Group, *, label: str = "sums") -> torch.Tensor:
    """The sum over the group, in the order of the ranks, on every rank: for small tensors."""
    return ordered_sum(all_gather(x[None], [1] * group.size, group, label=label))


def exchange_counts(counts: Sequence[int], group: Group) -> list[list[int]]:
    """What every member says in a few integers, as host values: element [i] is member i's list."""
    mine = torch.tensor([list(counts)], dtype=torch.int64)
    return all_gather(mine, [1] * group.size, group, label="counts").tolist()


def ordered_sum(parts: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension from front to back, in at least fp32, rounded once to the dtype of ``parts``."""
    if not parts.is_floating_point():
        return parts.sum(0)
    total = parts[0].to(torch.promote_types(parts.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


def _exchange(
    what: str, out: torch.Tensor, x: torch.Tensor, receive: Sequence[int], send: Sequence[int], group: Group
) -> None:
    with _explained(what, group):
        dist.all_to_all_single(out, x, list(receive), list(send), group=group.process_group)


def _bytes(x: torch.Tensor, width: int) -> torch.Tensor:
    """Rows as raw bytes, so that every dtype travels on every backend."""
    return x.contiguous().view(-1).view(torch.uint8).view(x.shape[0], width)


def _check_counts(name: str, counts: Sequence[int], rows: int | None, group: Group | None) -> None:
    if group is not None and len(counts) != group.size:
        raise ValueError(f"{name}: got {len(counts)} numbers of rows, want one for each of the {group.size} ranks")
    if any(count < 0 for count in counts):
        raise ValueError(f"{name}: got {list(counts)}, want numbers of rows")
    if rows is not None and sum(counts) != rows:
        raise ValueError(f"{name}: got {list(counts)}, {sum(counts)} rows in all, want {rows} as x has")
