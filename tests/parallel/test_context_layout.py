"""Who holds what: every token once, documents' pieces, what crosses the borders of segments."""

from __future__ import annotations

import pytest
import torch
from context_cases import BATCHES, SIZES, random_batches
from foldscan.parallel.context import ContextLayout

CASES = [(cu, size, zigzag) for cu in (*BATCHES, *random_batches(40, 5)) for size in SIZES for zigzag in (True, False)]


def document_of(cu: tuple[int, ...], position: int) -> int:
    return max(d for d in range(len(cu) - 1) if cu[d] <= position < cu[d + 1])


def test_every_token_is_on_one_rank_and_segments_are_even() -> None:
    for cu, size, zigzag in CASES:
        layout = ContextLayout(cu[-1], cu, size, zigzag)
        everything = torch.cat([layout.indices(rank) for rank in range(size)])
        assert everything.dtype == torch.int64
        assert sorted(everything.tolist()) == list(range(cu[-1]))
        assert [len(layout.indices(rank)) for rank in range(size)] == list(layout.counts)
        lengths = [s.rows for s in layout.all_segments]
        assert len(lengths) == (2 * size if zigzag and size > 1 else size)
        assert max(lengths) - min(lengths) <= 1
        together = torch.arange(cu[-1])[everything]
        assert torch.equal(together[layout.places()], torch.arange(cu[-1]))
        for rank in range(size):
            assert layout.indices(rank).tolist() == sorted(layout.indices(rank).tolist())
            numbers = [s.index for s in layout.segments(rank)]
            assert numbers == ([rank, 2 * size - 1 - rank] if layout.zigzag else [rank])
            for p in range(cu[-1] + 1):
                assert layout.rows_before(rank, p) == int((layout.indices(rank) < p).sum())


def test_pieces_are_runs_of_one_document_in_one_segment() -> None:
    for cu, size, zigzag in CASES:
        layout = ContextLayout(cu[-1], cu, size, zigzag)
        for rank in range(size):
            positions = layout.indices(rank).tolist()
            runs = [
                (s.index, document_of(cu, p)) for s in layout.segments(rank) for p in positions if s.start <= p < s.end
            ]
            starts = [i for i in range(len(runs)) if i == 0 or runs[i] != runs[i - 1]]
            bounds = layout.cu_seqlens(rank)
            assert bounds.dtype == torch.int32
            assert bounds.tolist() == [*(starts or [0]), len(runs)]
            ids = [sum(start <= i for start in starts) - 1 for i in range(len(runs))]
            assert layout.piece_ids(rank).tolist() == ids and layout.piece_ids(rank).dtype == torch.int32


def test_what_a_segment_says_of_its_documents() -> None:
    for cu, size, zigzag in CASES:
        for s in ContextLayout(cu[-1], cu, size, zigzag).all_segments:
            if s.rows == 0:
                assert (s.continues, s.is_continued, s.is_inside, s.first_rows, s.last_rows) == (False,) * 3 + (0, 0)
                continue
            documents = [document_of(cu, p) for p in range(s.start, s.end)]
            assert s.origin == cu[documents[0]]
            assert s.continues == (s.start > 0 and document_of(cu, s.start - 1) == documents[0])
            assert s.is_continued == (s.end < cu[-1] and document_of(cu, s.end) == documents[-1])
            assert s.is_inside == (s.continues and s.is_continued and len(set(documents)) == 1)
            assert s.first_rows == documents.count(documents[0])
            assert s.last_rows == documents.count(documents[-1])


def test_keys_of_a_piece_are_its_document_up_to_its_end() -> None:
    for cu, size, zigzag in CASES:
        layout = ContextLayout(cu[-1], cu, size, zigzag)
        everything = torch.cat([layout.indices(rank) for rank in range(size)])
        for rank in range(size):
            index, bounds = layout.document_keys(rank)
            pieces = layout.indices(rank).tensor_split(layout.cu_seqlens(rank)[1:-1].long())
            assert len(bounds) == len(pieces) + 1 and int(bounds[-1]) == len(index)
            for piece, keys in zip(pieces, everything[index].tensor_split(bounds[1:-1].long())):
                if len(piece):
                    first = cu[document_of(cu, int(piece[0]))]
                    assert keys.tolist() == list(range(first, int(piece[-1]) + 1))


def test_the_halo_holds_what_stands_before_each_segment() -> None:
    for cu, size, zigzag in CASES:
        layout = ContextLayout(cu[-1], cu, size, zigzag)
        for width in (1, 3, 7):
            halos = [layout.halo(rank, width) for rank in range(size)]
            sent = [layout.indices(r)[halos[r].send].split(halos[r].send_counts) for r in range(size)]
            for rank, halo in enumerate(halos):
                assert list(halo.receive_counts) == [len(sent[other][rank]) for other in range(size)]
                got = torch.cat([sent[other][rank] for other in range(size)] + [torch.tensor([-1])])
                assert halo.places.shape == (len(layout.segments(rank)), width)
                for segment, found in zip(layout.segments(rank), got[halo.places].tolist()):
                    before = range(segment.start - width, segment.start)
                    assert found == [
                        p if segment.rows and p >= 0 and document_of(cu, p) == document_of(cu, segment.start) else -1
                        for p in before
                    ]
                assert halo.is_empty == all(sum(h.send_counts) == 0 for h in halos)


def test_it_is_made_once_and_takes_a_tensor() -> None:
    layout = ContextLayout(9, torch.tensor([0, 4, 9], dtype=torch.int32), 2)
    assert layout.indices(1) is layout.indices(1) and layout.halo(0, 3) is layout.halo(0, 3)
    assert layout.indices(0).tolist() == [0, 1, 6, 7, 8] and layout.indices(1).tolist() == [2, 3, 4, 5]
    assert layout.cu_seqlens(1).tolist() == [0, 2, 4]
    assert repr(layout) == "ContextLayout(9, 2 documents, 2, zigzag=True)"


def test_errors_name_the_argument() -> None:
    for total, cu in ((5, (0, 4)), (5, (1, 5)), (5, (0, 3, 2, 5)), (5, ())):
        with pytest.raises(ValueError, match=r"cu_seqlens: got .*, want values that rise from 0 to 5"):
            ContextLayout(total, cu, 2)
    with pytest.raises(ValueError, match="total, size: got 5 and 0"):
        ContextLayout(5, (0, 5), 0)
    with pytest.raises(ValueError, match="total, size: got -1 and 2"):
        ContextLayout(-1, (0, -1), 2)
