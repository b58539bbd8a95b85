"""On four processes with gloo: bytes sent, groups inside a mesh, and whole layers through the seam in `foldscan.nn`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from foldscan.nn import Attention, CacheStep, Mamba2Mixer, Packing, positions_of
from foldscan.parallel import FoldedMesh
from foldscan.parallel.collectives import Traffic, all_sum, count_traffic
from foldscan.parallel.context import (
    ContextLayout,
    ContextParallel,
    context_conv,
    context_scan,
    gathered_attention,
    ring_attention,
)
from foldscan.parallel.groups import Group, shares
from foldscan.parallel.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding
from torch import nn

WORLD = 4
HIDDEN = 24
METHODS: tuple[Literal["ring", "all_gather"], ...] = ("ring", "all_gather")
TIMEOUT = timedelta(seconds=60)
BATCHES = ((0, 0, 5, 5, 16, 17, 41, 45, 45), (0, 37), (0, 3), (0, 0))


def counted(run: Callable[[], torch.Tensor]) -> tuple[Traffic, Traffic]:
    """What a rank sends forward and backward."""
    with count_traffic() as forward:
        out = run()
    with count_traffic() as backward:
        out.sum().backward()
    return forward, backward


def check_bytes(group: Group) -> None:
    """(cp - 1) K and V a ring and a gathering forward, 3 and 2 times that with backward; states; the halo."""
    size, heads, width, dtype = group.size, 2, 8, torch.bfloat16
    others = [i for i in range(size) if i != group.index]
    for total in (64, 61):
        layout = ContextLayout(total, (0, total), size)
        rows = layout.counts[group.index]
        q = torch.randn(rows, 4, width, dtype=dtype, requires_grad=True)
        kv = torch.randn(2, rows, heads, width, dtype=dtype, requires_grad=True)
        forward, backward = counted(lambda q=q, kv=kv, layout=layout: ring_attention(q, *kv, layout, group))
        # What is passed on after one's own: everyone's keys but those of the next rank, which go no further.
        keys = [2 * count * heads * width * 2 for count in layout.counts]
        passed = sum(keys) - keys[(group.index + 1) % size]
        assert forward.bytes("all_to_all", label="kv") == forward.bytes() == passed
        assert backward.bytes(label="kv") == passed
        assert backward.bytes(label="dkv") == sum(keys) - keys[group.index]
        assert backward.bytes() == passed + sum(keys) - keys[group.index]
        if total == 64:
            assert forward.bytes() + backward.bytes() == 3 * (size - 1) * 2 * rows * heads * width * 2
        following = group.ranks[(group.index + 1) % size]
        assert forward.bytes(receivers=[following]) == passed, "a ring sends to one neighbour"

        forward, backward = counted(lambda q=q, kv=kv, layout=layout: gathered_attention(q, *kv, layout, group))
        assert forward.bytes("all_gather", label="kv") == forward.bytes() == (size - 1) * keys[group.index]
        assert backward.bytes("reduce_scatter") == backward.bytes() == sum(keys[i] for i in others)

        x = torch.randn(rows, 6, requires_grad=True)
        forward, backward = counted(lambda x=x, layout=layout: context_conv(x, torch.ones(6, 4), None, layout, group))
        halos = [layout.halo(rank, 3) for rank in range(size)]
        assert forward.bytes("all_to_all") == sum(halos[group.index].send_counts[i] for i in others) * 6 * 4
        assert backward.bytes("all_to_all") == sum(halos[i].send_counts[group.index] for i in others) * 6 * 4
        assert 0 < sum(h.send_counts[i] for h in halos for i in others) <= 3 * (2 * size - 1)

        H, P, N = 4, 3, 5
        x, B = torch.randn(rows, H, P, requires_grad=True), torch.randn(rows, 2, N)
        dt, A = torch.rand(rows, H), -torch.rand(H)
        forward, backward = counted(
            lambda x=x, dt=dt, A=A, B=B, layout=layout: context_scan(x, dt, A, B, B, layout, group)
        )
        going_on = [sum(s.is_continued for s in layout.segments(rank)) for rank in range(size)]
        state = H * (P * N + 1) * 4
        assert (
            forward.bytes("all_gather", label="states") == forward.bytes() == going_on[group.index] * (size - 1) * state
        )
        assert backward.bytes("reduce_scatter") == sum(going_on[i] for i in others) * state
        assert sum(going_on) == 2 * size - 1
    aligned = ContextLayout(64, range(0, 65, 8), size)
    rows = aligned.counts[group.index]
    x = torch.randn(rows, 4, 3, requires_grad=True)
    dt, A, B = torch.rand(rows, 4), -torch.rand(4), torch.randn(rows, 2, 5)
    forward, _ = counted(lambda: context_scan(x, dt, A, B, B, aligned, group))
    more, _ = counted(lambda: context_conv(x.flatten(1), torch.ones(12, 4), None, aligned, group))
    assert forward.calls == more.calls == {}, "nothing crosses, nothing is said"


class Layers(nn.Module):
    """The layers that look at other tokens, one after another."""

    def __init__(self) -> None:
        super().__init__()
        heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
        mamba = {"num_heads": 4, "head_dim": 6, "num_groups": 2, "state_size": 5}
        self.layers = nn.ModuleList(
            [
                Attention(HIDDEN, rope_theta=1e4, **heads),
                Mamba2Mixer(HIDDEN, **mamba),
                Attention(HIDDEN, sliding_window=7, qk_norm_eps=1e-5, **heads),
                Mamba2Mixer(HIDDEN, norm=False, **mamba),
            ]
        )
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, packing)
        return x


def check_layers(group: Group, dtype: torch.dtype, tolerance: float) -> None:
    """Layers on a rank's rows equal the layers on the whole batch; gradients of weights, summed over ranks, too."""
    whole, divided = Layers().to(dtype), Layers().to(dtype)
    for cu in BATCHES:
        total = cu[-1]
        generator = torch.Generator().manual_seed(total)
        x, upstream = (torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64).to(dtype) for _ in "xu")
        starts, longest = torch.tensor(cu, dtype=torch.int32), max(b - a for a, b in pairwise(cu))
        positions = positions_of(starts, total)
        leaf = x.clone().requires_grad_()
        whole.zero_grad()
        want = whole(leaf, Packing(starts, longest, positions))
        if total:
            want.backward(upstream)
        for method in METHODS:
            for zigzag in (True, False):
                layout = ContextLayout(total, cu, group.size, zigzag)
                index = layout.indices(group.index)
                context = ContextParallel(layout, group, method)
                packing = Packing(layout.cu_seqlens(group.index), longest, positions[index], context=context)
                mine = x[index].clone().requires_grad_()
                divided.zero_grad()
                h = divided(mine, packing)
                h.backward(upstream[index])
                case = (cu, method, zigzag, dtype)
                pairs = [("out", h.detach(), want.detach()[index])]
                if total:
                    assert mine.grad is not None and leaf.grad is not None
                    pairs.append(("input", mine.grad, leaf.grad[index]))
                for (name, p), q in zip(divided.named_parameters(), whole.parameters()):
                    assert p.grad is not None, (case, name)
                    pairs.append((name, all_sum(p.grad, group), torch.zeros_like(p) if q.grad is None else q.grad))
                for name, got, right in pairs:
                    scale = max(float(right.abs().max()), 1.0) if right.numel() else 1.0
                    error = float((got - right).abs().max()) / scale if right.numel() else 0.0
                    assert error <= tolerance, f"{case}: {name} is off by {error:.1e}"


