"""From arrived tokens, each with its slots, to rows of experts: what dispatchers that send tokens have in common."""

from __future__ import annotations

from dataclasses import replace

import torch

from foldscan.parallel import collectives
from foldscan.parallel.dispatchers.contract import State, TokenDispatcher
from foldscan.parallel.dispatchers.links import Chain, Copies, Exchanged, Gathered, Shared, dispatch, sort_rows


class SlotDispatcher(TokenDispatcher):
    """A token travels with all its slots; the receiver picks those that are its own."""

    def _arrive(self, state: State, exchange: Exchanged | Gathered, arrivals: list[int]) -> State:
        """Tokens, probabilities and experts over EP, then over ETP, then into rows.

        Args:
            arrivals: tokens that arrive over EP on each ETP member.
        """
        ep, etp, local = self.ep, self.etp, self.local_experts
        assert state.experts is not None
        shared = Gathered(etp, arrivals)
        experts = shared.out(exchange.out(state.experts.int(), "metadata"), "metadata").long() - ep.index * local
        slots = experts.shape[1]
        # Sorted by ETP member first, so that each member's rows are one piece of the sum over ETP.
        member = torch.arange(etp.size, device=experts.device).repeat_interleave(
            torch.tensor(arrivals, device=experts.device), output_size=sum(arrivals)
        )
        keys = torch.where((experts >= 0) & (experts < local), experts + member[:, None] * local, -1)
        if state.capacity is None:
            order = sort_rows(keys, etp.size * local)
            counts = order.counts.view(etp.size, local).sum(1).tolist()
        else:
            order = sort_rows(keys, etp.size * local, ep.size * state.capacity)
            counts = [local * ep.size * state.capacity] * etp.size
        rows = order.rows[: sum(counts)]
        first, begin = sum(arrivals[: etp.index]), sum(counts[: etp.index])
        inverse = order.inverse[first : first + arrivals[etp.index]]
        inverse = torch.where(inverse >= 0, inverse - begin, -1)
        copies = Copies(torch.where(rows >= 0, rows // slots, -1), (inverse,))
        probs_of_slots = _Slots(slots, Copies(rows, (order.inverse.reshape(-1, 1),)))
        route = Chain((exchange, Shared(shared, Gathered(etp, counts), copies)))
        tokens, probs = dispatch(state.rows, state.probs, route, Chain((exchange, shared, probs_of_slots)))
        # keys hold expert + member * local; a row of padding has none.
        local_experts = torch.where(rows >= 0, _take(keys.reshape(-1), rows) % local, -1)[:, None]
        return replace(state, rows=tokens, probs=probs, experts=local_experts, counts=None, route=route)

    def _arrivals(self, mine: int) -> list[int]:
        """Tokens that arrive over EP on each ETP member, which has to be asked for."""
        etp = self.etp
        if etp.size == 1:
            return [mine]
        return [row[0] for row in collectives.exchange_counts([mine], etp)]


class _Slots:
    """(N, slots) values to one a row, and back."""

    def __init__(self, slots: int, copies: Copies) -> None:
        self.slots, self.copies = slots, copies

    def out(self, x: torch.Tensor, label: str) -> torch.Tensor:
        return self.copies.out(x.reshape(-1, 1), label)

    def back(self, y: torch.Tensor, label: str) -> torch.Tensor:
        return self.copies.back(y, label).view(-1, self.slots)


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``values[index]``, whatever where the index is -1."""
    return values[index.clamp(min=0)] if values.shape[0] else torch.zeros_like(index)
