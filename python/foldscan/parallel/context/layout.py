"""Which rank of a context-parallel group holds which tokens of a packed batch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from foldscan.ops import _checks
from foldscan.parallel.groups import Group, shares


@dataclass(frozen=True)
class Segment:
    """A run of neighbouring tokens that one rank holds.

    Attributes:
        index: its number in the batch.
        rank: which holds it. row: where it begins in the list of tokens of that rank.
        start, end: its positions in the whole batch.
        bounds: start, the starts of documents after it, end: the pieces of documents in it; (start,) when empty.
        origin: start of the document of its first token; less than ``start`` where the document comes from before.
        is_continued: whether its last token's document goes on after it.
    """

    index: int
    rank: int
    row: int
    start: int
    end: int
    bounds: tuple[int, ...]
    origin: int
    is_continued: bool

    @property
    def rows(self) -> int:
        return self.end - self.start

    @property
    def continues(self) -> bool:
        """Whether its first token's document began before it."""
        return self.origin < self.start

    @property
    def is_inside(self) -> bool:
        """Whether what came in from before goes on after it: it is one piece of a document that it continues."""
        return self.continues and self.is_continued and len(self.bounds) == 2

    @property
    def first_rows(self) -> int:
        """Tokens of its first document."""
        return self.bounds[1] - self.start if self.rows else 0

    @property
    def last_rows(self) -> int:
        """Tokens of its last document."""
        return self.end - self.bounds[-2] if self.rows else 0


@dataclass(frozen=True)
class Halo:
    """Rows that a rank needs of those just before its segments, and where they come from.

    Attributes:
        send: own rows that go to each rank, as indices into the local list.
        send_counts, receive_counts: how many go to and come from each rank.
        places: (segments of the rank, width) int64: which of the received rows, in the order of their arrival, stands
            at each place before a segment; the number of received rows where there is none of the same document.
        is_empty: whether no rank needs anything.
    """

    send: torch.Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    places: torch.Tensor
    is_empty: bool


