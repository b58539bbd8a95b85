"""Dropping: the kept set, local and of whole sequences, and dropped and padded dispatch."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from foldscan.parallel import FoldedMesh
from foldscan.parallel.collectives import count_traffic
from foldscan.parallel.dispatchers import Dropping, make_dispatcher, run
from foldscan.parallel.groups import Group, shares

WORLD = 4
E = 6


def routing(tokens: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Skewed, with equal probabilities, some zero, and empty slots."""
    g = torch.Generator().manual_seed(seed)
    experts = (torch.rand(tokens, E, generator=g) + torch.linspace(0, 0.8, E)).argsort(1, descending=True)[:, :k]
    experts[torch.rand(experts.shape, generator=g) < 0.1] = -1
    return torch.randint(0, 5, (tokens, k), generator=g) / 4.0, experts


def slow(probs: torch.Tensor, experts: torch.Tensor, factor: float, policy: str) -> torch.Tensor:
    """One expert after another."""
    tokens, k = experts.shape
    capacity = math.ceil(tokens * k / E * factor)
    out = experts.flatten().tolist()
    values = probs.flatten().tolist()
    for e in range(E):
        found = [i for i, x in enumerate(out) if x == e]
        if policy == "probs":
            found.sort(key=lambda i: (-values[i], i))
        for i in found[capacity:]:
            out[i] = -1
    return torch.tensor(out, dtype=torch.int64).view(tokens, k)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_the_kept_set_of_a_rank_is_exact(policy: str) -> None:
    for tokens, k, factor in ((0, 2, 1.0), (1, 1, 1.0), (17, 2, 1.0), (40, 3, 0.5), (40, 3, 0.0625), (30, E, 1.3)):
        probs, experts = routing(tokens, k, tokens)
        dropping = Dropping(factor, policy)  # type: ignore[arg-type]
        got = dropping.apply(probs, experts, E)
        assert torch.equal(got, slow(probs, experts, factor, policy))
        assert torch.equal(dropping.apply(probs.double(), experts.int(), E), got.int())
        if tokens >= 40:
            assert (got < 0).sum() > (experts < 0).sum()  # something was dropped


def test_position_keeps_the_earliest_and_equal_probabilities_too() -> None:
    experts, probs = torch.zeros(5, 1, dtype=torch.int64), torch.tensor([[0.2], [0.7], [0.7], [0.7], [0.1]])
    kept = {p: Dropping(1.2, p).apply(probs, experts, 3).flatten().tolist() for p in ("probs", "position")}
    assert kept == {"probs": [-1, 0, 0, -1, -1], "position": [0, 0, -1, -1, -1]}  # ceil(5 / 3 * 1.2) = 2


