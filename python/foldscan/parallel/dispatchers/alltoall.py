"""Every row to the rank of its expert."""

from __future__ import annotations

from dataclasses import replace

import torch

from foldscan.parallel import collectives
from foldscan.parallel.dispatchers.contract import State, TokenDispatcher
from foldscan.parallel.dispatchers.links import (
    Chain,
    Copies,
    Exchanged,
    Gathered,
    Shared,
    copy_out,
    dispatch,
    sort_rows,
)


class AllToAllDispatcher(TokenDispatcher):
    """Copies a token once for each of its experts and sends the copies, sorted by expert.

    Values sent by a rank, forward: the rows for other ranks times H out and times D back (``(EP - 1) / EP T k`` rows
    when routing is balanced), and over ETP all that arrived here, ``ETP - 1`` times out, and the rows of the others
    back. With a capacity C a rank sends C rows to every expert and no count: a row of padding is known by its
    probability, -0.
    """

    def _leave(self, state: State) -> State:
        assert state.experts is not None
        slots, experts = state.experts.shape[1], state.experts
        order = sort_rows(experts, self.num_experts, state.capacity)
        own = Copies(torch.where(order.rows >= 0, order.rows // slots, -1), self._sums(experts, order.inverse))
        probs = copy_out(state.probs.reshape(-1, 1), Copies(order.rows, (order.inverse.reshape(-1, 1),)))
        if state.capacity is not None:
            probs = torch.where(order.rows[:, None] >= 0, probs + 0.0, -0.0)  # -0 + 0 = +0: no real row has -0
        return replace(state, rows=copy_out(state.rows, own), probs=probs, experts=None, counts=order.counts, own=own)

    def _sums(self, experts: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Where the rows of every token are, as `add_rows` wants them: by rank first, then over the ranks."""
        ep, (tokens, slots) = self.ep.size, experts.shape
        # Two rows have one sum, whether it is made on their rank or over the ranks.
        if ep == 1 or slots <= 2:
            return (inverse,)
        ranks = torch.where(experts >= 0, experts // self.local_experts, ep)
        wanted = torch.zeros(tokens, ep + 1, dtype=torch.int64, device=experts.device)
        wanted = wanted.scatter_(1, ranks, 1)[:, :ep]
        most = min(slots, ep)
        place = (wanted.cumsum(1) - 1).gather(1, ranks.clamp(max=ep - 1)).clamp(min=0)
        inner = inverse.new_full((tokens, most, slots), -1)
        inner.scatter_(1, place[:, None], inverse[:, None])
        outer = torch.arange(tokens * most, device=experts.device).view(tokens, most)
        used = torch.arange(most, device=experts.device) < wanted.sum(1, keepdim=True)
        return inner.view(-1, slots), torch.where(used, outer, -1)

    def token_dispatch(self, state: State) -> State:
        ep, etp, local = self.ep, self.etp, self.local_experts
        assert state.counts is not None
        device = state.rows.device
        if state.capacity is None:
            table = state.counts.view(1, ep.size, local)
            if ep.size > 1:
                table = collectives.all_gather(table, [1] * ep.size, ep, label="counts")
            arrived = table[:, ep.index].reshape(1, -1)
            if etp.size > 1:
                arrived = collectives.all_gather(arrived, [1] * etp.size, etp, label="counts")
            sizes = [table[ep.index].sum(1), table[:, ep.index].sum(1), arrived.sum(1)]
            numbers = torch.cat(sizes).tolist()
            send, receive = numbers[: ep.size], numbers[ep.size : 2 * ep.size]
            members = numbers[2 * ep.size :]
            repeats: torch.Tensor | int = arrived.reshape(-1)
        else:
            send = receive = [local * state.capacity] * ep.size
            members = [sum(receive)] * etp.size
            repeats = state.capacity
        experts = torch.arange(local, device=device).repeat(etp.size * ep.size)
        experts = experts.repeat_interleave(repeats, output_size=sum(members))
        exchange, shared = Exchanged(ep, send, receive), Gathered(etp, members)
        sent, own = sum(send), state.own
        rows, probs = state.rows, state.probs
        if own is not None and sent < rows.shape[0]:  # empty slots were sorted to the end
            rows, probs, own = rows[:sent], probs[:sent], Copies(own.source[:sent], own.sums)
        route = Chain((exchange, Shared(shared, shared, None)))
        rows, probs = dispatch(rows, probs, route, Chain((exchange, shared)))
        return replace(state, rows=rows, probs=probs, experts=experts[:, None], counts=None, own=own, route=route)

    def dispatch_postprocess(self, state: State) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, probs, experts = super().dispatch_postprocess(state)
        if state.capacity is not None:
            padding = (probs.detach() == 0) & torch.signbit(probs.detach())
            experts = experts.masked_fill(padding, -1)
        return rows, probs, experts
