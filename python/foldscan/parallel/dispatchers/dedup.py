"""A token once to every rank of EP that has one of its experts, however many."""

from __future__ import annotations

from dataclasses import replace

import torch

from foldscan.parallel import collectives
from foldscan.parallel.dispatchers.contract import State
from foldscan.parallel.dispatchers.links import Copies, Exchanged, copy_out, sort_rows
from foldscan.parallel.dispatchers.slots import SlotDispatcher


class DedupDispatcher(SlotDispatcher):
    """Sends a token, with all its slots, once to each rank it is wanted on; a rank sends back one sum for it.

    Values sent by a rank, forward: distinct (token, other rank) pairs times H out and times D back, and over ETP the
    other members' pairs out and their rows back. Never more than `AllToAllDispatcher`. With a capacity C a rank sends
    ``min(E / EP C, tokens_per_rank)`` tokens to every rank.
    """

    def _leave(self, state: State) -> State:
        assert state.experts is not None
        ep, experts = self.ep.size, state.experts
        ranks = torch.where(experts >= 0, experts // self.local_experts, ep)
        wanted = torch.zeros(experts.shape[0], ep + 1, dtype=torch.bool, device=experts.device)
        wanted = wanted.scatter_(1, ranks, True)[:, :ep]
        keys = torch.where(wanted, torch.arange(ep, device=experts.device), -1)
        size = self._pairs(state)
        pairs = sort_rows(keys, ep, size)
        sources = pairs.rows if size is not None else pairs.rows[: int(pairs.counts.sum())]
        sources = torch.where(sources >= 0, sources // ep, -1)
        own = Copies(sources, (pairs.inverse,))
        # Slots that live elsewhere are seen to be so by the receiver; padding is a token of empty slots.
        experts = torch.cat([experts, experts.new_full((1, experts.shape[1]), -1)])[sources]
        return replace(
            state,
            rows=copy_out(state.rows, own),
            probs=copy_out(state.probs, own),
            experts=experts,
            counts=pairs.counts,
            own=own,
        )

    def token_dispatch(self, state: State) -> State:
        ep, etp, size = self.ep, self.etp, self._pairs(state)
        if size is not None:
            exchange = Exchanged(ep, [size] * ep.size, [size] * ep.size)
            return self._arrive(state, exchange, [size * ep.size] * etp.size)
        assert state.counts is not None
        if ep.size == 1:
            send = receive = [state.rows.shape[0]]
        else:
            table = collectives.all_gather(state.counts[None], [1] * ep.size, ep, label="counts")
            send, receive = torch.stack([table[ep.index], table[:, ep.index]]).tolist()
        return self._arrive(state, Exchanged(ep, send, receive), self._arrivals(sum(receive)))

    def _pairs(self, state: State) -> int | None:
        """Tokens to every rank where sizes are fixed."""
        if state.capacity is None:
            return None
        most = self.local_experts * state.capacity
        return most if state.tokens_per_rank is None else min(most, state.tokens_per_rank)