def check_vocabulary(group: Group) -> None:
    counts, V = shares(11, group.size), 9
    generator = torch.Generator().manual_seed(1)
    table, head = (torch.randn(V, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True) for _ in "th")
    ids, targets = (torch.randint(0, V, (11,), generator=generator) for _ in "it")
    rows = nn.functional.embedding(ids, table)
    want = nn.functional.cross_entropy(rows @ head.T, targets, reduction="none")
    want.sum().backward()
    mine = [t.detach().split(shares(V, group.size))[group.index].clone().requires_grad_() for t in (table, head)]
    known = {"counts": counts, "vocab_size": V}
    loss = vocab_parallel_cross_entropy(
        vocab_parallel_embedding(ids, mine[0], group, **known), mine[1], targets, group, **known
    )
    loss.sum().backward()
    torch.testing.assert_close(loss, want.split(counts)[group.index], rtol=1e-10, atol=1e-10)
    for got, right in zip(mine, (table, head)):
        assert got.grad is not None and right.grad is not None
        right = right.grad.split(shares(V, group.size))[group.index]
        torch.testing.assert_close(got.grad, right, rtol=1e-10, atol=1e-10)

    with torch.autocast("cpu", torch.bfloat16):
        rows = rows.detach().float().split(counts)[group.index].requires_grad_()
        forward, backward = counted(
            lambda: vocab_parallel_cross_entropy(rows, mine[1].detach().float(), targets, group, **known)
        )
    others = [i for i in range(group.size) if i != group.index]
    own, theirs = counts[group.index], sum(counts[i] for i in others)
    assert forward.bytes("all_gather", label="head") == own * len(others) * HIDDEN * 2
    assert forward.bytes("all_to_all", label="loss") == theirs * 2 * 4
    assert backward.bytes("reduce_scatter", label="head") == theirs * HIDDEN * 2
    assert backward.bytes("all_to_all", label="loss") == own * len(others) * 2 * 4


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=TIMEOUT
    )
    everyone = FoldedMesh(WORLD, cp=WORLD).init_process_groups().group("cp")
    check_bytes(everyone)
    check_layers(everyone, torch.float64, 1e-10)
    check_layers(everyone, torch.float32, 1e-5)
    check_vocabulary(everyone)
    # Two groups of two, along either axis of a mesh.
    pairs = FoldedMesh(WORLD, tp=2, cp=2).init_process_groups()
    check_bytes(pairs.group("cp"))
    check_layers(pairs.group("cp"), torch.float64, 1e-10)
    check_vocabulary(pairs.group("tp"))
    dist.destroy_process_group()


def test_four_ranks(tmp_path: Path) -> None:
    mp.start_processes(worker, (str(tmp_path),), WORLD, start_method="spawn")


def test_one_rank_through_the_seam_has_the_bits_without() -> None:
    cu = (0, 5, 5, 16)
    layers, x = Layers(), torch.randn(16, HIDDEN)
    starts = torch.tensor(cu, dtype=torch.int32)
    positions = positions_of(starts, 16)
    layout = ContextLayout(16, cu, 1)
    context = ContextParallel(layout, Group("cp", (0,), 0))
    with count_traffic() as traffic:
        got = layers(x, Packing(layout.cu_seqlens(0), 11, positions, context=context))
    assert torch.equal(got, layers(x, Packing(starts, 11, positions))) and traffic.calls == {}


def test_a_cache_excludes_a_context() -> None:
    starts, positions = torch.tensor([0, 2], dtype=torch.int32), torch.arange(2)
    step = CacheStep.__new__(CacheStep)
    context = ContextParallel(ContextLayout(2, (0, 2), 1), Group("cp", (0,), 0))
    with pytest.raises(ValueError, match="context: got one beside a cache, want one or the other"):
        Packing(starts, 2, positions, step, context)
