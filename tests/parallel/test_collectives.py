"""Collectives of uneven rows on gloo: values, adjoints, order of sums, bytes, every dtype, nothing at all."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from foldscan.parallel import adjoint, collectives
from foldscan.parallel.groups import Group, shares

WORLD = 3
# Rows that rank i sends to rank j: uneven, to nobody, from nobody.
SENDS = ([[2, 0, 3], [1, 4, 0], [0, 0, 2]], [[0, 0, 0], [5, 1, 2], [0, 3, 0]], [[0] * 3] * 3, [[1] * 3] * 3)
COUNTS = ([2, 0, 3], [1, 1, 1], [0, 0, 0], [0, 4, 0])


def rows_of(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that say where they come from."""
    values = 100 * rank + torch.arange(rows * 2).view(rows, 2)
    return values.to(dtype)


def check_values(group: Group, dtype: torch.dtype) -> None:
    rank = group.index
    for table in SENDS:
        receive = [table[i][rank] for i in range(WORLD)]
        got = collectives.all_to_all(rows_of(rank, sum(table[rank]), dtype), table[rank], receive, group)
        want = [rows_of(i, sum(table[i]), dtype).split(table[i])[rank] for i in range(WORLD)]
        assert torch.equal(got, torch.cat(want))
    for counts in COUNTS:
        got = collectives.all_gather(rows_of(rank, counts[rank], dtype), counts, group)
        assert torch.equal(got, torch.cat([rows_of(i, n, dtype) for i, n in enumerate(counts)]))
        got = collectives.reduce_scatter(rows_of(rank, sum(counts), dtype), counts, group)
        whole = sum(rows_of(i, sum(counts), dtype).double() for i in range(WORLD))
        assert isinstance(whole, torch.Tensor)
        assert torch.equal(got, whole.to(dtype).split(counts)[rank])
    got = collectives.ring_shift(rows_of(rank, rank + 1, dtype), (rank - 1) % WORLD + 1, group)
    assert torch.equal(got, rows_of((rank - 1) % WORLD, (rank - 1) % WORLD + 1, dtype))
    got = collectives.ring_shift(rows_of(rank, 2, dtype), 2, group, back=True)
    assert torch.equal(got, rows_of((rank + 1) % WORLD, 2, dtype))


def check_sums_are_ordered(group: Group) -> None:
    """1e8 + 1 - 1e8 in fp32 is 0 from front to back and 1 in another order; in bf16 the sum is rounded once."""
    mine = torch.tensor([[1e8, 1.0, -1e8][group.index]])
    assert float(collectives.all_sum(mine, group)) == 0.0
    assert float(collectives.reduce_scatter(mine.repeat(3, 1), [1, 1, 1], group)) == 0.0
    halves = torch.tensor([[256.0, 1.0, 1.0][group.index]], dtype=torch.bfloat16)
    assert float(collectives.all_sum(halves, group)) == 258.0  # 256 + 1 alone would round to 256 in bf16


def check_adjoint(group: Group) -> None:
    """<collective(x), y> = <x, collective^T(y)>, both summed over the ranks."""
    generator = torch.Generator().manual_seed(group.index)

    def check(forward: object, rows: int) -> None:
        x = torch.randn(rows, 3, dtype=torch.float64, generator=generator, requires_grad=True)
        out = forward(x)  # type: ignore[operator]
        y = torch.randn(out.shape, dtype=torch.float64, generator=generator)
        out.backward(y)
        assert x.grad is not None
        both = torch.stack([(out * y).sum(), (x * x.grad).sum()]).detach()
        left, right = collectives.all_sum(both, group).tolist()
        assert abs(left - right) < 1e-12 * max(1.0, abs(left))
        assert rows == 0 or out.numel() == 0 or x.grad.abs().sum() > 0 or both.abs().sum() == 0

    rank = group.index
    for table in SENDS:
        receive = [table[i][rank] for i in range(WORLD)]
        check(lambda x, t=table, r=receive: adjoint.all_to_all(x, t[rank], r, group), sum(table[rank]))
    for counts in COUNTS:
        check(lambda x, c=counts: adjoint.all_gather(x, c, group), counts[rank])
        check(lambda x, c=counts: adjoint.reduce_scatter(x, c, group), sum(counts))


