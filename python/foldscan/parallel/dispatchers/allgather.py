"""Every token to every rank of EP."""

from __future__ import annotations

from foldscan.parallel import collectives
from foldscan.parallel.dispatchers.contract import State
from foldscan.parallel.dispatchers.links import Gathered
from foldscan.parallel.dispatchers.slots import SlotDispatcher


class AllGatherDispatcher(SlotDispatcher):
    """Gathers all tokens over EP and ETP; sums go home by reduce-scatter.

    Values sent by a rank of T tokens, forward: dispatch ``((EP - 1) T + (ETP - 1) EP T) H``; combine the rows of the
    other ETP members' tokens (``(ETP - 1) T k`` when routing is balanced) and ``(EP - 1) T`` sums, times D. Independent
    of k but for the rows over ETP, so the least where EP < k. With ``tokens_per_rank`` nobody asks for the number of
    tokens.
    """

    def _leave(self, state: State) -> State:
        return state

    def token_dispatch(self, state: State) -> State:
        each = state.tokens_per_rank
        if each is not None:
            return self._arrive(state, Gathered(self.ep, [each] * self.ep.size), [each * self.ep.size] * self.etp.size)
        counts = [state.rows.shape[0]]
        if self.ep.size > 1:
            counts = [row[0] for row in collectives.exchange_counts(counts, self.ep)]
        return self._arrive(state, Gathered(self.ep, counts), self._arrivals(sum(counts)))