def test_errors_name_the_argument() -> None:
    probs, experts = routing(4, 2, 0)
    whole, alone = Dropping(1.0, scope="sequence"), Group("cp", (0,), 0)
    for call, message in (
        (lambda: Dropping(0.0), "capacity_factor: got 0.0"),
        (lambda: Dropping(1.0, "random"), "policy: got 'random'"),  # type: ignore[arg-type]
        (lambda: Dropping(1.0, scope="batch"), "scope: got 'batch'"),  # type: ignore[arg-type]
        (lambda: Dropping(1.0, scope="sequence", pad=True), "pad: got True with scope='sequence'"),
        (lambda: whole.apply(probs, experts, E), "group: got None"),
        (
            lambda: whole.apply(probs, experts, E, alone, torch.arange(3)),
            "order: got shape .3,., want .4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert Dropping(1.0).capacity_of(4, 2, E) is None and Dropping(1.0, pad=True).capacity_of(4, 2, E) == 2


def layouts(mesh: FoldedMesh, tokens: int) -> list[torch.Tensor]:
    """Positions in the sequence of each tp-cp rank's tokens: cp zigzag, each part over tp."""
    pieces = torch.arange(tokens).split(shares(tokens, 2 * mesh.cp))
    found = []
    for cp in range(mesh.cp):
        part = torch.cat([pieces[cp], pieces[2 * mesh.cp - 1 - cp]])
        found += part.split(shares(len(part), mesh.tp))
    return found


def check_sequences(group: Group, mesh: FoldedMesh) -> None:
    """The same kept set as one rank finds on the whole sequence."""
    for tokens, k, factor in ((37, 2, 1.0), (40, 3, 0.4), (3, 2, 1.0), (0, 2, 1.0)):
        probs, experts = routing(tokens, k, tokens + 1)
        places = layouts(mesh, tokens)
        mine = places[group.index]
        for policy in ("probs", "position"):
            dropping = Dropping(factor, policy, "sequence")  # type: ignore[arg-type]
            want = slow(probs, experts, factor, policy)
            got = dropping.apply(probs[mine], experts[mine], E, group, torch.cat(places))
            assert torch.equal(got, want[mine]), (tokens, policy, mesh)
            straight = experts.split(shares(tokens, group.size))[group.index]
            got = dropping.apply(probs.split(shares(tokens, group.size))[group.index], straight, E, group)
            assert torch.equal(got, want.split(shares(tokens, group.size))[group.index])


def check_padded(ep: Group, etp: Group) -> None:
    """Padded is unpadded bit for bit, gradients too, and asks nobody for a number of rows."""
    tokens, k = 12, 3
    for factor, policy in ((1.0, "probs"), (0.5, "position"), (2.0, "probs")):
        dropping = Dropping(factor, policy, pad=True)  # type: ignore[arg-type]
        probs, experts = routing(tokens, k, 10 * ep.index + etp.index)
        experts = dropping.apply(probs, experts, E)
        capacity = dropping.capacity_of(tokens, k, E)
        assert capacity is not None
        x = torch.randn(tokens, 7, generator=torch.Generator().manual_seed(ep.index))
        weight = torch.randn(E // ep.size, 7, generator=torch.Generator().manual_seed(5))
        for name in ("allgather", "alltoall", "dedup"):
            results = []
            for options in ({}, {"capacity": capacity, "tokens_per_rank": tokens}):
                leaves = [v.clone().requires_grad_() for v in (x, probs, weight)]

                def compute(
                    rows: torch.Tensor, p: torch.Tensor, e: torch.Tensor, w: torch.Tensor = leaves[2]
                ) -> torch.Tensor:
                    assert (p[e < 0] == 0).all() and (rows[e[:, 0] < 0] == 0).all()
                    return torch.where(e < 0, 0.0, p * torch.tanh(rows * w[e[:, 0]]))

                with count_traffic() as traffic:
                    out = run(make_dispatcher(name, E, ep, etp), leaves[0], leaves[1], experts, compute, **options)
                    grads = torch.autograd.grad(out.square().sum(), leaves)
                results.append([out.detach(), *grads[:2]])
                if options:
                    asked = traffic.calls.keys()
                    assert not [key for key in asked if key[2] == "counts"]
                    assert name != "alltoall" or not [key for key in asked if key[2] == "metadata"]
                    if name == "alltoall":
                        sent = (ep.size - 1) * E // ep.size * capacity
                        assert traffic.bytes(axes="ep", label="tokens") == 4 * sent * 7 * 4
            for plain, padded in zip(*results):
                assert torch.equal(plain, padded), (name, factor)
        with pytest.raises(ValueError, match=re.escape("capacity: got 0, want")):
            make_dispatcher("dedup", E, ep, etp).dispatch_preprocess(x, probs, experts, capacity=0)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    for mesh in (
        FoldedMesh(WORLD, tp=2, cp=2, ep=2, etp=2),
        FoldedMesh(WORLD, cp=4, ep=2),
        FoldedMesh(WORLD, tp=2, etp=4),
        FoldedMesh(WORLD),
    ):
        groups = mesh.init_process_groups()
        check_sequences(groups.group("tp-cp"), mesh)
        check_padded(groups.group("ep"), groups.group("etp"))
    dist.destroy_process_group()


def test_sequences_and_padding_on_four_ranks(tmp_path: Path) -> None:
    mp.start_processes(worker, (str(tmp_path),), WORLD, start_method="spawn")
