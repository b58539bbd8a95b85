"""State-space scan over documents that several ranks hold: states travel, never tokens.

To what comes after it, a segment is an affine map of the state that enters it: S_out = a S_in + S_ext, a scalar a for
each head. Every rank tells S_ext and log a of its segments, and composes those before its own; the scan itself then
runs once, from the right states (state passing of arXiv:2405.21060, section 8.2, between ranks).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foldscan import ops
from foldscan.ops._library import wide
from foldscan.parallel import adjoint
from foldscan.parallel.context.layout import ContextLayout, Segment
from foldscan.parallel.groups import Group
from foldscan.reference.ssm import time_steps

_BLOCK = 1024  # tokens whose weighted inputs exist at a time


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
    sending = [[s for s in layout.segments(r) if s.is_continued] for r in range(layout.size)]
    entering: dict[int, torch.Tensor] = {}
    if any(sending):
        rows = [_summary(s, x, dt, A, B, dt_bias, dt_softplus, dt_limit) for s in sending[rank]]
        own = torch.stack(rows) if rows else wide(x).new_zeros(0, x.shape[1] * (x.shape[2] * B.shape[2] + 1))
        own = adjoint.depend(own, x, dt, A, B, dt_bias)
        told = adjoint.all_gather(own, [len(s) for s in sending], group, label="states")
        states, log_decays = told.split([told.shape[1] - x.shape[1], x.shape[1]], dim=1)
        order = {s.index: i for i, s in enumerate(s for each in sending for s in each)}
        states = states.unflatten(1, (*x.shape[1:], B.shape[2]))
        entering = _compose(states, log_decays, order, layout, rank)
        A = adjoint.depend(A, told)
    parts = [
        _scan(s, x, dt, A, B, C, layout, entering.get(s.index), D, z, dt_bias, dt_softplus, dt_limit)
        for s in layout.segments(rank)
        if s.rows
    ]
    if not parts:
        return adjoint.depend(torch.empty_like(x), x, dt, A, B, C, D, z, dt_bias)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scan(
    segment: Segment,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    layout: ContextLayout,
    initial: torch.Tensor | None,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
) -> torch.Tensor:
    """One segment's scan, from the state that enters it."""
    rows = slice(segment.row, segment.row + segment.rows)
    ids = layout.piece_ids(segment.rank).to(x.device) if len(segment.bounds) > 2 else None
    y = ops.mamba_chunk_scan_combined(
        x[None, rows],
        dt[None, rows],
        A,
        B[None, rows],
        C[None, rows],
        D=D,
        z=None if z is None else z[None, rows],
        dt_bias=dt_bias,
        initial_states=None if initial is None else initial[None],
        seq_idx=None if ids is None else ids[None, rows],
        dt_softplus=softplus,
        dt_limit=limit,
    )
    assert isinstance(y, torch.Tensor)  # no final states were asked for
    return y.squeeze(0)


def _summary(
    segment: Segment,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    limit: tuple[float, float],
) -> torch.Tensor:
    """(H (P N + 1),): the state after the last document's tokens here from a zero state, then their log decay."""
    end = segment.row + segment.rows
    rows = slice(end - segment.last_rows, end)
    delta = time_steps(dt[rows], dt_bias, softplus, limit).to(wide(x).dtype)
    # Summed from the end, so that the decays of the last tokens, which count, are differences of no large numbers.
    log_decay = (delta * wide(A)).flip(0).cumsum(0).flip(0)  # of the tokens from each on
    after = torch.cat([log_decay[1:], torch.zeros_like(log_decay[:1])])
    state = _WeightedState.apply(x[rows], torch.exp(after) * delta, B[rows])
    return torch.cat([state.flatten(), log_decay[0]])


def _compose(
    states: torch.Tensor, log_decays: torch.Tensor, order: dict[int, int], layout: ContextLayout, rank: int
) -> dict[int, torch.Tensor]:
    """The state (H, P, N) that enters each segment of a rank that continues a document, by the segment's index.

    Args:
        states, log_decays: (told, H, P, N) and (told, H). order: which of them is whose, by segment.
    """
    entering: dict[int, torch.Tensor] = {}
    state = states.new_zeros(states.shape[1:])
    wanted = [s.index for s in layout.segments(rank) if s.continues]
    for segment in layout.all_segments[: max(wanted, default=-1) + 1]:
        if segment.index in wanted:
            entering[segment.index] = state
        if segment.is_inside:
            state = state * torch.exp(log_decays[order[segment.index], :, None, None]) + states[order[segment.index]]
        elif segment.is_continued:
            state = states[order[segment.index]]
    return entering


class _WeightedState(torch.autograd.Function):
    """sum_t w_t x_t B_t^T a head: x (L, H, P), w (L, H), B (L, G, N) to (H, P, N) in the dtype of w."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w, B)
        groups, state_size = B.shape[1:]
        state = w.new_zeros(groups, x.shape[1] // groups * x.shape[2], state_size)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _blocks(x.shape[0]):
                state += _grouped(x[rows] * w[rows, :, None], groups).mT @ B[rows].to(w.dtype).transpose(0, 1)
        return state.view(x.shape[1], x.shape[2], state_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstate: torch.Tensor) -> Any:
        x, w, B = ctx.saved_tensors
        groups = B.shape[1]
        dstate = dstate.reshape(groups, -1, B.shape[2])
        dx, dw, dB = torch.empty_like(x), torch.empty_like(w), torch.empty_like(B)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _blocks(x.shape[0]):
                weighted = _grouped(x[rows] * w[rows, :, None], groups)
                dB[rows] = (weighted @ dstate).transpose(0, 1)
                seen = (B[rows].to(w.dtype).transpose(0, 1) @ dstate.mT).transpose(0, 1).reshape(x[rows].shape)
                dx[rows] = seen * w[rows, :, None]
                dw[rows] = (seen * x[rows]).sum(2)
        return dx, dw, dB


def _blocks(length: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, length)) for start in range(0, length, _BLOCK)]


def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(L, H, P) to (G, L, H / G P)."""
    return x.reshape(x.shape[0], groups, -1).transpose(0, 1)
