"""What dispatchers send, to the byte, and what they promise beside results: no state, no hang, static shapes."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dispatch_oracle import HIDDEN, OUT, WIDTH, Case, Here, same, through
from foldscan import ops
from foldscan.parallel import FoldedMesh
from foldscan.parallel.collectives import all_sum, count_traffic
from foldscan.parallel.dispatchers import make_dispatcher, run
from foldscan.parallel.groups import Group

WORLD, E = 4, 8
NAMES = ("allgather", "alltoall", "dedup")
Sent = dict[str, tuple[int, int]]


def rows_sent(name: str, here: Here, case: Case) -> tuple[Sent, Sent]:
    """Rows that this rank sends by axis, (with tokens out, with sums back), counted one assignment after another.

    The second is of slots with a probability each.
    """
    EP, ETP, local = here.ep.size, here.etp.size, E // here.ep.size
    chosen = [part.tolist() for part in case.experts.split(case.tokens)]

    def wanted(source: int, rank: int) -> tuple[int, int]:
        """Tokens of a block member that EP member ``rank`` has experts of, and rows there."""
        loads = [sum(e >= 0 and e // local == rank for e in slots) for slots in chosen[source]]
        return sum(n > 0 for n in loads), sum(loads)

    me, k = here.number, case.slots
    others = [r for r in range(EP) if r != here.ep.index]
    arrived = [(member, [rank * ETP + member for rank in range(EP)]) for member in range(ETP)]
    mine = dict(arrived)[here.etp.index]
    their_rows = sum(wanted(s, here.ep.index)[1] for m, ss in arrived if m != here.etp.index for s in ss)
    if name == "allgather":
        out = len(chosen[me]) * (EP - 1)
        back = sum(len(chosen[r * ETP + here.etp.index]) for r in others)
        gathered = sum(len(chosen[s]) for s in mine)
    else:
        which = int(name == "alltoall")
        out = sum(wanted(me, r)[which] for r in others)
        back = sum(wanted(s, here.ep.index)[which] for s in mine if s != me)
        gathered = sum(wanted(s, here.ep.index)[which] for s in mine)
    slots = 1 if name == "alltoall" else k
    tokens = {"ep": (out, back), "etp": ((ETP - 1) * gathered, their_rows)}
    # Probabilities go by slots of what is gathered, there and back.
    their_slots = sum(
        len(chosen[s]) if name == "allgather" else wanted(s, here.ep.index)[int(name == "alltoall")]
        for m, ss in arrived
        if m != here.etp.index
        for s in ss
    )
    return tokens, {"ep": (out * slots, back * slots), "etp": ((ETP - 1) * gathered * slots, their_slots * slots)}


def check_bytes(here: Here, case: Case) -> None:
    case.draw()
    size = case.dtype.itemsize
    for name in NAMES:
        tokens, probs = rows_sent(name, here, case)
        leaves = [here.own(case, v).requires_grad_() for v in (case.x, case.probs)]
        up, gate, down = here.weights(case, here.ep.index, here.etp.index)
        dispatcher = make_dispatcher(name, E, here.ep, here.etp)
        with count_traffic() as forward:
            state = dispatcher.dispatch_preprocess(*leaves, here.own(case, case.experts))
            assert not forward.calls  # local
            state = dispatcher.token_dispatch(state)
            before = dict(forward.calls)
            y = ops.moe_mlp(*dispatcher.dispatch_postprocess(state), up, down, w_gate=gate)
            state = dispatcher.combine_preprocess(y, state)
            assert forward.calls == before
            state = dispatcher.token_combine(state)
            before = dict(forward.calls)
            out = dispatcher.combine_postprocess(state)
            assert forward.calls == before
        for label in ("counts", "metadata"):  # once a layer and group
            assert all(n == 1 for key, n in forward.calls.items() if key[2] == label)
        with count_traffic() as backward:
            out.sum().backward()
        for axis in ("ep", "etp"):
            there, home = tokens[axis]
            about = (name, axis, case.kind, here.ep.size, here.etp.size)
            assert forward.bytes(axes=axis, label="tokens") == size * (there * WIDTH + home * OUT), about
            assert backward.bytes(axes=axis, label="tokens") == size * (home * WIDTH + there * OUT), about
            there, home = probs[axis]
            assert (forward.bytes(axes=axis, label="probs"), backward.bytes(axes=axis, label="probs")) == (
                case.probs.itemsize * there,
                case.probs.itemsize * home,
            ), about
        assert {key[2] for key in backward.calls} <= {"tokens", "probs"}


def check_balanced_formulas(here: Here) -> None:
    """Closed forms where every rank and expert has as many: token t takes experts t k, t k + 1, .. in turn."""
    EP, ETP, T, k = here.ep.size, here.etp.size, 16, 2
    experts = (torch.arange(T * k) % E).view(T, k)
    x, probs = torch.randn(T, WIDTH), torch.full((T, k), 0.5)
    rows = T * k  # that arrive over EP
    pairs = sum(len({int(e) // (E // EP) for e in chosen} - {here.ep.index}) for chosen in experts)
    forms = {
        "allgather": 2 * (EP - 1) * T + (ETP - 1) * EP * T + (ETP - 1) * rows,
        "alltoall": 2 * rows * (EP - 1) // EP + 2 * (ETP - 1) * rows,
        "dedup": 2 * pairs if ETP == 1 else None,
    }
    for name, form in forms.items():
        with count_traffic() as traffic:
            run(make_dispatcher(name, E, here.ep, here.etp), x, probs, experts, lambda rows, *_: rows)
        assert form is None or traffic.bytes(label="tokens") == form * WIDTH * 4, (name, EP, ETP)


def check_round_trip(here: Here) -> None:
    """Experts that do nothing, with probabilities 1 / k: tokens come back, and so do their gradients."""
    T, k = 5 + here.number, 2
    generator = torch.Generator().manual_seed(here.number)
    experts = torch.rand(T, E, generator=generator).argsort(1)[:, :k]
    # An ETP member adds nothing here but the first.
    share = 1.0 if here.etp.index == 0 else 0.0
    for name in NAMES:
        x = torch.randn(T, WIDTH, generator=generator).requires_grad_()
        dispatcher = make_dispatcher(name, E, here.ep, here.etp)
        out = run(dispatcher, x, torch.full((T, k), 1 / k), experts, lambda rows, p, _: share * rows * p)
        assert torch.equal(out, x)
        upstream = torch.randn(T, WIDTH, generator=generator)
        (grad,) = torch.autograd.grad(out, x, upstream)
        assert torch.equal(grad, upstream)


def check_cut_off_ranks(here: Here) -> None:
    """A rank without rows whose experts answer with a fresh tensor still takes part in backward."""
    case = Case("one", [4] * (here.ep.size * here.etp.size), 2, E, torch.float32)
    case.draw()
    want = through("alltoall", here, case)
    for name in NAMES:
        x, probs = (here.own(case, v).requires_grad_() for v in (case.x, case.probs))
        up, gate, down = here.weights(case, here.ep.index, here.etp.index)

        def compute(
            rows: torch.Tensor, p: torch.Tensor, e: torch.Tensor, w: tuple[torch.Tensor, ...] = (up, down, gate)
        ) -> torch.Tensor:
            return ops.moe_mlp(rows, p, e, w[0], w[1], w_gate=w[2]) if rows.shape[0] else torch.zeros(0, OUT)

        out = run(make_dispatcher(name, E, here.ep, here.etp), x, probs, here.own(case, case.experts), compute)
        same([out, *torch.autograd.grad(out, [x, probs], here.own(case, case.dout))], want[:3], name)


def check_no_state(here: Here) -> None:
    """Two micro-batches in flight through one dispatcher, and a call repeated on its state, as in recomputation."""
    block = here.ep.size * here.etp.size
    batches = [Case("random", [3] * block, 2, E, torch.float32), Case("skewed", [5] * block, 3, E, torch.float32)]
    for case in batches:
        case.draw()
    for name in NAMES:
        dispatcher = make_dispatcher(name, E, here.ep, here.etp)
        states = []
        for case in batches:
            own = [here.own(case, v) for v in (case.x, case.probs, case.experts)]
            states.append(dispatcher.dispatch_preprocess(*own))
        arrived = [dispatcher.token_dispatch(state) for state in reversed(states)][::-1]
        again = dispatcher.token_dispatch(states[0])
        same(list(dispatcher.dispatch_postprocess(again)), list(dispatcher.dispatch_postprocess(arrived[0])), name)
        for case, state in zip(batches, arrived):
            up, gate, down = here.weights(case, here.ep.index, here.etp.index)
            y = ops.moe_mlp(*dispatcher.dispatch_postprocess(state), up, down, w_gate=gate)
            out = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(y, state)))
            same([out], through(name, here, case)[:1], name)


def check_static_shapes(here: Here) -> None:
    """With a capacity the shapes say nothing of the routing, as a captured graph needs."""
    shapes = set()
    for kind in ("random", "one", "empty"):
        case = Case(kind, [4] * (here.ep.size * here.etp.size), 1, E, torch.bfloat16)
        case.draw()
        for name in NAMES:
            dispatcher = make_dispatcher(name, E, here.ep, here.etp)
            own = [here.own(case, v) for v in (case.x, case.probs, case.experts)]
            state = dispatcher.token_dispatch(dispatcher.dispatch_preprocess(*own, capacity=4, tokens_per_rank=4))
            rows, probs, experts = dispatcher.dispatch_postprocess(state)
            shapes.add((tuple(rows.shape), tuple(probs.shape), tuple(experts.shape)))
            used = all_sum((experts >= 0).sum(), here.ep)
            assert int(used) == (0 if kind == "empty" else 4 * here.ep.size * here.etp.size)
    assert shapes == {((E * 4 * here.etp.size, WIDTH), (E * 4 * here.etp.size, 1), (E * 4 * here.etp.size, 1))}


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
        FoldedMesh(WORLD, cp=2, ep=4),
        FoldedMesh(WORLD, tp=4, ep=2, etp=2),
        FoldedMesh(WORLD, tp=2, cp=2, etp=4),
        FoldedMesh(WORLD, ep=2),
    ):
        groups = mesh.init_process_groups()
        here = Here(groups.group("ep"), groups.group("etp"))
        block = mesh.ep * mesh.etp
        for kind, tokens, slots, dtype in (
            ("random", [6] * block, 3, torch.float32),
            ("holes", [(5 * r + 3) % 9 for r in range(block)], 4, torch.bfloat16),
            ("skewed", list(range(block)), 2, torch.float64),
            ("one", [7] * block, 1, torch.float32),
            ("empty", [2] * block, 2, torch.float32),
        ):
            check_bytes(here, Case(kind, tokens, slots, E, dtype))
        check_balanced_formulas(here)
        check_round_trip(here)
        check_cut_off_ranks(here)
        check_no_state(here)
        check_static_shapes(here)
    dist.destroy_process_group()


def test_traffic_and_contract_on_four_ranks(tmp_path: Path) -> None:
    mp.start_processes(worker, (str(tmp_path),), WORLD, start_method="spawn")


def test_one_rank_sends_nothing_and_computes_what_the_layer_does() -> None:
    """Without torch.distributed. Experts without tokens have gradients of zeros; fp32 rows equal the fused layer's."""
    case = Case("one", [9], 2, E, torch.float32)
    case.draw()
    here = Here(Group("ep", (0,), 0), Group("etp", (0,), 0))
    with count_traffic() as traffic:
        results = [through(name, here, case) for name in NAMES]
    assert not traffic.calls
    for result in results:
        torch.testing.assert_close(
            result[0], ops.moe_mlp(case.x, case.probs, case.experts, case.up, case.down, w_gate=case.gate)
        )
        for grad in result[3:]:
            assert grad.shape[0] == E and not grad[: E - 1].any() and grad[E - 1].any()
    assert results[0][3].shape == (E, HIDDEN, WIDTH)


