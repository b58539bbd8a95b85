"""State-space scan over documents that several ranks hold: states travel, never tokens.

To what comes after it, a segment is an affine map of the state that enters it: S_out = a S_in + S_ext, a scalar a for
each head. Every rank tells S_ext and log a of its segments, composes those before its own, and scans from the right
states (state passing of arXiv:2405.21060, section 8.2, between ranks). Only a segment inside of one document is scanned
twice, from zero for its S_ext and then from its S_in. That is not dearer than the two ways that spare it, S_ext by a
matrix product before the scan, or C_t S_in added after it, and every state is the kernel's own.
"""

from __future__ import annotations

import torch

from foldscan import ops
from foldscan.ops._library import wide
from foldscan.parallel import adjoint
from foldscan.parallel.context.layout import ContextLayout
from foldscan.parallel.groups import Group
from foldscan.reference.ssm import time_steps


def context_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    layout: ContextLayout,
    group: Group,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> torch.Tensor:
    """The Mamba-2 scan within documents, ``ops.mamba_chunk_scan_combined`` on one rank's share of a packed batch.

    Args:
        x: (T_loc, H, P), this rank's rows as ``layout`` deals them. z: the same, or None.
        dt: (T_loc, H). A, dt_bias: (H). B, C: (T_loc, G, N). D: (H), (H, P) or None.
        group: as many ranks as the layout has.
        dt_softplus, dt_limit: as in ``ops.mamba_chunk_scan_combined``.

    Returns:
        (T_loc, H, P) in x's dtype, differentiable in all float arguments. States and decays are fp32 (fp64 for fp64). A
        rank sends ``H (P N + 1)`` of them to every other for each of its segments whose last document goes on, forward,
        and as many gradients backward.

    Raises:
        TypeError, ValueError: shapes or dtypes, or a group of another size.
    """
    layout.check_group(group)
    rank = group.index
    layout.check_rows("x", x, rank, "heads", "channels")
    for name, value in (("dt", dt), ("B", B), ("C", C), ("z", z)):
        if value is not None:
            layout.check_rows(name, value, rank, *["any"] * (value.dim() - 1))

    def scan(rows: slice, initial: torch.Tensor | None, final: bool) -> tuple[torch.Tensor, ...]:
        """y of some rows, and with ``final`` the state (H, P, N) after them; ``initial`` reaches the first document."""
        found = ops.mamba_chunk_scan_combined(
            x[None, rows],
            dt[None, rows],
            A,
            B[None, rows],
            C[None, rows],
            D=D,
            z=None if z is None else z[None, rows],
            dt_bias=dt_bias,
            initial_states=None if initial is None else initial[None],
            seq_idx=ids[None, rows],
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            return_final_states=final,
        )
        return tuple(t.squeeze(0) for t in (found if isinstance(found, tuple) else (found,)))

    ids = layout.piece_ids(rank).to(x.device)
    heads, width = x.shape[1], x.shape[1] * (x.shape[2] * B.shape[2] + 1)
    own = [s for s in layout.segments(rank) if s.rows]
    done: dict[int, torch.Tensor] = {}  # y after the first document of a segment, which no state reaches
    told: list[torch.Tensor] = []
    for s in own:
        rest = slice(s.row + (s.first_rows if s.continues else 0), s.row + s.rows)
        final: list[torch.Tensor] = []
        if rest.start < rest.stop:
            done[s.index], *final = scan(rest, None, s.is_continued)
            log_decay = wide(A).new_zeros(heads)  # of nothing: what enters the segment does not leave it
        elif s.is_inside:
            rows = slice(s.row, s.row + s.rows)
            _, *final = scan(rows, None, True)
            log_decay = wide(A) * time_steps(dt[rows], dt_bias, dt_softplus, dt_limit).sum(0)
        told += [torch.cat([state.flatten(), log_decay]) for state in final]

    tellers = [[s.index for s in layout.segments(r) if s.is_continued] for r in range(layout.size)]
    entering: dict[int, torch.Tensor] = {}
    if any(tellers):
        # Alike to autograd on every rank, whether it tells something or not and uses what it is told or not.
        mine = adjoint.depend(torch.stack(told) if told else wide(x).new_zeros(0, width), x, dt, A, B, dt_bias)
        all_told = adjoint.all_gather(mine, [len(t) for t in tellers], group, label="states")
        states, log_decays = all_told.split([width - heads, heads], dim=1)
        maps = zip(states.unflatten(1, (*x.shape[1:], B.shape[2])).unbind(), log_decays.unbind())
        entering = _compose(dict(zip((index for t in tellers for index in t), maps)), layout, rank)
    parts = []
    for s in own:
        if s.continues:
            parts.append(scan(slice(s.row, s.row + s.first_rows), entering[s.index], False)[0])
        if s.index in done:
            parts.append(done[s.index])
    if not parts:
        parts = [adjoint.depend(torch.empty_like(x), x, dt, A, B, C, D, z, dt_bias)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return adjoint.depend(y, all_told) if any(tellers) else y


def _compose(
    maps: dict[int, tuple[torch.Tensor, torch.Tensor]], layout: ContextLayout, rank: int
) -> dict[int, torch.Tensor]:
    """The state (H, P, N) that enters each segment of a rank that continues a document, by the segment's index.

    Args:
        maps: S_ext (H, P, N) and log a (H) of the segments whose last document goes on.
    """
    entering: dict[int, torch.Tensor] = {}
    state: torch.Tensor | None = None  # after the segments so far
    wanted = [s.index for s in layout.segments(rank) if s.continues]
    for s in layout.all_segments[: max(wanted, default=-1) + 1]:
        if s.index in wanted:
            assert state is not None  # the document began in a segment before
            entering[s.index] = state
        if s.is_inside:
            assert state is not None
            added, log_decay = maps[s.index]
            state = state * torch.exp(log_decay)[:, None, None] + added
        elif s.is_continued:
            state = maps[s.index][0]
    return entering