class ContextLayout:
    """A packed batch cut into segments of (nearly) equal length, dealt to the ranks of a context-parallel group.

    With ``zigzag`` there are two segments a rank, and rank r holds segments r and 2 size - 1 - r, so that causal
    attention is the same work for all; without, rank r holds segment r. A rank's list of tokens is its segments in
    ascending order, end to end. Needs no process group, and communicates nothing.

    Args:
        total: T tokens, any number.
        cu_seqlens: (n + 1) int32 or integers: starts of the documents, then T. Documents may be empty.
        size: ranks.

    Attributes:
        all_segments: every `Segment`, ascending. counts: tokens of each rank.

    Raises:
        ValueError: sizes out of range, or boundaries that do not rise from 0 to ``total``.
    """

    def __init__(self, total: int, cu_seqlens: torch.Tensor | Sequence[int], size: int, zigzag: bool = True) -> None:
        starts = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else list(cu_seqlens)
        if total < 0 or size < 1:
            raise ValueError(f"total, size: got {total} and {size}, want at least 0 tokens and 1 rank")
        if not starts or starts[0] != 0 or starts[-1] != total or any(b < a for a, b in pairwise(starts)):
            shown = starts if len(starts) < 9 else f"{starts[:8]} .."
            raise ValueError(f"cu_seqlens: got {shown}, want values that rise from 0 to {total}")
        self.total, self.size = total, size
        self.zigzag = zigzag and size > 1  # one rank's two segments are neighbours, that is one
        self._starts = starts
        number = 2 * size if self.zigzag else size
        ends = [0, *accumulate(shares(total, number))]
        rows = [0] * size
        segments = []
        for i, (start, end) in enumerate(pairwise(ends)):
            rank = min(i, number - 1 - i) if self.zigzag else i
            first, last = bisect_right(starts, start), bisect_left(starts, end)
            bounds, origin, is_continued = (start,), start, False
            if start < end:
                bounds = (start, *dict.fromkeys(starts[first:last]), end)
                origin, is_continued = starts[first - 1], starts[last] > end
            segments.append(Segment(i, rank, rows[rank], start, end, bounds, origin, is_continued))
            rows[rank] += end - start
        self.all_segments = tuple(segments)
        self.counts = tuple(rows)
        self._made: dict[tuple[object, ...], Any] = {}

    def __repr__(self) -> str:
        return f"ContextLayout({self.total}, {len(self._starts) - 1} documents, {self.size}, zigzag={self.zigzag})"

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """Those of a rank, ascending."""
        return self._once(
            ("segments", rank), lambda: tuple(segment for segment in self.all_segments if segment.rank == rank)
        )

    def indices(self, rank: int) -> torch.Tensor:
        """(T_loc,) int64: positions of a rank's tokens in the whole batch, ascending."""
        return self._once(
            ("indices", rank), lambda: torch.cat([torch.arange(s.start, s.end) for s in self.segments(rank)])
        )

    def cu_seqlens(self, rank: int) -> torch.Tensor:
        """(pieces + 1,) int32: the pieces of documents in a rank's list; [0, 0] for a rank without tokens."""

        def make() -> torch.Tensor:
            starts = [s.row + bound - s.start for s in self.segments(rank) for bound in s.bounds[:-1]]
            return torch.tensor([*(starts or [0]), self.counts[rank]], dtype=torch.int32)

        return self._once(("cu_seqlens", rank), make)

    def piece_ids(self, rank: int) -> torch.Tensor:
        """(T_loc,) int32: which of the pieces of ``cu_seqlens`` a rank's tokens are in."""

        def make() -> torch.Tensor:
            lengths = self.cu_seqlens(rank).diff().long()
            return torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)

        return self._once(("piece_ids", rank), make)

    def rows_before(self, rank: int, position: int) -> int:
        """How many tokens of a rank stand before a position of the whole batch."""
        return sum(min(max(position - s.start, 0), s.rows) for s in self.segments(rank))

    def places(self) -> torch.Tensor:
        """(T,) int64: where each token stands when the lists of all ranks are laid end to end."""

        def make() -> torch.Tensor:
            order = torch.cat([self.indices(rank) for rank in range(self.size)])
            return torch.empty_like(order).scatter_(0, order, torch.arange(self.total))

        return self._once(("places",), make)

    def document_keys(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which keys the pieces of a rank see, all of their documents before them and themselves.

        Returns:
            (keys,) int64, rows of the lists of all ranks laid end to end, and (pieces + 1,) int32, where each piece's
            begin. Causal attention joins the last query and the last key of a piece.
        """

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            held = [s for s in self.segments(rank) if s.rows]
            spans = [torch.arange(s.origin, s.end) for s in held]
            ends = [(s.origin, *s.bounds[1:]) for s in held]
            lengths = [b - a for bounds in ends for a, b in pairwise(bounds)] or [0]
            index = self.places()[torch.cat([torch.arange(0), *spans])]
            return index, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

        return self._once(("document_keys", rank), make)

    def halo(self, rank: int, width: int) -> Halo:
        """What a rank needs of the ``width`` tokens before each of its segments, of the same document."""
        return self._once(("halo", rank, width), lambda: self._halo(rank, width))

    def _halo(self, rank: int, width: int) -> Halo:
        def wanted(other: int) -> list[int]:
            return sorted({p for s in self.segments(other) for p in _before(s, width)})

        wants = [wanted(other) for other in range(self.size)]
        sends = [[p for p in want if self._holder(p).rank == rank] for want in wants]
        receives = [[p for p in wants[rank] if self._holder(p).rank == other] for other in range(self.size)]
        arrival = {p: i for i, p in enumerate(p for received in receives for p in received)}
        places = []
        for s in self.segments(rank):
            known = [arrival[p] for p in _before(s, width)]
            places.append([len(arrival)] * (width - len(known)) + known)
        rows = [p - s.start + s.row for send in sends for p in send for s in (self._holder(p),)]
        return Halo(
            send=torch.tensor(rows, dtype=torch.int64),
            send_counts=tuple(map(len, sends)),
            receive_counts=tuple(map(len, receives)),
            places=torch.tensor(places, dtype=torch.int64),
            is_empty=not any(wants),
        )

    def check_group(self, group: Group) -> None:
        """Raise ValueError for a group of another size."""
        if group.size != self.size:
            raise ValueError(f"group: got {group.size} ranks, want {self.size} as the layout has")

    def check_rows(self, name: str, tensor: torch.Tensor, rank: int, *more: int | str) -> None:
        """Raise TypeError or ValueError unless the tensor has a rank's rows and ``more`` dimensions."""
        _checks.tensor(name, tensor)
        _checks.shape(name, tensor, self.counts[rank], *more)

    def _holder(self, position: int) -> Segment:
        return self.all_segments[bisect_right(self.all_segments, position, key=lambda s: s.end)]

    def _once(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """Layers ask for the same again and again."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _before(segment: Segment, width: int) -> range:
    """Positions of the ``width`` tokens before a segment that are of its first token's document."""
    return range(max(segment.origin, segment.start - width), segment.start)