def test_errors_name_the_argument() -> None:
    ep, etp = Group("ep", (0,), 0), Group("etp", (0,), 0)
    d = make_dispatcher("alltoall", 4, ep, etp)
    x, probs, experts = torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    state = d.token_dispatch(d.dispatch_preprocess(x, probs, experts))
    for call, message in (
        (lambda: make_dispatcher("ring", 4, ep, etp), "name: got 'ring', want one of allgather, alltoall, dedup"),
        (lambda: make_dispatcher("dedup", 0, ep, etp), "num_experts: got 0"),
        (lambda: d.dispatch_preprocess(x, probs[:2], experts), "probs: got shape (2, 2), want (3, 2)"),
        (lambda: d.dispatch_preprocess(x, probs, experts + 4), "experts: got indices in [4, 4]"),
        (lambda: d.dispatch_preprocess(x, probs, experts, capacity=2), "capacity: got 2, want 6"),
        (lambda: d.dispatch_preprocess(x, probs, experts, capacity=-1), "capacity: got -1"),
        (lambda: d.dispatch_preprocess(x, probs, experts, tokens_per_rank=4), "tokens_per_rank: got 4, want 3"),
        (lambda: d.combine_preprocess(torch.zeros(2, 2), state), "y: got shape (2, 2), want 6 rows"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