def check_bytes(group: Group) -> None:
    rank = group.index
    with collectives.count_traffic() as traffic:
        x = torch.zeros(sum(SENDS[0][rank]), 5, dtype=torch.bfloat16, requires_grad=True)
        receive = [SENDS[0][i][rank] for i in range(WORLD)]
        adjoint.all_to_all(x, SENDS[0][rank], receive, group, label="tokens").sum().backward()
        collectives.all_gather(torch.zeros(rank, 7), list(range(WORLD)), group)
        collectives.reduce_scatter(torch.zeros(WORLD, 4, dtype=torch.float64), [1] * WORLD, group)
    others = [i for i in range(WORLD) if i != rank]
    forward, backward = (sum(rows[i] for i in others) for rows in (SENDS[0][rank], receive))
    assert traffic.bytes("all_to_all", label="tokens") == (forward + backward) * 5 * 2
    assert traffic.calls["all_to_all", "world", "tokens"] == 2
    assert traffic.bytes("all_to_all", receivers=[rank]) == 0
    assert traffic.bytes("all_gather") == rank * 7 * 4 * 2
    assert traffic.bytes("reduce_scatter", axes="world") == 2 * 4 * 8
    assert traffic.bytes(axes="tp") == 0


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    group = Group("world", tuple(range(WORLD)), rank, dist.group.WORLD)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64):
        check_values(group, dtype)
    check_sums_are_ordered(group)
    check_adjoint(group)
    check_bytes(group)
    assert collectives.exchange_counts([rank, 7], group) == [[i, 7] for i in range(WORLD)]
    dist.destroy_process_group()


def test_three_ranks(tmp_path: Path) -> None:
    mp.start_processes(worker, (str(tmp_path),), WORLD, start_method="spawn")


def test_one_rank_needs_no_process_group() -> None:
    group = Group("tp", (0,), 0)
    x = torch.randn(3, 2, requires_grad=True)
    with collectives.count_traffic() as traffic:
        assert torch.equal(collectives.all_to_all(x, [3], [3], group), x)
        assert torch.equal(collectives.all_gather(x, [3], group), x)
        assert torch.equal(collectives.reduce_scatter(x, [3], group), x)
        assert torch.equal(collectives.all_sum(x, group), x)
        assert torch.equal(collectives.ring_shift(x, 3, group), x)
        assert adjoint.all_gather(x, [3], group) is x
    assert traffic.bytes() == 0


def test_what_is_depended_on_gets_zeros() -> None:
    """So that a rank that used nothing of what it got still comes to the backward of the collective that brought it."""
    x, used = torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    unused = used * 2
    seen: list[torch.Tensor] = []
    unused.register_hook(seen.append)
    out = adjoint.depend(x, unused, None)
    assert torch.equal(out, x)
    (out * 3).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 3.0))
    assert used.grad is not None and torch.equal(used.grad, torch.zeros(2, 2))
    assert len(seen) == 1
    assert adjoint.depend(x.detach(), used).requires_grad and not adjoint.depend(x.detach(), None).requires_grad


def test_errors_name_the_argument() -> None:
    group = Group("tp", (0,), 0)
    x = torch.zeros(3, 2)
    for call, message in (
        (lambda: collectives.all_to_all(x, [2], [2], group), "send: got .2., 2 rows in all, want 3"),
        (lambda: collectives.all_to_all(x, [3, 0], [3], group), "send: got 2 numbers of rows, want one for each"),
        (lambda: collectives.all_gather(x, [-1], group), "counts: got .-1."),
        (lambda: collectives.reduce_scatter(x, [4], group), "counts: got .4., 4 rows in all, want 3"),
        (lambda: Group("tp", (0, 1), 0), "process_group: got None for 2 ranks"),
        (lambda: Group("tp", (0,), 1), "index: got 1"),
    ):
        try:
            call()
        except ValueError as error:
            assert re.search(message, str(error)), error
        else:
            raise AssertionError(f"no error, want {message}")


def test_shares_are_even_and_complete() -> None:
    for total in range(20):
        for parts in range(1, 9):
            found = shares(total, parts)
            assert sum(found) == total and len(found) == parts and max(found) - min(found) <= 1
